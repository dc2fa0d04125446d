"""What data may be for: one table of readings, each a task with the columns that it needs and what these must hold.

A column that has the name that the task looks for costs nothing, one under a known other name 1, one that only its
values recommend 2. What a reading leaves unread costs too, if it looks like something to learn from. The cheapest
reading wins if the next one costs at least 1 more; else the user decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from typing import Any

from peftcli.data.rows import is_true_or_false, truth_in
from peftcli.drafting.bases import AUDIO, DECODER, DIFFUSION, ENCODER, ENCODER_DECODER, SEEING, VISION
from peftcli.drafting.facts import ColumnFacts
from peftcli.drafting.look import Look
from peftcli.tasks import (
    CAPTIONS,
    CHOICES,
    CHOSEN,
    EDITED_PICTURES,
    INSTRUCTIONS,
    LABELS,
    PICTURES,
    SCORES,
    SOURCE_PICTURES,
    TAGS,
    TOKENS,
    TRANSCRIPTS,
)
from peftcli.tasks.boxes import objects_of

_EXACT, _KNOWN, _BY_VALUES = 0, 1, 2
_UNREAD_MEDIA, _UNREAD_CLASSES, _UNREAD_TEXT, _UNREAD_FRACTIONS = 4, 3, 3, 2
_SIDE = 0.2
"""A text of fewer words than this share of those that are read is a title or a name, and need not be read."""
_LAST_WORD = 100
"""What a name of which only the last word is known comes later than others."""
_MAX_CANDIDATES, _MAX_TRIED = 6, 400
_METADATA = {
    *("id", "idx", "index", "uid", "uuid", "guid", "key", "source", "src", "url", "link", "date", "time"),
    *("timestamp", "created_at", "updated_at", "lang", "language", "locale", "split", "fold", "subset", "dataset"),
    *("dataset_name", "author", "user", "username", "user_name", "license", "licence", "meta", "metadata", "version"),
    *("file", "filename", "annotator", "worker", "model", "num_tokens", "length", "row", "answer_id", "created"),
    *("gender", "age", "accent", "speaker", "client_id", "up_votes", "down_votes", "segment", "chapter", "book"),
    *("page", "quality", "unnamed"),
}
"""Names of columns that say something about a row, not what is to be learnt."""
Test = Callable[[ColumnFacts], str | None]
"""Returns the count that lets a column have a role, or None if it cannot have it."""


@dataclass(frozen=True)
class Role:
    """A column of a task."""

    name: str
    """The task's name for it, as ``dataset.columns`` has it."""
    usual: tuple[str, ...]
    """Names under which the task finds it."""
    others: tuple[str, ...]
    """Other names that say the same."""
    named: Test
    """What a column of such a name must hold."""
    values: Test | None = None
    """What a column of any other name must hold; None: the name is needed."""
    optional: bool = False
    may_be_one: bool = False
    """Whether all rows may have the same value, as one question about many pictures."""
    ranked: bool = True
    """Whether of two known names the one that is listed first is meant, and not either."""


@dataclass(frozen=True)
class Reading:
    """A row of the table."""

    task: str
    roles: tuple[Role, ...]
    families: tuple[str, ...]
    """Kinds of base models that the task is for."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the task that these rows need."""
    format: str | None = None
    joint: Callable[[Mapping[str, ColumnFacts], Look], str | None] | None = None
    """Returns the count that shows that the columns belong together; None: they do not. Empty: nothing to say."""
    extra: int = 0
    """What the reading costs besides its columns, as it is a less likely one."""
    only_asked: tuple[str | None, ...] = ()
    """Families (None: no base model is given) for which the task must be named, since another reading of the same
    columns is the usual one."""


@dataclass(frozen=True)
class Found:
    """A reading of the user's data."""

    reading: Reading
    columns: Mapping[str, str | list[str]]
    """The task's column -> the data's."""
    cost: int
    rank: int
    """The sum of the places of its names among the known ones."""
    reasons: Mapping[str, str]
    """The task's column -> the count that decided."""
    settings: Mapping[str, Any]
    guessed: int = 0
    """How many columns only their values recommend."""

    def names(self) -> list[str]:
        """Return the columns of the data that are read."""
        return [each for name in self.columns.values() for each in (name if isinstance(name, list) else [name])]


