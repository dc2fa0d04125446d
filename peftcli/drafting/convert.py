"""Convert what no reader takes as it is into a file beside the recipe.

Archives, exports, a word a row, masks beside pictures, transcripts beside sounds.
"""

from __future__ import annotations

import csv
import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from peftcli.data.media import MASK_ENDING, MEDIA, captions_of, describe_media, is_media
from peftcli.data.readers import find_dialect, kind_of, read_file
from peftcli.data.rows import Row, count_of
from peftcli.data.sources import open_source
from peftcli.data.text_rows import first_line
from peftcli.drafting.coco import find_coco, read_coco
from peftcli.drafting.facts import is_tag, number_in, parse_list
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


@dataclass
class Converted:
    """The names of the data, where some were converted those of the new files."""

    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was converted."""
    labels: list[str] = field(default_factory=list)
    """Names of the classes of masks, by their values, or of boxes."""


def converted(names: Sequence[str], output: Path, task: str | None = None) -> Converted:
    """Convert files and folders that no reader takes as they are. ``task`` is the one that was asked for.

    Raises:
        DataError: an archive is damaged, or leads out of its folder; a COCO file cannot be used.
    """
    found = Converted()
    if rows := _paired([Path(name).expanduser() for name in names], output.parent.absolute()):
        target = _write(output, Path(names[0]), rows[0])
        return Converted([str(target)], [f"{' and '.join(names)} were converted into {target}: {rows[1]}"])
    for name in names:
        path = Path(name).expanduser()
        if path.is_file() and name.lower().endswith(_ARCHIVES):
            path = _unpack(path, output)
            found.notes.append(f"{name} was unpacked into {path}")
            name = str(path)
        coco = find_coco(path)
        masks, boxes = output.parent.absolute() / f"{output.stem}.masks", task == "object_detection"
        made = read_coco(coco, masks, boxes=boxes) if coco else None
        if made is not None:
            rows, found.labels = (made.rows, made.says), made.labels
        else:
            rows = _rows_of_folder(path, output.parent.absolute()) if path.is_dir() else _rows_of_file(path)
        if rows is not None:
            values, why = rows
            target = _write(output, path, values, found.names)
            found.notes.append(f"{name} was converted into {target}: {why}")
            name = str(target)
        found.names.append(name)
    return found


def _write(output: Path, source: Path, rows: Iterable[Values], written: Collection[str] = ()) -> Path:
    """Write rows beside the recipe, in a file that is called after their source and is none of ``written``."""
    stem = re.sub(r"[^0-9A-Za-z_-]+", "-", source.name.split(".")[0]) or "data"
    targets = (
        output.parent / f"{output.stem}.{stem}{ending}.jsonl" for ending in chain([""], map("-{}".format, count(2)))
    )
    target = next(each for each in targets if str(each) not in written)
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
                while archive.fileobj and archive.fileobj.read(
                    1 << 20
                ):  # up to gzip's checksum, which stands at the end
                    pass
    except _CANNOT_UNPACK as error:
        raise DataError(f"cannot be unpacked: {first_line(error)}", file=str(path)) from error
    inside = [each for each in folder.iterdir() if not each.name.startswith((".", "__MACOSX"))]
    return inside[0] if len(inside) == 1 else folder


_CANNOT_UNPACK = (
    *(tarfile.TarError, zipfile.BadZipFile),  # the archive is damaged, or leads out of its folder
    *(zlib.error, lzma.LZMAError, OSError, EOFError),  # its compressed data is damaged or cut off, or the disk is full
    RuntimeError,  # a zip file with a password, or of an unknown compression
)


def _check_size(path: Path, sizes: Iterable[int]) -> None:
    known = list(sizes)
    if sum(known) > _MAX_UNPACKED or len(known) > _MAX_FILES:
        raise DataError(f"unpacks to {sum(known):,} bytes in {len(known):,} files; unpack it yourself", file=str(path))


def _rows_of_folder(folder: Path, beside: Path) -> tuple[list[Values], str] | None:
    """The rows of a folder whose files belong together by their names, unless the reader of folders joins them."""
    files = _files(folder)
    media = [each for each in files if is_media(each.name)]
    others = [each for each in files if not is_media(each.name)]
    if media:
        if any(kind_of(each.name) and each.suffix != ".txt" for each in others):
            return None
        sides = [{str(each): str(each) for each in part} for part in (media, (t for t in others if t.suffix == ".txt"))]
        is_joined = describe_media(sides[0], str(folder), captions_of(*sides))
        if is_joined:
            return None
        return _paired(sorted({each.parent for each in media}), beside) or _spoken(media, others, beside)
    tops = {each.parent for each in others}
    if len(tops) < 2 or folder in tops or any(kind_of(each.name) or each.suffix in _NOT_TEXT for each in others):
        return None
    return _documents(others)


_NOT_TEXT = (".pdf", ".doc", ".docx", ".pkl", ".bin", ".pt", ".safetensors", ".exe", ".zip")


def _files(folder: Path) -> list[Path]:
    found = (Path(top) / name for top, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return sorted(islice(found, _MAX_FILES))


def _documents(files: Sequence[Path]) -> tuple[list[Values], str] | None:
    """Texts in files without an extension, in a folder for each class."""
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
    says = f"{count_of(len(rows), 'text file')} in {len({row['label'] for row in rows})} folders"
    return (rows, says + _left_out(len(files) - len(rows), "file")) if rows else None


def _left_out(count: int, noun: str) -> str:
    return f"; {count_of(count, noun)} left out" if count else ""


def _paired(folders: Sequence[Path], beside: Path) -> tuple[list[Values], str] | None:
    """Pictures and their masks: the files of two folders that have the same names but for the ending of a mask's."""
    if len(folders) != 2 or not all(folder.is_dir() for folder in folders):
        return None
    pictures, masks = sorted(folders, key=lambda folder: bool(_MASKS.search(folder.name)))
    if _MASKS.search(pictures.name) or not _MASKS.search(masks.name):
        return None
    by_name = [
        {MASK_ENDING.sub("", str(path.relative_to(folder).with_suffix(""))): path for path in media}
        for folder in (pictures, masks)
        if (media := [path for path in _files(folder) if is_media(path.name)])
    ]
    if len(by_name) < 2:
        return None
    both = sorted(by_name[0].keys() & by_name[1].keys())
    if len(both) < 0.8 * max(map(len, by_name)):
        return None
    rows = [
        {
            role: os.path.relpath(found[name], beside)
            for role, found in zip(("image", "annotation"), by_name, strict=True)
        }
        for name in both
    ]
    alone = len(by_name[0]) + len(by_name[1]) - 2 * len(rows)
    return rows, f"{count_of(len(rows), 'picture')} with a mask of the same name" + _left_out(
        alone, "file without its other"
    )


