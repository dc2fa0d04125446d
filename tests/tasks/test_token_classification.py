"""Token classification: words, pieces and tags; files of three kinds; entities in metrics and answers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from classifierkit import base_of, encoded, head_model, open_task, scanned, table_of

from peftcli.errors import DataError
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions
from peftcli.tasks.text.chat import IGNORED

NAME = "token_classification"
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
IOB: dict[str, Any] = {"labels": LABELS, "scheme": "iob2"}
ROWS = [
    {"tokens": ["Ada", "Lovelace", "lives", "in", "Turin"], "ner_tags": ["B-PER", "I-PER", "O", "O", "B-LOC"]},
    {"tokens": ["stone", "mill"], "ner_tags": ["O", "O"]},
]
TEXT = {
    "text": "Ada Lovelace lives in Turin.",
    "entities": [{"start": 0, "end": 12, "label": "PER"}, {"start": 22, "end": 27, "label": "LOC"}],
}


def words_of(task: Any, example: Any) -> list[str]:
    """The pieces of each word, joined."""
    pieces = task.processor.convert_ids_to_tokens(list(example.arrays["input_ids"]))
    words = dict[int, str]()
    for piece, word in zip(pieces, example.arrays["word_of"], strict=True):
        if word >= 0:
            words[word] = words.get(word, "") + piece.replace("\u0120", "").removeprefix("##")
    return list(words.values())


def names(task: Any, tags: Any) -> list[str]:
    return [task.labels[tag] for tag in tags]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_each_word_has_its_tag_whatever_its_pieces(kind: str) -> None:
    task = open_task(NAME, kind, **IOB)
    example, _ = encoded(task, ROWS)
    assert words_of(task, example) == ROWS[0]["tokens"]
    assert len(example.arrays["input_ids"]) > 5  # words of several pieces
    assert names(task, example.arrays["tags"]) == ROWS[0]["ner_tags"]
    batch = task.collate([example], training=True)
    counted = [label for label in batch["labels"][0].tolist() if label != IGNORED]
    assert names(task, counted) == ROWS[0]["ner_tags"]
    assert example.num_targets == 5


def test_all_pieces_of_a_word_may_count() -> None:
    first, both = open_task(NAME, **IOB), open_task(NAME, **IOB, label_all_pieces=True)
    [one], [other] = encoded(first, ROWS[:1]), encoded(both, ROWS[:1])
    labels = both.collate([other], training=True)["labels"][0].tolist()
    word_of = list(other.arrays["word_of"])
    for word, pieces in itertools.groupby(range(len(labels)), key=lambda at: word_of[at]):
        found = [labels[at] for at in pieces]
        tag = "" if word < 0 else ROWS[0]["ner_tags"][word]
        inside = [tag.replace("B-", "I-")] * (len(found) - 1)
        assert found == ([IGNORED] * len(found) if word < 0 else [LABELS.index(each) for each in [tag, *inside]])
    assert other.num_targets == sum(word >= 0 for word in word_of) > one.num_targets


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_places_of_entities_become_tags(kind: str) -> None:
    task = open_task(NAME, kind, **IOB)
    [example] = encoded(task, [TEXT])
    assert words_of(task, example) == ["Ada", "Lovelace", "lives", "in", "Turin", "."]
    assert names(task, example.arrays["tags"]) == ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]
    assert list(example.arrays["input_ids"]) == task.processor(TEXT["text"])["input_ids"]


@pytest.mark.parametrize(
    ("entity", "has", "hint"),
    [
        ({"label": "PER", "start_offset": 0, "end_offset": 12}, "label, start_offset, end_offset",
         "Rename these keys in the file: start_offset to start, end_offset to end."),
        ({"type": "labels", "value": {"start": 0, "end": 12, "labels": ["PER"]}},
         "type, value, value.start, value.end, value.labels",
         "Rename these keys in the file: value.start to start, value.end to end, value.labels to label. "
         "A label is one name, not a list."),
    ],
)  # fmt: skip
def test_entities_with_other_keys_are_an_error_about_these(entity: dict[str, Any], has: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        scanned([{"text": TEXT["text"], "entities": [entity]}] * 3, NAME)
    found = caught.value
    assert found.message == f"an entity needs start, end, label; this one has {has}; all rows have errors"
    assert (found.line, found.key, found.hint) == (1, "entities", hint)


def test_lists_and_types_name_entities_too() -> None:
    task = open_task(NAME, **IOB)
    spelled = [{"start": 22, "end": 27, "type": "LOC"}, {"start": 0, "end": 12, "type": "PER"}]
    lists = [[0, 12, "PER"], [22, 27, "LOC"]]
    examples = [encoded(task, [{"text": TEXT["text"], "spans": each}])[0] for each in (spelled, lists)]
    assert [list(each.arrays["tags"]) for each in examples] == [list(encoded(task, [TEXT])[0].arrays["tags"])] * 2


@pytest.mark.parametrize(
    ("entities", "message"),
    [
        ([{"start": 22, "end": 99, "label": "LOC"}], "22 to 99 lies outside of the text, which has 28 characters"),
        ([{"start": 3, "end": 4, "label": "LOC"}], "3 to 4 holds no word"),
        ([[0, 12, "PER"], [4, 12, "PER"]], "two entities share the character 4"),
        ([{"start": 0, "label": "LOC"}], "an entity needs start, end, label; this one has start, label"),
        (["LOC"], "expected {start, end, label}"),
        ([[0, 3, "ORG"]], "the tag 'B-ORG' is not one of O, B-PER"),
    ],
)
def test_entities_that_are_not_where_they_are_said_to_be(entities: Any, message: str) -> None:
    [bad] = encoded(open_task(NAME, **IOB), [{"text": TEXT["text"], "entities": entities}])
    assert isinstance(bad, DataError)
    assert message in bad.message
    assert bad.line == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "expected a tag for each of the 2 tokens, found 1"),
        ({"tokens": "a b", "ner_tags": ["O"]}, "expected a list of words"),
        ({"tokens": [], "ner_tags": []}, "holds no words"),
        ({"tokens": ["a"], "ner_tags": ["B-ORG"]}, "the tag 'B-ORG' is not one of"),
        ({"tokens": ["a"], "ner_tags": ["S-ORG"]}, "the tag 'S-ORG' ('B-ORG' in IOB2) is not one of"),
        ({"tokens": ["a"], "ner_tags": [7]}, "the tag '7' is not one of"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    [bad] = encoded(open_task(NAME, **IOB), [row])
    assert isinstance(bad, DataError)
    assert message in bad.message


def test_rows_of_tags_have_words() -> None:
    task = open_task(NAME, **IOB)
    [example] = encoded(task, [{"words": ROWS[0]["tokens"], "tags": ROWS[0]["ner_tags"]}])
    assert words_of(task, example) == ROWS[0]["tokens"]
    with pytest.raises(DataError, match="no column 'tokens' or 'words'; the rows have: forms, tags") as caught:
        encoded(task, [{"forms": ["a"], "tags": ["O"]}])
    assert "columns: {tokens: ...}" in (caught.value.hint or "")


def test_words_without_a_tag_do_not_count() -> None:
    task = open_task(NAME, **IOB)
    [example] = encoded(task, [{"tokens": ["Ada", "sun"], "ner_tags": ["B-PER", -100]}])
    assert list(example.arrays["tags"]) == [1, IGNORED]
    assert example.num_targets == 1


def test_words_that_the_tokenizer_drops_are_no_end_of_an_entity() -> None:
    task = open_task(NAME, **IOB)
    task.processor.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    row = {"tokens": ["Ada", "\u200b", "Lovelace"], "ner_tags": ["B-PER", "I-PER", "I-PER"]}
    [example] = encoded(task, [row])
    assert list(example.arrays["tags"]) == [1, IGNORED, 2]
    model = head_model(task)
    batch = task.collate([example], training=False)
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), len(LABELS)).float()
    model.forward = lambda **_: transformers.modeling_outputs.TokenClassifierOutput(logits=logits)
    [answer] = task.predict(model, table_of([{"tokens": row["tokens"]}])[1], PredictOptions())
    assert [each["text"] for each in answer["entities"]] == ["Ada \u200b Lovelace"]
    task.settings = replace(task.settings, max_length=example.size - 1)  # a piece of the last word is cut
    assert list(encoded(task, [row])[0].arrays["tags"]) == [1, IGNORED, 2]


def test_tags_are_found_in_the_rows() -> None:
    task = scanned(ROWS, NAME)
    assert task.labels == ("B-PER", "I-PER", "O", "B-LOC")  # of first sight
    assert task.settings.scheme == "iob2"
    assert scanned([TEXT], NAME).labels == tuple(LABELS)
    numbers = [{"tokens": ["a", "b"], "ner_tags": [0, 1]}]
    assert scanned(numbers, NAME, classes={"ner_tags": tuple(LABELS)}).labels == tuple(LABELS)
    given = scanned(numbers, NAME, labels=LABELS)
    assert (given.labels, given.settings.scheme) == (tuple(LABELS), "iob2")
    [example] = encoded(given, numbers)
    assert names(given, example.arrays["tags"]) == LABELS[:2]
    [bad] = encoded(task, numbers)
    assert "the tag '0' is not one of B-PER" in bad.message
    with pytest.raises(DataError, match="types of entities have none") as caught:
        scanned(numbers, NAME, labels=["PER", "LOC"])
    assert caught.value.key == "task.labels"
    [example] = encoded(open_task(NAME, labels=["NOUN", "VERB"], scheme="none"), numbers)
    assert list(example.arrays["tags"]) == [0, 1]
    tables = [table_of(numbers, classes={"ner_tags": tuple(LABELS)}), table_of(ROWS)]
    for several in (False, True):
        found = open_task(NAME).scan((table, iter(rows)) for table, rows in tables[: 1 + several])
        assert found.labels_by_number is not several
    assert "2 tags: 0, 1; if they mark entities, name them in task.labels" in scanned(numbers, NAME).found
    parts = [{"tokens": ["sun", "shines"], "pos_tags": ["NOUN", "VERB"]}]
    assert scanned(parts, NAME).settings.scheme == "none"


@pytest.mark.parametrize("tags", ["B I L U O U", "B I E S O S", "B M E S O S"])
def test_tags_of_other_schemes_are_turned_into_iob2(tags: str) -> None:
    words = [tag if tag == "O" else f"{tag}-{'LOC' if tag in 'US' else 'PER'}" for tag in tags.split()]
    rows = [{"tokens": list("abcdef"), "ner_tags": words}]
    task = scanned(rows, NAME)
    assert (task.labels, task.settings.scheme) == (("B-PER", "I-PER", "B-LOC", "O"), "iob2")
    [example] = encoded(task, rows)
    assert names(task, example.arrays["tags"]) == ["B-PER", "I-PER", "I-PER", "B-LOC", "O", "B-LOC"]
    assert scanned(rows, NAME, scheme="none").labels == tuple(dict.fromkeys(words))
    for settings in ({"labels": ["PER", "LOC"]}, {"scheme": "iob2"}):
        assert set(scanned(rows, NAME, **settings).labels) <= set(LABELS)
    with pytest.raises(DataError, match="is not a tag of the scheme iob2") as caught:
        scanned(rows, NAME, labels=words[:4])
    assert "[PER, ORG]" in (caught.value.hint or "")
    for wrong in ("NOUN", "S-"):
        with pytest.raises(DataError, match=f"have the tag '{wrong}', which is not O, B-TYPE or I-TYPE"):
            scanned([*rows, {"tokens": ["a"], "ner_tags": [wrong]}], NAME, scheme="iob2")


def test_types_of_entities_stand_for_their_tags() -> None:
    assert scanned(ROWS, NAME, labels=["PER", "LOC"]).labels == tuple(LABELS)
    assert scanned([TEXT], NAME, labels=["PER", "LOC"], scheme="iob2").labels == tuple(LABELS)


def test_a_slow_tokenizer_gives_the_same_example() -> None:
    fast = open_task(NAME, **IOB)
    base = base_of("bert")
    base.processor = lambda _: transformers.PerceiverTokenizer()
    slow = TASKS[NAME].open(TASKS[NAME].settings(**IOB), base)
    assert not slow.processor.is_fast
    [example] = encoded(slow, ROWS[:1])
    assert [chr(number - 6) for number in list(example.arrays["input_ids"])[1:4]] == ["A", "d", "a"]
    assert list(example.arrays["word_of"]) == [-1, 0, 0, 0, *[1] * 8, *[2] * 5, 3, 3, *[4] * 5, -1]
    assert names(slow, example.arrays["tags"]) == names(fast, encoded(fast, ROWS[:1])[0].arrays["tags"])
    short = TASKS[NAME].open(TASKS[NAME].settings(**IOB, max_length=8), base)
    [cut] = encoded(short, ROWS[:1])
    assert list(cut.arrays["word_of"]) == [-1, 0, 0, 0, 1, 1, 1, -1]


def test_the_metrics_are_those_of_the_answers() -> None:
    from seqeval.metrics import accuracy_score, f1_score

    task = open_task(NAME, **IOB, max_length=12)
    model = head_model(task)
    choose = random.Random(0)
    values = [
        {
            "tokens": [choose.choice(["Ada", "sun", "Turin"]) for _ in range(count)],
            "ner_tags": choose.choices(LABELS, k=count),
        }
        for count in (3, 9, 1, 6)
    ]
    examples = encoded(task, values)
    loss = task.loss(model, task.collate(examples, training=False))
    found = task.metrics(
        {"loss": loss.total.detach().numpy()}, loss.outputs, sum(each.num_targets for each in examples)
    )
    _, rows = table_of(values)
    answers = [each["tags"] for each in task.predict(model, rows, PredictOptions())]
    wanted = [each["ner_tags"] for each in values]
    assert found["f1"] == pytest.approx(f1_score(wanted, answers))
    assert found["accuracy"] == pytest.approx(accuracy_score(wanted, answers))


def test_words_that_were_cut_are_not_found() -> None:
    values = [{"tokens": ["Ada"] * 30, "ner_tags": ["B-PER"] * 30}]
    task = open_task(NAME, **IOB, max_length=10)
    table, rows = table_of(values)
    [outcome] = task.encode(rows, task.read(table))
    [example] = outcome.examples
    assert (outcome.flags, outcome.lost) == (task.flags["truncated"], 30 - example.num_targets)
    logits = torch.zeros(1, 10, len(LABELS))
    logits[..., 1] = 1  # whatever is read is right
    batch = task.collate([example], training=False)
    outputs = task._outputs(logits, batch["_first"], batch["_tags"])
    found = task.metrics({"loss": torch.tensor(1.0).numpy()}, outputs, example.num_targets)
    assert found["precision"] == 1
    assert found["recall"] == pytest.approx(example.num_targets / 30)


@pytest.mark.parametrize(("perfect", "f1"), [(True, 1.0), (False, 0.0)])
def test_a_perfect_and_a_wrong_predictor(perfect: bool, f1: float) -> None:
    task = open_task(NAME, **IOB)
    wanted = [[1, 2, 0, 0, 3], [0, 3, 4]]
    found = wanted if perfect else [[0, 1, 1, 1, 1], [1, 1, 1]]
    metrics = task.metrics({"loss": torch.tensor(0.0).numpy()}, list(zip(wanted, found, strict=True)), 8)
    assert {name: metrics[name] for name in ("f1", "f1_PER", "f1_LOC")} == {"f1": f1, "f1_PER": f1, "f1_LOC": f1}
    assert metrics["accuracy"] == f1


@pytest.mark.parametrize("found", [[0, 0], [0, 1]])
def test_where_rows_have_no_entities_it_is_right_to_find_none(found: list[int]) -> None:
    metrics = open_task(NAME, **IOB).metrics({"loss": torch.tensor(0.0).numpy()}, [([0, 0], found)], 2)
    right = float(found == [0, 0])
    assert metrics == {"loss": 0, "accuracy": found.count(0) / 2, "precision": right, "recall": right, "f1": right}


@pytest.mark.parametrize("scheme", ["iob2", "none"])
def test_a_random_predictor(scheme: str) -> None:
    """Of three tags, each of which a word has as often as the others. Every name is a word long."""
    labels, choose = ["O", "B-PER", "B-LOC"], random.Random(0)
    task = open_task(NAME, labels=labels, scheme=scheme)
    rows = [tuple([choose.randrange(3) for _ in range(10)] for _ in range(2)) for _ in range(500)]
    metrics = task.metrics({"loss": torch.tensor(0.0).numpy()}, rows, 5000)
    assert len(metrics) == (7 if scheme == "iob2" else 3)
    assert metrics | {"loss": 1 / 3} == pytest.approx(dict.fromkeys(metrics, 1 / 3), abs=0.03)
    perfect = task.metrics({"loss": torch.tensor(0.0).numpy()}, [(one, one) for one, _ in rows], 5000)
    assert perfect == {**dict.fromkeys(metrics, 1), "loss": 0}


def test_parts_of_speech_have_an_f1_of_their_own() -> None:
    task = open_task(NAME, labels=["NOUN", "VERB"], scheme="none")
    metrics = task.metrics({"loss": torch.tensor(0.0).numpy()}, [([0, 1, 1], [0, 1, 0])], 3)
    assert set(metrics) == {"loss", "accuracy", "macro_f1"}
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    cut = task.metrics({"loss": torch.tensor(0.0).numpy()}, [([0, 1, 1, 0], [0, 1, -1, -1])], 4)
    assert cut["macro_f1"] == pytest.approx(2 / 3)  # of two classes: words that were cut are not found


def test_answers_name_entities_by_their_characters() -> None:
    task = open_task(NAME, **IOB)
    model = head_model(task)
    forced = {"Ada": "B-PER", "Lovelace": "I-PER", "Turin": "B-LOC"}

    def forward(input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, len(LABELS))
        [example] = encoded(task, [TEXT])
        for at, word in enumerate(example.arrays["word_of"]):
            name = words_of(task, example)[word] if word >= 0 else ""
            logits[:, at, LABELS.index(forced.get(name, "O"))] = 50
        return transformers.modeling_outputs.TokenClassifierOutput(logits=logits)

    model.forward = forward
    _, rows = table_of([{"text": TEXT["text"]}])
    [answer] = task.predict(model, rows, PredictOptions())
    assert answer["tags"] == ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]
    assert answer["entities"] == [
        {"type": "PER", "start": 0, "end": 12, "text": "Ada Lovelace", "score": 1.0},
        {"type": "LOC", "start": 22, "end": 27, "text": "Turin", "score": 1.0},
    ]


@pytest.mark.parametrize(
    ("pieces", "text", "entities"),
    [
        (r"\W?\w+|\W", "Jean-Pierre (Paris) left the U.S. now", ["Jean-Pierre", "Paris", "U.S."]),
        (r"\S+", "the U.S. now", ["U.S."]),
        (r"\S+", "अमित दिल्ली में रहता है", ["अमित", "दिल्ली"]),
        (r"\w", "Ada住在北京市。", ["Ada", "北京市"]),
    ],
    ids=["marks", "one piece", "Hindi", "Chinese"],
)
def test_what_is_right_in_each_piece_is_right_in_metrics_and_answers(
    pieces: str, text: str, entities: list[str]
) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, "?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pieces), "isolated")
    base = base_of("bert")
    base.processor = lambda _: transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="?")
    task = TASKS[NAME].open(TASKS[NAME].settings(**IOB), base)
    places = [[text.index(each), text.index(each) + len(each), "LOC"] for each in entities]
    table, rows = table_of([{"text": text, "entities": places}])
    [outcome] = task.encode(rows, task.read(table))
    assert not outcome.flags
    batch = task.collate(outcome.examples, training=False)
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), len(LABELS)).float()
    outputs = task._outputs(logits, batch["_first"], batch["_tags"])
    assert task.metrics({"loss": torch.tensor(0.0).numpy()}, outputs, outcome.examples[0].num_targets)["f1"] == 1
    model = head_model(open_task(NAME, **IOB))
    model.forward = lambda **_: transformers.modeling_outputs.TokenClassifierOutput(logits=logits)
    [answer] = task.predict(model, table_of([{"text": text}])[1], PredictOptions())
    assert [each["text"] for each in answer["entities"]] == entities


def test_an_entity_that_is_part_of_a_word_is_counted() -> None:
    task = open_task(NAME, **IOB)
    table, rows = table_of([{"text": "Turinese sun", "entities": [[0, 5, "LOC"]]}])
    [outcome] = task.encode(rows, task.read(table))
    assert names(task, outcome.examples[0].arrays["tags"]) == ["B-LOC", "O"]
    assert outcome.flags == 4


def test_inspect_marks_the_entities() -> None:
    task = open_task(NAME, **IOB)
    [example] = encoded(task, [TEXT])
    shown = task.show(example)
    [text] = shown.parts
    by_label = {
        label: "".join(token.text for token in run).replace("##", "").replace(" ", "")
        for label, run in itertools.groupby(text.tokens, key=lambda token: token.label)
        if label
    }
    assert by_label == {"PER": "AdaLovelace", "LOC": "Turin"}
    assert shown.as_dict()["tags"] == ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]