def find_readings(look: Look, task: str | None, family: str | None, given: Mapping[str, str]) -> list[Found]:
    """Return the readings of the data, the cheapest first; of one task and the same columns the cheapest alone.

    ``given`` are columns that the user named.
    """
    found = list[Found]()
    for reading in READINGS:
        if task is not None and reading.task != task:
            continue
        if task is None and family in reading.only_asked:
            continue
        if family is not None and family not in reading.families:
            continue
        found += _found(reading, look, given)
    found += find_one_hot(look, task, family, given)
    best = dict[tuple[Any, ...], Found]()
    for each in sorted(found, key=lambda each: (each.cost, each.rank, -len(each.names()))):
        order = tuple(each.columns.items()) if each.guessed > 1 and each.reading.format else ()
        best.setdefault((each.reading.task, frozenset(each.names()), order), each)
    return list(best.values())


def rivals_of(found: Sequence[Found]) -> list[Found]:
    """Return the first of the readings, and those that are as likely."""
    first = found[0]
    return [
        each
        for each in found
        if each is first
        or (each.reading.task != first.reading.task and each.cost == first.cost)
        or (each.cost == first.cost and each.rank == first.rank and not {*each.names()} < {*first.names()})
    ]


_Chosen = tuple[str, int, int, str]
"""A column, what its name costs, its place among the known names, and the count that lets it be a role."""


def _found(reading: Reading, look: Look, given: Mapping[str, str]) -> Iterator[Found]:
    options = [list(_candidates(role, look, given)) for role in reading.roles]
    for chosen in islice(product(*options), _MAX_TRIED):
        taken = {role.name: each for role, each in zip(reading.roles, chosen, strict=True) if each is not None}
        names = [each[0] for each in taken.values()]
        if len(set(names)) < len(names) or _overlap(names):
            continue
        facts = {role: look.columns[each[0]] for role, each in taken.items()}
        together = reading.joint(facts, look) if reading.joint else ""
        if together is None:
            continue
        reasons = {role: each[3] for role, each in taken.items()}
        if together:
            reasons[list(taken)[-1]] += f"; {together}"
        cost = sum(each[1] for each in taken.values()) + _unread(names, look, given) + reading.extra
        rank = sum(each[2] for each in taken.values())
        guessed = sum(each[1] == _BY_VALUES for each in taken.values())
        columns = dict(zip(taken, names, strict=True))
        yield Found(reading, columns, cost, rank, reasons, dict(reading.settings), guessed)


def find_one_hot(look: Look, task: str | None, family: str | None, given: Mapping[str, str]) -> list[Found]:
    """Return the readings of inputs whose labels are columns of 0 and 1, at least two and none called a label."""
    names = [
        name
        for name, facts in look.columns.items()
        if facts.is_zero_one and not _is_metadata(name) and len(facts.given) == len(facts.values)
    ]
    if len(names) < 2 or {*LABELS} & {*names} or "label" in given or task not in (None, *_ONE_HOT):
        return []
    found = list[Found]()
    total = sum(sum(truth_in(each) is True for each in look.columns[name].given) for name in names)
    count = f"{len(names)} columns of 0 and 1, {total:,} ones in {len(look.sample):,} rows"
    for reading in READINGS:
        if reading.task not in _ONE_HOT or (family and family not in reading.families) or len(reading.roles) != 2:
            continue
        for each in _candidates(reading.roles[0], look, given):
            if each is not None and each[0] not in names:
                columns: dict[str, str | list[str]] = {reading.roles[0].name: each[0], "labels": names}
                cost = each[1] + _KNOWN + _unread([each[0], *names], look, given)
                reasons = {reading.roles[0].name: each[3], "labels": count}
                found.append(Found(reading, columns, cost, each[2], reasons, {}))
    return found


_ONE_HOT = ("sequence_classification", "image_classification", "audio_classification")


def _overlap(names: Sequence[str]) -> bool:
    """Whether a column and a key of it are both there."""
    return any(one != other and other.startswith(f"{one}.") for one in names for other in names)


def _candidates(role: Role, look: Look, given: Mapping[str, str]) -> Iterator[_Chosen | None]:
    """Yield the columns that may be a role, the likeliest first; None: the role stays empty."""
    if role.name in given:
        facts = look.columns[given[role.name]]
        yield facts.name, _EXACT, 0, role.named(facts) or "as given"
        return
    found, order = list[_Chosen](), {name: at for at, name in enumerate((*role.usual, *role.others))}
    for name, facts in look.columns.items():
        if facts.is_constant and not (facts.media or facts.parsed_list or role.optional or role.may_be_one):
            continue
        plain = _plain(name)
        last = plain.rpartition("_")[2] if role.values else plain
        rank = order.get(plain, order.get(last, len(order))) if role.ranked else 0
        rank += _LAST_WORD * (plain not in order)
        if name in role.usual and (why := role.named(facts)):
            found.append((name, _EXACT, rank, why))
        elif (plain in order or last in order) and not _is_metadata(name) and (why := role.named(facts)):
            found.append((name, _KNOWN, rank, why))
        elif role.values and not _is_metadata(name) and (why := role.values(facts)):
            found.append((name, _BY_VALUES, 0, why))
    found.sort(key=lambda each: each[1:3])
    yield from found[:_MAX_CANDIDATES]
    if role.optional:
        yield None