def _spoken(media: Sequence[Path], others: Sequence[Path], beside: Path) -> tuple[list[Values], str] | None:
    """Sounds or pictures, and text files: one of each name, or lines that begin with a name."""
    files = {path.stem: path for path in media}
    texts = dict[str, str]()
    for path in others:
        if path.suffix.lower() not in (".txt", ".trans", ".lab", ".caption"):
            continue
        with suppress(OSError, ValueError):
            text = read_small(path, _MAX_DOCUMENT).decode("utf-8", "replace").strip()
            lines = (
                [(path.stem, "", text)] if path.stem in files else [line.partition(" ") for line in text.splitlines()]
            )
            texts |= {name: said.strip() for name, _, said in lines if name in files}
    if len(texts) < 0.8 * len(media):
        return None
    column = MEDIA[media[0].suffix.lower()]
    rows = [{column: os.path.relpath(files[name], beside), "text": text} for name, text in texts.items()]
    return rows, f"{count_of(len(rows), 'file')} with a text beside it" + _left_out(len(media) - len(rows), "file")


def _rows_of_file(path: Path) -> tuple[list[Values], str] | None:
    read = _ROWS_OF.get(path.suffix.lower())
    return read(path) if read and path.is_file() else None


def _rows_of_table(path: Path) -> tuple[list[Values], str] | None:
    """The rows of a CSV file whose header ends with columns without a name, as spreadsheets leave them."""
    dialect = find_dialect(path, str(path))
    with path.open(encoding=dialect.encoding, errors="replace", newline="") as file:
        names = [name.strip() for name in next(csv.reader(file, delimiter=dialect.delimiter), [""])]
    if names[-1] or not any(names):
        return None
    called = tuple(name or f"\0{at}" for at, name in enumerate(names))
    rows, cut, bad = list[Values](), 0, 0
    for row in islice(read_file(path, str(path), replace(dialect, columns=called)), 1, None):
        if isinstance(row, DataError):
            bad += 1
            continue
        rows.append({name: value for name, value in row.values.items() if name in names})
        cut += any(value.strip() for name, value in row.values.items() if name not in names)
    says = f"{names.count('')} columns without a name were left out"
    return rows, says + (f", in which {count_of(cut, 'row')} had a value" if cut else "") + _left_out(bad, "bad row")


