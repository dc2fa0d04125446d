"""Convert what no reader takes as it is into a file beside the recipe.

Archives, exports, a word a row, masks beside pictures, transcripts beside sounds.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peftcli.data.media import is_media
from peftcli.data.readers import kind_of
from peftcli.data.rows import Row, count_of
from peftcli.data.sources import open_source
from peftcli.drafting.facts import is_tag, parse_list
from peftcli.drafting.look import Look
from peftcli.errors import DataError
from peftcli.guard.files import read_small
from peftcli.schema import Source
from peftcli.system.outputs import write_output

Values = dict[str, Any]
_MAX_JSON, _MAX_UNPACKED, _MAX_FILES = 512 << 20, 20 << 30, 1_000_000
_MAX_DOCUMENT = 4 << 20
_MASKS = re.compile(r"mask|annot|label|seg|trimap|gt|ground", re.IGNORECASE)
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")


# --- files and folders ------------------------------------------------------------------------------------------------


def converted(names: Sequence[str], output: Path) -> tuple[list[str], list[str]]:
    """Return the names of the data, where some were converted those of the new files, and notes about them.

    Raises:
        DataError: an archive is damaged, or leads out of its folder.
    """
    found, notes = list[str](), list[str]()
    if len(names) == 2 and all(Path(name).is_dir() for name in names):
        parent = Path(os.path.commonpath([Path(name).absolute() for name in names]))
        media = [each for name in names for each in _files(Path(name).absolute()) if is_media(each.name)]
        if pairs := _masked(parent, sorted(media), output.parent.absolute()):
            target = _write(output, parent, pairs[0])
            return [str(target)], [f"{' and '.join(names)} were converted into {target}: {pairs[1]}"]
    for name in names:
        path = Path(name).expanduser()
        if path.is_file() and name.lower().endswith(_ARCHIVES):
            path = _unpack(path, output)
            name = str(path)
            notes.append(f"{names[len(found)]} was unpacked into {name}")
        rows = _rows_of_folder(path, output) if path.is_dir() else _rows_of_file(path)
        if rows is not None:
            values, why = rows
            target = _write(output, path, values)
            notes.append(f"{name} was converted into {target}: {why}")
            name = str(target)
        found.append(name)
    return found, notes


def _write(output: Path, source: Path, rows: Iterable[Values]) -> Path:
    """Write rows beside the recipe, in a file that is called after their source."""
    target = (
        output.parent / f"{output.stem}.{re.sub(r'[^0-9A-Za-z_-]+', '-', source.name.split('.')[0]) or 'data'}.jsonl"
    )
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    if not lines:
        raise DataError("contains no rows", file=str(source))
    write_output(target, "".join(lines).encode("utf-8", "surrogatepass"))
    return target


def _unpack(path: Path, output: Path) -> Path:
    """Unpack an archive beside the recipe: regular files below one folder."""
    folder = output.parent / f"{output.stem}.{path.name.split('.')[0]}"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_size(path, (each.file_size for each in archive.infolist()))
                archive.extractall(folder)  # removes .. and roots from names
        else:
            with tarfile.open(path) as archive:
                _check_size(path, (each.size for each in archive.getmembers()))
                archive.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"cannot be unpacked: {error}", file=str(path)) from error
    inside = [each for each in folder.iterdir() if not each.name.startswith((".", "__MACOSX"))]
    return inside[0] if len(inside) == 1 else folder


def _check_size(path: Path, sizes: Iterable[int]) -> None:
    known = list(sizes)
    if sum(known) > _MAX_UNPACKED or len(known) > _MAX_FILES:
        raise DataError(f"unpacks to {sum(known):,} bytes in {len(known):,} files; unpack it yourself", file=str(path))


def _rows_of_folder(folder: Path, output: Path) -> tuple[list[Values], str] | None:
    """The rows of a folder whose files belong together by their names."""
    files = _files(folder)
    media = sorted(each for each in files if is_media(each.name))
    others = sorted(each for each in files if not is_media(each.name))
    beside = output.parent.absolute()
    if media:
        tables = [each for each in others if kind_of(each.name) and not each.name.endswith(".txt")]
        return _masked(folder, media, beside) or (None if tables else _spoken(media, others, beside))
    documents = [each for each in others if not kind_of(each.name)]
    tops = {each.parent for each in documents}
    if (
        documents == others
        and len(tops) > 1
        and folder not in tops
        and not any(each.suffix in _NOT_TEXT for each in documents)
    ):
        return _documents(documents)
    return None


_NOT_TEXT = (".pdf", ".doc", ".docx", ".pkl", ".bin", ".pt", ".safetensors", ".exe", ".zip")


def _files(folder: Path) -> list[Path]:
    found = (Path(top) / name for top, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return list(islice(found, _MAX_FILES))


def _documents(files: Sequence[Path]) -> tuple[list[Values], str] | None:
    rows = list[Values]()
    for path in files:
        with suppress(OSError, ValueError):
            content = read_small(path, _MAX_DOCUMENT)
            if b"\0" in content:
                return None
            try:
                text = content.decode()
            except UnicodeDecodeError:
                text = content.decode("cp1252", "replace")
            rows.append({"text": text.strip(), "label": path.parent.name})
    return (
        (rows, f"{count_of(len(rows), 'text file')} in {len({row['label'] for row in rows})} folders") if rows else None
    )


def _masked(folder: Path, media: Sequence[Path], beside: Path) -> tuple[list[Values], str] | None:
    """Pictures and their masks, in two folders, with the same names but for an ending."""
    groups = defaultdict[Path, dict[str, Path]](dict)
    for path in media:
        groups[path.parent][
            re.sub(r"[_-](?:mask|seg|segmentation|gt|label|labels|annotation|trimap)$", "", path.stem)
        ] = path
    masks = [each for each in groups if _MASKS.search(str(each.relative_to(folder)))]
    pictures = [each for each in groups if each not in masks]
    rows = list[Values]()
    for place in pictures:
        pairs = max((groups[place].keys() & groups[mask].keys() for mask in masks), key=len, default=set())
        mask = next((each for each in masks if groups[each].keys() >= pairs), None)
        if mask is None or len(pairs) < 0.8 * len(groups[place]) or len(pairs) < 0.8 * len(groups[mask]):
            continue
        for stem in sorted(pairs):
            both = {"image": groups[place][stem], "annotation": groups[mask][stem]}
            rows.append({name: os.path.relpath(path, beside) for name, path in both.items()})
    return (rows, f"{count_of(len(rows), 'picture')} with a mask of the same name") if rows else None


def _spoken(media: Sequence[Path], others: Sequence[Path], beside: Path) -> tuple[list[Values], str] | None:
    """Sounds or pictures, and text files: one of each name, or lines that begin with a name."""
    stems = {path.stem: path for path in media}
    column = "audio" if media[0].suffix.lower() in (".wav", ".flac", ".ogg", ".mp3") else "image"
    rows = list[Values]()
    for path in others:
        if path.suffix.lower() not in (".txt", ".trans", ".lab", ".caption"):
            continue
        with suppress(OSError, ValueError):
            text = read_small(path, _MAX_DOCUMENT).decode("utf-8", "replace").strip()
            if path.stem in stems:
                found = [(path.stem, text)]
            else:
                found = [(name, said.strip()) for name, _, said in (line.partition(" ") for line in text.splitlines())]
            rows += [
                {column: os.path.relpath(stems[name], beside), "text": said} for name, said in found if name in stems
            ]
    whole = len(rows) >= 0.8 * len(media)
    return (rows, f"{count_of(len(rows), 'file')} with a text beside it") if whole else None


def _rows_of_file(path: Path) -> tuple[list[Values], str] | None:
    return _rows_of_table(path) if path.name.lower().endswith((".csv", ".tsv")) else _rows_of_json(path)


def _rows_of_table(path: Path) -> tuple[list[Values], str] | None:
    """The rows of a CSV file whose header has columns without a name, which spreadsheets leave at the end."""
    try:
        content = read_small(path, _MAX_JSON)
    except (OSError, ValueError):
        return None
    head = content.split(b"\n", 1)[0]
    mark = max(",;\t", key=lambda each: head.count(each.encode()))
    if not head.rstrip().endswith(mark.encode()) or b"\0" in content[:1000]:
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    table = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    names = next(table)
    rows = [{name: value for name, value in zip(names, row, strict=False) if name} for row in table if any(row)]
    return rows, f"{names.count('')} columns without a name were left out"


def _rows_of_json(path: Path) -> tuple[list[Values], str] | None:
    """The rows of a JSON document that is no list of objects."""
    if not path.name.lower().endswith(".json") or not path.is_file():
        return None
    try:
        whole = json.loads(read_small(path, _MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return None
    if isinstance(whole, list) and whole and all(isinstance(each, list) and len(each) == 2 for each in whole):
        return _of_spacy(whole)
    if not isinstance(whole, dict):
        return None
    values = list(whole.values())
    if values and all(isinstance(each, dict) for each in values) and len({frozenset(each) for each in values}) == 1:
        keys = list(values[0])
        if all(key.isdigit() for key in keys):
            return [
                {name: whole[name][key] for name in whole} for key in keys
            ], "columns of values, as pandas writes them"
        return values, "an object of rows"
    if len(values) > 1 and all(isinstance(each, list) for each in values) and len({len(each) for each in values}) == 1:
        rows = [dict(zip(whole, each, strict=True)) for each in zip(*values, strict=True)]
        return rows, "columns of values"
    lists = [each for each in values if isinstance(each, list) and each and all(isinstance(row, dict) for row in each)]
    if len(lists) == 1 and "paragraphs" not in lists[0][0]:
        return lists[0], "the rows are in a list below a key"
    return None


def _of_spacy(pairs: Sequence[Any]) -> tuple[list[Values], str] | None:
    rows = [
        {"text": text, "entities": found["entities"]}
        for text, found in pairs
        if isinstance(text, str) and isinstance(found, dict) and isinstance(found.get("entities"), list)
    ]
    return (rows, "texts and entities of spaCy") if len(rows) > 0.9 * len(pairs) else None


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """A way to make other rows of those of a file."""

    find: Callable[[Look], Mapping[str, str] | None]
    """Returns the columns that it needs, by its names for them; None: the rows are others."""
    rows: Callable[[Iterator[Row], Mapping[str, str]], Iterator[Values]]
    says: str


def converted_rows(look: Look, output: Path) -> tuple[list[str], str] | None:
    """Write rows whose form no task reads into new files; return these and a note. None: they are as a task reads them.

    Raises:
        DataError: no row can be converted.
    """
    for each in _CONVERSIONS:
        if each.find(look) is None:
            continue
        return _converted(look, output, each)
    return None


def _converted(look: Look, output: Path, conversion: Conversion) -> tuple[list[str], str]:
    made, columns = list[str](), conversion.find(look) or {}
    for name in [*look.train, *([look.eval] if look.eval else [])]:
        rows = (row for row in open_source(Source(train=name)).rows() if isinstance(row, Row))
        made.append(str(_write(output, Path(name), conversion.rows(rows, columns))))
    return made, f"{', '.join(look.train)} was converted into {', '.join(made)}: {conversion.says}"


def placed_answers(look: Look, columns: Mapping[str, Any], output: Path) -> tuple[list[str], str] | None:
    """Write rows whose answers are texts alone, each with its place in the context; None: they have places."""
    if not look.columns[columns["answers"]].is_text:
        return None

    def place(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values]:
        for row in rows:
            answer, context = (str(row.values.get(columns[name]) or "") for name in ("answers", "context"))
            at = context.find(answer.strip())
            found = (
                {"text": [answer.strip()], "answer_start": [at]} if answer.strip() else {"text": [], "answer_start": []}
            )
            if at >= 0:
                yield {"question": row.values.get(columns["question"]), "context": context, "answers": found}

    return _converted(look, output, Conversion(lambda look: columns, place, "answers were looked up in the context"))


def _find_word_rows(look: Look) -> Mapping[str, str] | None:
    """A word a row with its tag; a number or a name of the sentence beside it."""
    tags = [
        name
        for name, facts in look.columns.items()
        if facts.texts and sum(map(is_tag, facts.texts)) >= 0.95 * len(facts.given) and len(facts.counts) > 1
    ]
    words = [
        name
        for name, facts in look.columns.items()
        if name not in tags and re.search("word|token|text|form", name, re.IGNORECASE) and facts.words <= 1
    ]
    sentences = [
        name for name in look.columns if re.search("sent|doc|group|line", name, re.IGNORECASE) and name not in words
    ]
    if not (tags and words and sentences):
        return None
    return {"word": words[0], "tag": tags[-1], "sentence": sentences[0]}


def _word_rows(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values]:
    words, tags, current = list[str](), list[str](), None
    for row in rows:
        sentence = row.values.get(columns["sentence"])
        word, tag = row.values.get(columns["word"]), row.values.get(columns["tag"])
        if sentence not in (None, "", current):
            if words:
                yield {"tokens": words, "tags": tags}
            words, tags, current = [], [], sentence
        if isinstance(word, str) and word.strip() and isinstance(tag, str) and tag.strip():
            words.append(word.strip())
            tags.append(tag.strip())
    if words:
        yield {"tokens": words, "tags": tags}


def _find_segments(look: Look) -> Mapping[str, str] | None:
    facts = look.columns.get("segments")
    if facts is None or not facts.items or not all(isinstance(each, dict) and "text" in each for each in facts.items):
        return None
    return {"segments": "segments"} if all(isinstance(each.get("label"), bool) for each in facts.items) else None


def _segments(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values]:
    """A text that is trained after one that is not. Later pairs are rows with what came before as their prompt."""
    for row in rows:
        before, answer = "", ""
        for part in row.values.get(columns["segments"]) or []:
            if part.get("label"):
                answer += str(part["text"])
                continue
            if answer:
                yield {"prompt": before, "completion": answer}
            before, answer = before + answer + str(part["text"]), ""
        if answer:
            yield {"prompt": before, "completion": answer}


def _find_message_rows(look: Look) -> Mapping[str, str] | None:
    """A message a row, with its own number and that of the message that it answers."""
    names = {"id": "message_id", "parent": "parent_id", "text": "text", "role": "role"}
    return names if all(name in look.columns for name in names.values()) else None


def _message_rows(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values]:
    """Each conversation from its first message to a last answer; of several answers, the one of the best rank."""
    roles = {"prompter": "user", "user": "user", "human": "user", "assistant": "assistant", "system": "system"}
    known: dict[str, Values] = {}
    answers = defaultdict[str, list[str]](list)
    for row in rows:
        key, parent = row.values.get(columns["id"]), row.values.get(columns["parent"])
        if row.values.get("deleted"):
            continue
        known[str(key)] = row.values
        answers["" if parent in (None, "") else str(parent)].append(str(key))
    for first in answers[""]:
        turns, key = list[Values](), first
        while key:
            values = known[key]
            role = roles.get(str(values.get(columns["role"])), "user")
            turns.append({"role": role, "content": str(values.get(columns["text"]) or "")})
            key = min(answers.get(key, []), key=lambda each: float(known[each].get("rank") or 0), default="")
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if turns:
            yield {"messages": turns}


def _find_lists_in_text(look: Look) -> Mapping[str, str] | None:
    """Lists that are written as text, as pandas writes them into CSV. Lists of names are read as they are."""
    names = [name for name, facts in look.columns.items() if facts.is_list_in_text and not facts.turns]
    lists = [look.columns[name] for name in names]
    if any(facts.is_words or facts.is_tags or facts.is_spans for facts in lists) and not all(
        each.is_names for each in lists
    ):
        return {name: name for name in names}
    return None


def _lists_in_text(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values]:
    for row in rows:
        yield row.values | {name: parse_list(row.values.get(name)) or row.values.get(name) for name in columns}


def _find_tabs(look: Look) -> Mapping[str, str] | None:
    """Lines of text with the same number of tabs in each."""
    facts = look.columns.get("text")
    if facts is None or len(look.columns) > 1 or not facts.texts:
        return None
    tabs = {each.count("\t") for each in facts.texts}
    return {"text": "text"} if len(tabs) == 1 and tabs != {0} else None


def _tabs(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values]:
    for row in rows:
        parts = str(row.values[columns["text"]]).split("\t")
        yield {f"column_{at}": part.strip() for at, part in enumerate(parts, start=1)}


def _find_two_answers(look: Look) -> Mapping[str, str] | None:
    """Two answers, A and B, and which of them is better: said by its letter, or by two scores."""
    for name in look.columns:
        other = re.sub(r"(?<![a-z])([aA]|0|1)$", lambda found: {"a": "b", "A": "B", "0": "1", "1": "2"}[found[1]], name)
        if other == name or other not in look.columns:
            continue
        if not (look.columns[name].is_text and look.columns[other].is_text and look.columns[name].is_free):
            continue
        winner = next(
            (
                each
                for each in ("winner", "preferred", "preference", "choice", "labels", "label")
                if each in look.columns
            ),
            None,
        )
        scores = [each for each in look.columns if "score" in each.lower() and each[-1:] in (name[-1], other[-1])]
        prompt = next(
            (each for each in ("prompt", "history", "question", "instruction", "query") if each in look.columns), None
        )
        if len(scores) == 2:
            return {
                "one": name,
                "other": other,
                "score_one": scores[0],
                "score_other": scores[1],
                "prompt": prompt or "",
            }
        if winner and look.columns[winner].counts.keys() <= {name[-1], other[-1], name, other, "tie"} - {"0", "1", "2"}:
            return {"one": name, "other": other, "winner": winner, "prompt": prompt or ""}
    return None


def _two_answers(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values]:
    for row in rows:
        one, other = row.values.get(columns["one"]), row.values.get(columns["other"])
        if "winner" in columns:
            won = str(row.values.get(columns["winner"]))
            first, second = won in (columns["one"], columns["one"][-1]), won in (columns["other"], columns["other"][-1])
        else:
            scores = [float(row.values.get(columns[name]) or 0) for name in ("score_one", "score_other")]
            first, second = scores[0] > scores[1], scores[1] > scores[0]
        if first != second and one and other and one != other:
            prompt = {"prompt": row.values[columns["prompt"]]} if columns["prompt"] else {}
            yield {**prompt, "chosen": one if first else other, "rejected": other if first else one}


_CONVERSIONS = (
    Conversion(_find_word_rows, _word_rows, "a word a row became a sentence a row"),
    Conversion(_find_message_rows, _message_rows, "a message a row became a conversation a row"),
    Conversion(_find_segments, _segments, "segments became prompts and completions"),
    Conversion(_find_two_answers, _two_answers, "of two answers the better one is chosen"),
    Conversion(_find_lists_in_text, _lists_in_text, "lists that were written as text"),
    Conversion(_find_tabs, _tabs, "lines were split at tabs"),
)