def _plain(name: str) -> str:
    """A column's name as the table has it; of a key of an object, the key."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.rpartition(".")[2].strip())
    return re.sub(r"[\s-]+", "_", name.lower())


def _unread(names: Sequence[str], look: Look, given: Mapping[str, str]) -> int:
    """Return what the columns that a reading leaves out cost, which the user's own choice does not."""
    read = {*names}
    tops = {name.partition(".")[0] for name in read}
    if given:
        return 0
    texts = [facts.words for name in read if (facts := look.columns[name]).is_text]
    cost = 0
    for name, facts in look.columns.items():
        is_key = "." in name and name.partition(".")[0] in look.columns
        if name in read or (is_key and name.partition(".")[0] in read) or (not is_key and name in tops):
            continue
        if facts.is_constant or _is_metadata(name):
            continue
        if facts.media or facts.has_pictures:
            cost += _UNREAD_MEDIA
        elif facts.is_free:
            cost += _UNREAD_TEXT * (facts.words >= _SIDE * max(texts, default=0))
        elif facts.is_classes or facts.separator or facts.is_names:
            cost += _UNREAD_CLASSES
        elif facts.turns or facts.is_spans or facts.is_tags:
            cost += _UNREAD_MEDIA
        elif facts.is_fractional:
            cost += _UNREAD_FRACTIONS
    return cost


def _is_metadata(name: str) -> bool:
    plain = _plain(name)
    endings = ("_id", "_at", "_date", "_url", "_votes", "_count", "_likes", "_ratio", "_time")
    return plain in _METADATA or plain.endswith(endings) or plain.startswith("unnamed")


# --- what a column must hold ------------------------------------------------------------------------------------------


def _text(facts: ColumnFacts) -> str | None:
    return facts.described_texts() if facts.is_text and not facts.media and not facts.numbers else None


def _any_text(facts: ColumnFacts) -> str | None:
    return facts.described_texts() if facts.is_text and not facts.media else None


def _free(facts: ColumnFacts) -> str | None:
    return facts.described_texts() if facts.is_free else None


def _classes(facts: ColumnFacts) -> str | None:
    if facts.separator and facts.is_text and not facts.is_list_in_text:
        return _joined(facts)
    return facts.described_classes() if facts.is_classes else None


def _label(facts: ColumnFacts) -> str | None:
    """A class, a number or several labels, for a column that is called so."""
    if facts.media or facts.is_spans or facts.turns:
        return None
    if facts.is_names or facts.separator:
        return _joined(facts)
    if facts.is_fractional:
        return facts.described_numbers()
    few = 2 <= len(facts.counts) <= 0.7 * max(4, len(facts.given)) and not facts.is_free
    return facts.described_classes() if facts.is_classes or few else None


def _joined(facts: ColumnFacts) -> str | None:
    parts = facts.parts
    if not 2 <= len(parts) <= 1000:
        return None
    several = sum(facts.separator in each for each in facts.texts) if facts.separator else 0
    between = f", joined by {facts.separator!r} in {several:,}" if facts.separator and not facts.parsed_list else ""
    return f"{len(facts.given):,} {facts.of()} hold some of {len(parts):,} names{between}"


def _fraction(facts: ColumnFacts) -> str | None:
    return facts.described_numbers() if facts.is_fractional and len(facts.counts) > 5 else None


def _number(facts: ColumnFacts) -> str | None:
    return facts.described_numbers() if facts.numbers and len(facts.counts) > 2 else None


def _score(facts: ColumnFacts) -> str | None:
    """A score, also one of 0 and 1."""
    return _truth(facts) or (facts.described_numbers() if facts.numbers and not facts.is_constant else None)


def _image(facts: ColumnFacts) -> str | None:
    return f"{len(facts.given):,} {facts.of()} are pictures that exist" if facts.media == "image" else None