def _rows_of_json(path: Path) -> tuple[list[Values], str] | None:
    """The rows of a JSON document that is no list of objects."""
    try:
        content = read_small(path, _MAX_JSON)
        whole = json.loads(content) if content.lstrip().startswith(b"{") else None
    except (OSError, ValueError, RecursionError):
        return None
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


_ROWS_OF = {".csv": _rows_of_table, ".tsv": _rows_of_table, ".json": _rows_of_json}


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """A way to make other rows of those of a file."""

    find: Callable[[Look], Mapping[str, str] | None]
    """Returns the columns that it needs, by its names for them; None: the rows are others."""
    rows: Callable[[Iterator[Row], Mapping[str, str]], Iterator[Values | None]]
    """Yields the new rows; None for a row that is left out."""
    says: str


def converted_rows(look: Look, output: Path) -> tuple[list[str], str] | None:
    """Write rows whose form no task reads into new files; return these and a note. None: they are as a task reads them.

    Raises:
        DataError: no row can be converted.
    """
    for each in _CONVERSIONS:
        if (columns := each.find(look)) is not None:
            return _converted(look, output, each, columns)
    return None


def _converted(look: Look, output: Path, conversion: Conversion, columns: Mapping[str, str]) -> tuple[list[str], str]:
    made, lost = list[str](), 0

    def good_rows(name: str) -> Iterator[Row]:
        nonlocal lost
        for row in open_source(Source(train=name)).rows():
            if isinstance(row, Row):
                yield row
            else:
                lost += 1

    for name in [*look.train, *([look.eval] if look.eval else [])]:
        rows = list(conversion.rows(good_rows(name), columns))
        lost += rows.count(None)
        made.append(str(_write(output, Path(name), filter(None, rows), made)))
    note = f"{', '.join(look.train)} was converted into {', '.join(made)}: {conversion.says}"
    return made, note + _left_out(lost, "row")


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


def _word_rows(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values | None]:
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
        else:
            yield None
    if words:
        yield {"tokens": words, "tags": tags}


def _find_segments(look: Look) -> Mapping[str, str] | None:
    facts = look.columns.get("segments")
    if facts is None or not facts.items or not all(isinstance(each, dict) and "text" in each for each in facts.items):
        return None
    return {"segments": "segments"} if all(isinstance(each.get("label"), bool) for each in facts.items) else None


def _segments(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values | None]:
    """A text that is trained after one that is not. Later pairs are rows with what came before as their prompt."""
    for row in rows:
        before, answer, pairs = "", "", list[Values | None]()
        for part in [*(row.values.get(columns["segments"]) or []), {}]:
            text = str(part.get("text") or "")
            if part.get("label"):
                answer += text
                continue
            if answer:
                pairs.append({"prompt": before, "completion": answer})
            before, answer = before + answer + text, ""
        yield from pairs or [None]