def _audio(facts: ColumnFacts) -> str | None:
    return f"{len(facts.given):,} {facts.of()} are sounds that exist" if facts.media == "audio" else None


def _objects(facts: ColumnFacts) -> str | None:
    boxes = 0
    try:
        for each in facts.given:
            boxes += len(objects_of(each).boxes)
    except ValueError:
        return None
    return f"{len(facts.given):,} {facts.of()} hold {boxes:,} boxes with categories" if boxes else None


def _messages(facts: ColumnFacts) -> str | None:
    return _turns(facts, "messages")


def _sharegpt(facts: ColumnFacts) -> str | None:
    return _turns(facts, "sharegpt")


def _turns(facts: ColumnFacts, kind: str) -> str | None:
    """Turns of texts alone."""
    return None if facts.pictured_turns else _any_turns(facts, kind)


def _any_turns(facts: ColumnFacts, kind: str | None) -> str | None:
    if kind is None or facts.turns != kind:
        return None
    keys = "role and content" if kind == "messages" else "from and value"
    return f"{len(facts.given):,} {facts.of()} are lists of turns with {keys}"


def _turns_about_pictures(facts: ColumnFacts) -> str | None:
    """Turns of which some may be about pictures: in parts, or by marks in their texts."""
    found = _any_turns(facts, facts.turns)
    return found and found + (f"; {facts.pictured_turns:,} have pictures" if facts.pictured_turns else "")


def _turns_with_pictures(facts: ColumnFacts) -> str | None:
    return _turns_about_pictures(facts) if facts.pictured_turns else None


def _pictures(facts: ColumnFacts) -> str | None:
    """Pictures, or lists of them."""
    if not facts.has_pictures or facts.media:
        return _image(facts)
    none = sum(not each for each in facts.parsed_list or ())
    return f"{len(facts.given):,} {facts.of()} are lists of pictures that exist{f', {none:,} empty' if none else ''}"


def _answer(facts: ColumnFacts) -> str | None:
    """An answer of a conversation: a text, or messages."""
    return _any_text(facts) or _messages(facts)


def _maybe_text(facts: ColumnFacts) -> str | None:
    """A text that rows may lack."""
    if facts.given and not facts.is_text:
        return None
    return f"{len(facts.given):,} {facts.of()} are there"


def _history(facts: ColumnFacts) -> str | None:
    """Earlier turns: lists of pairs of texts."""
    pairs = facts.parsed_list is not None and all(isinstance(item, list) and len(item) == 2 for item in facts.items)
    return f"{sum(map(bool, facts.parsed_list or ())):,} {facts.of()} hold earlier turns" if pairs else None


def _words_list(facts: ColumnFacts) -> str | None:
    return f"{len(facts.given):,} {facts.of()} are lists of words" if facts.is_words else None


def _named_tags(facts: ColumnFacts) -> str | None:
    """Tags, for a column that is called so: names or numbers, also few rows of them."""
    kinds = {item for item in facts.items if isinstance(item, str | int)}
    if not facts.items or len(kinds) > 0.5 * max(20, len(facts.items)):
        return None
    return f"{len(facts.given):,} {facts.of()} are lists of {len(kinds)} tags"


def _tags(facts: ColumnFacts) -> str | None:
    kinds = len({str(item) for item in facts.items})
    return f"{len(facts.given):,} {facts.of()} are lists of {kinds} tags" if facts.is_tags else None


def _spans(facts: ColumnFacts) -> str | None:
    return f"{len(facts.given):,} {facts.of()} are lists of start, end and label" if facts.is_spans else None


def _answers(facts: ColumnFacts) -> str | None:
    """Answers to a question about a text: texts with places, or texts."""
    if facts.is_text:
        return f"{len(facts.texts):,} {facts.of()} are texts"
    objects = [each for each in facts.given if isinstance(each, dict) and "text" in each]
    return f"{len(objects):,} {facts.of()} are answers with their places" if len(objects) == len(facts.given) else None


def _choices(facts: ColumnFacts) -> str | None:
    """Texts to choose from: lists of two or more, or what holds such a list under ``text``."""
    objects = [each["text"] for each in facts.given if isinstance(each, dict) and isinstance(each.get("text"), list)]
    lists = facts.parsed_list or objects
    good = sum(len(each) > 1 and all(isinstance(text, str) for text in each) for each in lists)
    return f"{good:,} {facts.of()} are lists of texts" if lists and good >= 0.95 * len(facts.given) else None