def _find_message_rows(look: Look) -> Mapping[str, str] | None:
    """A message a row, with its own number and that of the message that it answers."""
    names = {"id": "message_id", "parent": "parent_id", "text": "text", "role": "role"}
    return names if all(name in look.columns for name in names.values()) else None


def _message_rows(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values | None]:
    """Each conversation from its first message to a last answer; of several answers, the one of the best rank."""
    roles = {"prompter": "user", "user": "user", "human": "user", "assistant": "assistant", "system": "system"}
    known: dict[str, Values] = {}
    answers, unused = defaultdict[str, list[str]](list), 0
    for row in rows:
        unused += 1
        key, parent = row.values.get(columns["id"]), row.values.get(columns["parent"])
        if row.values.get("deleted"):
            continue
        known[str(key)] = row.values
        answers["" if parent in (None, "") else str(parent)].append(str(key))
    for first in answers.pop("", []):
        turns, key = list[Values](), first
        while key:
            values = known[key]
            role = roles.get(str(values.get(columns["role"])), "user")
            turns.append({"role": role, "content": str(values.get(columns["text"]) or "")})
            key = min(answers.pop(key, []), key=lambda each: number_in(known[each].get("rank")) or 0, default="")
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        if turns:
            unused -= len(turns)
            yield {"messages": turns}
    yield from [None] * unused


def _find_lists_in_text(look: Look) -> Mapping[str, str] | None:
    """Lists that are written as text, as pandas writes them into CSV. Lists of names are read as they are."""
    names = [name for name, facts in look.columns.items() if facts.is_list_in_text and not facts.turns]
    lists = [look.columns[name] for name in names]
    if any(facts.is_words or facts.is_tags or facts.is_spans for facts in lists) and not all(
        each.is_names for each in lists
    ):
        return {name: name for name in names}
    return None


def _lists_in_text(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values | None]:
    for row in rows:
        yield row.values | {name: parse_list(row.values.get(name)) or row.values.get(name) for name in columns}


def _find_tabs(look: Look) -> Mapping[str, str] | None:
    """Lines of text with the same number of tabs in each."""
    facts = look.columns.get("text")
    if facts is None or len(look.columns) > 1 or not facts.texts:
        return None
    tabs = {each.count("\t") for each in facts.texts}
    return {"text": "text"} if len(tabs) == 1 and tabs != {0} else None


def _tabs(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values | None]:
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


def _two_answers(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Values | None]:
    for row in rows:
        one, other = row.values.get(columns["one"]), row.values.get(columns["other"])
        if "winner" in columns:
            won = str(row.values.get(columns["winner"]))
            first, second = won in (columns["one"], columns["one"][-1]), won in (columns["other"], columns["other"][-1])
        else:
            scores = [number_in(row.values.get(columns[name])) or 0 for name in ("score_one", "score_other")]
            first, second = scores[0] > scores[1], scores[1] > scores[0]
        if first != second and one and other and one != other:
            prompt = {"prompt": row.values[columns["prompt"]]} if columns["prompt"] else {}
            yield {**prompt, "chosen": one if first else other, "rejected": other if first else one}
        else:
            yield None


_CONVERSIONS = (
    Conversion(_find_word_rows, _word_rows, "a word a row became a sentence a row"),
    Conversion(_find_message_rows, _message_rows, "a message a row became a conversation a row"),
    Conversion(_find_segments, _segments, "segments became prompts and completions"),
    Conversion(_find_two_answers, _two_answers, "of two answers the better one is chosen"),
    Conversion(_find_lists_in_text, _lists_in_text, "lists that were written as text"),
    Conversion(_find_tabs, _tabs, "lines were split at tabs"),
)