def _chosen(facts: ColumnFacts) -> str | None:
    """A place among choices, a letter, or the text of one."""
    return f"{len(facts.given):,} {facts.of()} are places or texts" if facts.counts and not facts.media else None


def _truth(facts: ColumnFacts) -> str | None:
    if not facts.is_zero_one or facts.is_constant:
        return None
    good = sum(str(each).strip().lower() in ("true", "1", "1.0") for each in facts.given)
    return f"{good:,} {facts.of()} are true or 1, {len(facts.given) - good:,} false or 0"


def _said_truth(facts: ColumnFacts) -> str | None:
    """True and false, and not 0 and 1, which may mean something else."""
    return _truth(facts) if all(map(is_true_or_false, facts.given)) else None


# --- what columns must be together ------------------------------------------------------------------------------------


def _pairs(facts: Mapping[str, ColumnFacts], one: str, other: str) -> Iterator[tuple[Any, Any]]:
    for pair in zip(facts[one].values, facts[other].values, strict=True):
        if all(each is not None for each in pair):
            yield pair


def _alike(facts: Mapping[str, ColumnFacts], look: Look) -> str | None:
    """Texts of similar lengths: two sides of a pair, not a title and a body."""
    one, other = (facts[name].words for name in ("text", "text_pair"))
    return "" if max(one, other) <= max(1, min(one, other)) / _SIDE else None


def _equal_lengths(facts: Mapping[str, ColumnFacts], look: Look) -> str | None:
    words, tags = (facts[name].parsed_list or [] for name in ("tokens", "tags"))
    if len({*map(str, facts["tokens"].items)}) < len({*map(str, facts["tags"].items)}):
        return None
    same = sum(len(one) == len(other) for one, other in zip(words, tags, strict=False))
    return f"as many as words in {same:,} rows" if same >= 0.95 * max(len(words), len(tags)) else None


def _spans_in_text(facts: Mapping[str, ColumnFacts], look: Look) -> str | None:
    spans, inside = 0, 0
    for text, value in _pairs(facts, "text", "entities"):
        for span in value if isinstance(value, list) else ():
            start, end = _ends(span)
            spans, inside = spans + 1, inside + (isinstance(text, str) and 0 <= start < end <= len(text))
    return f"{inside:,} of {spans:,} spans lie in the text" if spans and inside >= 0.9 * spans else None


def _ends(span: Any) -> tuple[int, int]:
    if isinstance(span, dict):
        start = next((span[key] for key in ("start", "start_offset", "begin") if isinstance(span.get(key), int)), 0)
        return start, next((span[key] for key in ("end", "end_offset") if isinstance(span.get(key), int)), 0)
    return (span[0], span[1]) if isinstance(span, list | tuple) and len(span) > 1 else (0, 0)


def _answer_in_context(facts: Mapping[str, ColumnFacts], look: Look) -> str | None:
    inside = given = 0
    for context, answer in _pairs(facts, "context", "answers"):
        for text in answer_texts(answer):
            given, inside = given + 1, inside + (isinstance(context, str) and text in context)
    return f"{inside:,} of {given:,} answers stand in the context" if given and inside >= 0.8 * given else None


def answer_texts(answer: Any) -> list[str]:
    """The texts of an answer to a question about a text."""
    found = answer.get("text") if isinstance(answer, dict) else answer
    return [each for each in (found if isinstance(found, list) else [found]) if isinstance(each, str) and each.strip()]


def _common_start(facts: Mapping[str, ColumnFacts], look: Look) -> str | None:
    """How often both answers begin alike, which then is their prompt."""
    if "prompt" in facts:
        return ""
    pairs = list(_pairs(facts, "chosen", "rejected"))
    same = sum(
        isinstance(one, str) and isinstance(other, str) and _shared(one, other) >= 0.2 * min(len(one), len(other))
        for one, other in pairs
    )
    return f"{same:,} of {len(pairs):,} pairs begin alike: a common prompt" if same > 0.5 * len(pairs) else ""


def _shared(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# --- the table --------------------------------------------------------------------------------------------------------

_TEXT_NAMES = (
    *("content", "body", "document", "review", "review_text", "reviewtext", "comment", "comment_text", "message"),
    *("tweet", "tweet_text", "post", "description", "abstract", "article", "utterance", "query", "question", "sms"),
    *("email", "title", "headline", "news", "statement", "input", "text_clean", "verse", "mail", "texte", "texto"),
    *("satz", "frase"),
)
_LABEL_NAMES = (
    *("class", "category", "target", "sentiment", "intent", "tag", "topic", "emotion", "type", "rating", "stars"),
    *("is_spam", "spam", "y", "output", "polarity", "genre", "class_index", "airline_sentiment", "label_text"),
    *("labels_text", "is_duplicate", "gold_label", "entailment_judgment", "relation", "stance", "toxic"),
    *("category_name", "kategorie", "categories", "tags", "topics", "genres", "klasse", "etiqueta", "categorie"),
    *("score", "department", "priority"),
)
_NUMBER_NAMES = (
    *("score", "rating", "similarity", "target", "value", "grade", "price", "stars", "toxicity", "relevance", "y"),
)
_ONE = ("text_a", "s1", "sent1", "first", "question_1", "text1", "sentence_a", "sentence_1", "q1", "premise", "claim")
_OTHER = ("text_b", "s2", "sent2", "second", "question_2", "text2", "sentence_b", "sentence_2", "q2", "hypothesis")
_LANGUAGES = (
    *("en", "eng", "english", "de", "fr", "es", "it", "pt", "nl", "zh", "ru", "ja", "pl", "tr", "ar", "german"),
    *("french", "spanish", "italian", "chinese", "russian", "dutch", "portuguese", "deutsch", "englisch"),
    *("source_text", "target_text"),
)
_PROMPTS = (
    *("question", "query", "instruction", "input", "inputs", "source", "problem", "user", "human", "src", "text"),
    *("document", "article", "dialogue", "context", "request", "ask", "frage", "original", "incorrect", "docstring"),
    *("nl", "intent"),
    *_LANGUAGES,
)
_COMPLETIONS = (
    *("answer", "response", "output", "target", "targets", "summary", "highlights", "solution", "reply", "label"),
    *("assistant", "bot", "translation", "tgt", "corrected", "correct", "antwort", "abstract", "headline", "title"),
    *("sql",),
    *_LANGUAGES,
)
_GOOD = ("preferred", "better", "winner", "accepted", "win", "good", "y_w", "chosen_response", "response_j", "best")
_BAD = ("dispreferred", "worse", "loser", "refused", "lose", "bad", "y_l", "rejected_response", "response_k", "worst")
_LANGUAGE_TASKS: tuple[tuple[str, tuple[str, ...], tuple[str | None, ...]], ...] = (
    ("causal_lm", (DECODER,), ()),
    ("seq2seq_lm", (ENCODER_DECODER,), (None,)),
)
_CLASSIFIERS = (ENCODER, DECODER, ENCODER_DECODER)


def _language(roles: tuple[Role, ...], format: str) -> list[Reading]:
    """The readings of rows that a language model continues or answers."""
    tasks = _LANGUAGE_TASKS if format != "text" else _LANGUAGE_TASKS[:1]
    return [Reading(name, roles, families, format=format, only_asked=asked) for name, families, asked in tasks]


_TEXT = Role("text", ("text", "sentence"), _TEXT_NAMES, _any_text, _free)
_LABEL = Role("label", LABELS, _LABEL_NAMES, _label, _classes, ranked=False)
_SOUND = Role(
    "audio", ("audio", "file_name", "path", "file", "audio_file_name"), ("wav", "clip", "filename"), _audio, _audio
)
_PROMPT = Role("prompt", ("prompt",), _PROMPTS, _answer, _free)
_SYSTEM = Role("system", ("system",), (), _maybe_text, optional=True)
_OPTIONAL_PROMPT = Role("prompt", ("prompt",), ("question", "query", "instruction", "input"), _answer, optional=True)
_TWO_ANSWERS = (
    *(_OPTIONAL_PROMPT, Role("chosen", ("chosen",), _GOOD, _answer)),
    *(Role("rejected", ("rejected",), _BAD, _answer), _SYSTEM),
)

_PICTURES = Role(
    "images",
    ("images", "image", "file_name"),
    ("img", "picture", "pictures", "photo", "path", "file", "filename", "image_path", "image_paths", "image_file_name"),
    _pictures,
    _pictures,
)
_TURNS = ("messages", "conversations"), ("conversation", "chat", "dialog", "dialogue", "turns")
_ASKED_OF_PICTURES = (
    Role("messages", *_TURNS, _turns_about_pictures, _turns_about_pictures),
    Role(
        "prompt",
        ("prompt", "question"),
        ("instruction", "query", "input", "text", "problem"),
        _any_text,
        _free,
        may_be_one=True,
    ),
    Role(
        "completion",
        ("completion", "answer"),
        ("answers", "response", "output", "target", "caption", "solution", "reply", "label"),
        _any_text,
        _free,
    ),
)


def _seeing() -> Iterator[Reading]:
    """The readings of rows about pictures; where the base model reads pictures, rows may have none."""
    turns, *pair = _ASKED_OF_PICTURES
    for asked in ((turns,), tuple(pair)):
        yield Reading("image_text_to_text", (_PICTURES, *asked, _SYSTEM), (SEEING,))
        yield Reading("image_text_to_text", (*asked, _SYSTEM), (SEEING,), only_asked=(None,))
    yield Reading(
        "image_text_to_text",
        (replace(turns, named=_turns_with_pictures, values=_turns_with_pictures), _SYSTEM),
        (SEEING,),
    )


READINGS: tuple[Reading, ...] = (
    *_seeing(),
    Reading("sequence_classification", (_TEXT, _LABEL), _CLASSIFIERS),
    Reading(
        "sequence_classification",
        (_TEXT, Role("label", LABELS, _NUMBER_NAMES, _number, _fraction)),
        _CLASSIFIERS,
        {"problem_type": "regression"},
    ),
    *(
        Reading(
            "sequence_classification",
            (
                Role("text", (one,), (), _any_text) if one else Role("text", ("text",), _ONE, _any_text, _free),
                Role("text_pair", (other,), (), _any_text)
                if other
                else Role("text_pair", ("text_pair",), _OTHER, _any_text, _free),
                _LABEL,
            ),
            _CLASSIFIERS,
            joint=None if one else _alike,
        )
        for one, other in (
            *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
            *(("question", "sentence"), ("question", "passage"), ("", "")),
        )
    ),
    Reading(
        "token_classification",
        (
            Role("tokens", TOKENS, ("token", "sentence", "text", "word"), _words_list, _words_list),
            Role("tags", TAGS, ("ner", "tag", "label", "bio", "bio_tags", "labels_ner", "pos"), _named_tags, _tags),
        ),
        (ENCODER, DECODER),
        joint=_equal_lengths,
    ),
    Reading(
        "token_classification",
        (
            Role("text", ("text", "sentence"), _TEXT_NAMES, _any_text, _free),
            Role("entities", ("entities", "spans"), ("label", "labels", "annotations", "ner"), _spans, _spans),
        ),
        (ENCODER, DECODER),
        joint=_spans_in_text,
    ),
    Reading(
        "question_answering",
        (
            Role("question", ("question",), ("query", "q", "frage"), _any_text, _free),
            Role("context", ("context",), ("passage", "paragraph", "document", "text", "article"), _any_text, _free),
            Role("answers", ("answers", "answer"), ("answer_text", "span", "response"), _answers, _answers),
        ),
        (ENCODER,),
        joint=_answer_in_context,
    ),
    Reading(
        "multiple_choice",
        (
            Role("question", ("question",), ("query", "q", "prompt", "stem", "startphrase", "sentence"), _any_text),
            Role(
                "context", ("context", "passage", "article"), ("paragraph", "text", "story"), _maybe_text, optional=True
            ),
            Role("choices", CHOICES, ("candidates", "answers", "alternatives"), _choices),
            Role("label", CHOSEN, ("correct", "correct_answer", "target", "gold", "answer_index", "solution"), _chosen),
        ),
        (ENCODER,),
    ),
    *(
        Reading(
            "feature_extraction",
            (
                Role("anchor", ("anchor", "query"), ("q", "title", "text1", "sentence1"), _any_text, values),
                Role(
                    "positive", ("positive",), ("pos", "document", "passage", "text2", "sentence2"), _any_text, values
                ),
                Role("negative", ("negative",), ("neg", "hard_negative"), _any_text, optional=True),
            ),
            (family,),
        )
        for family, values in ((ENCODER, _free), (DECODER, None))
    ),
    Reading(
        "feature_extraction",
        (
            Role("sentence1", ("sentence1",), _ONE, _any_text, _free),
            Role("sentence2", ("sentence2",), _OTHER, _any_text, _free),
            Role("score", ("score",), ("similarity", "similarity_score", "relatedness", "relatedness_score"), _number),
        ),
        (ENCODER, DECODER),
    ),
    Reading(
        "reranker",
        (
            Role("query", ("query", "question"), (), _any_text),
            Role("document", ("document", "passage"), ("doc", "text"), _any_text),
            Role("label", SCORES, ("relevance", "relevant", "is_relevant"), _score),
        ),
        (ENCODER, DECODER),
    ),
    *(
        Reading(
            "reranker",
            (
                Role("query", ("query", "question", "anchor"), ("q",), _any_text),
                Role("positive", ("positive",), ("pos", "document", "passage"), _any_text),
                *negative,
            ),
            (ENCODER, DECODER),
            settings,
            only_asked=(ENCODER, DECODER, None),
        )
        for negative, settings in (
            ((Role("negative", ("negative", "negative_1"), ("neg", "hard_negative"), _any_text),), {}),
            ((), {"negatives": "mined", "miner": "sentence-transformers/all-MiniLM-L6-v2"}),
        )
    ),
    Reading("preference", _TWO_ANSWERS, (DECODER,), joint=_common_start),
    *(
        Reading(
            "preference",
            (
                replace(_OPTIONAL_PROMPT, optional=False),
                Role("completion", ("completion",), ("response", "answer", "output", "reply"), _answer),
                Role("label", ("label",), ("good", "thumbs_up", "feedback", "is_good", "liked", "accepted"), named),
            ),
            (DECODER,),
            {"loss": "kto"},
            extra=extra,
        )
        for named, extra in ((_said_truth, 0), (_truth, _UNREAD_CLASSES))
    ),
    Reading(
        "text_to_image",
        (
            Role("image", (*SOURCE_PICTURES, *PICTURES), (), _image),
            Role("text", INSTRUCTIONS, (), _any_text),
            Role("target", EDITED_PICTURES, (), _image),
        ),
        (DIFFUSION,),
    ),
    Reading(
        "text_to_image",
        (Role("image", PICTURES, ("path", "file", "filename"), _image, _image),),
        (DIFFUSION,),
        {"instance_prompt": ""},
        only_asked=(None,),
    ),
    Reading("reward", _TWO_ANSWERS, (ENCODER, DECODER), joint=_common_start, only_asked=(DECODER, None)),
    Reading(
        "image_classification",
        (Role("image", PICTURES, ("path", "file", "filepath", "filename", "image_path"), _image, _image), _LABEL),
        (VISION,),
    ),
    Reading(
        "semantic_segmentation",
        (
            Role("image", PICTURES, ("path", "file", "photo", "input"), _image, _image),
            Role(
                "annotation",
                ("annotation", "mask", "annotation_file_name", "mask_file_name", "label", "label_file_name"),
                ("masks", "seg", "segmentation", "seg_mask", "mask_path", "annotation_path", "target", "gt", "labels"),
                _image,
            ),
        ),
        (VISION,),
    ),
    Reading(
        "object_detection",
        (
            Role("image", PICTURES, ("path", "file", "photo", "input"), _image, _image),
            Role("objects", ("objects",), ("annotations", "boxes", "annotation", "labels"), _objects, _objects),
        ),
        (VISION,),
    ),
    Reading("audio_classification", (_SOUND, _LABEL), (AUDIO,)),
    Reading(
        "speech_recognition",
        (
            _SOUND,
            Role("text", TRANSCRIPTS, ("transcript_text", "normalized_text", "raw_text", "caption"), _any_text, _free),
        ),
        (AUDIO,),
    ),
    Reading(
        "text_to_image",
        (
            Role("image", PICTURES, ("path", "file", "filename", "image_path"), _image, _image),
            Role("text", CAPTIONS, ("captions", "description", "title", "additional_feature"), _any_text, _free),
        ),
        (DIFFUSION,),
    ),
    *_language(
        (
            Role(
                "messages",
                ("messages",),
                ("conversation", "conversations", "chat", "dialog", "dialogue", "turns"),
                _messages,
                _messages,
            ),
        ),
        "messages",
    ),
    *_language(
        (Role("conversations", ("conversations",), ("conversation", "chat", "dialog", "turns"), _sharegpt, _sharegpt),),
        "sharegpt",
    ),
    *_language(
        (
            Role("instruction", ("instruction",), ("question", "query", "task"), _any_text),
            Role("input", ("input",), ("context", "inputs"), _maybe_text, optional=True),
            _SYSTEM,
            Role("history", ("history",), (), _history, optional=True),
            Role("output", ("output",), ("response", "answer", "completion", "target"), _any_text),
        ),
        "alpaca",
    ),
    *_language(
        (_PROMPT, Role("completion", ("completion",), _COMPLETIONS, _answer, _free), _SYSTEM), "prompt_completion"
    ),
    *_language((_TEXT,), "text"),
    Reading("masked_lm", (_TEXT,), (ENCODER,), only_asked=(None,)),
)
"""Every reading that is known."""
