"""Data that are wrong, through ``inspect`` and ``train``; odd data that are in order; and mutations of good files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import bad_data_cases
import trainkit
from bad_data_cases import Case, bad_data
from bad_recipes import harmless, listing
from campaigns import Campaign, Trial
from good_data_cases import Valid, valid_data
from hostile_data import PACKERS, mutated, parquet
from in_process import Ran, peftcli

from peftcli.data.prepare import prepare
from peftcli.errors import DataError
from peftcli.schema import Source
from peftcli.tasks import settings
from peftcli.tasks.base import encoding
from peftcli.tasks.causal_lm import CausalLM

LONGEST_MESSAGE = 1000
SECONDS = 10.0
SLOWEST_MUTATION = 5.0
GROUP = 20
MUTATIONS = 2000


def bad_files() -> list[Trial]:
    return [Trial(name, partial(refused, case)) for name, case in bad_data().items()]


def recipe(folder: Path, dataset: str, task: str = "causal_lm", more: dict[str, str] | None = None) -> Path:
    base = {"name": str(trainkit.base_folder("t5" if task == "seq2seq_lm" else "llama"))} | (more or {})
    path = folder / "recipe.yaml"
    path.write_text(
        f"base_model: {{{', '.join(f'{name}: {value}' for name, value in base.items())}}}\n"
        f"task: {task}\nmethod: {{type: lora, r: 2}}\ndataset: {{{dataset}}}\n"
        "training: {output_dir: out, max_steps: 1, bf16: false, save_strategy: 'no', verify: false}\n"
    )
    return path


def refused(case: Case, folder: Path) -> None:
    """``inspect`` and ``train`` end with exit code 3, and say what is wrong with the data and where."""
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    case.setup(folder)
    recipe(folder, case.dataset, case.task, case.more)
    env = {"PEFTCLI_CACHE": str(folder / "cache")}
    inspected = timed("inspect", "recipe.yaml", "--json", "--quiet", cwd=folder, env=env)
    harmless(inspected)
    assert inspected.code == case.code, f"inspect ended with {inspected.code}: {inspected.err[-500:]!r}"
    assert len(inspected.messages) == 1, inspected.err[:1000]
    assert len(inspected.messages[0]) <= LONGEST_MESSAGE
    answer = json.loads(inspected.out)
    _judge(case, [answer["error"]] if "error" in answer else list(_bad_rows(answer)))
    trained = timed("train", "recipe.yaml", "--json", "--quiet", cwd=folder, env=env)
    harmless(trained)
    assert trained.code == case.code, f"train ended with {trained.code}: {trained.err[-500:]!r}"
    assert len(trained.messages) == 1, trained.err[:1000]
    error = json.loads(trained.out)["error"]
    _judge(case, [error])
    made = set(listing(folder / "out"))
    assert made <= {".lock", "run.json"}, made
    if "run.json" not in made:
        return
    run = trainkit.read_run(folder / "out")
    assert (run["status"], run["exit_code"], run["resumable"]) == ("failed", case.code, False)
    assert run["error"]["message"] == error["message"]


def _bad_rows(answer: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """The bad rows of an audit, as errors."""
    found = []
    for split in ("train", "eval"):
        for bad in (answer["audit"][split] or {}).get("bad_rows", ()):
            file, _, place = bad["row"].replace(" row ", ":").rpartition(":")
            found.append({"file": file, "line": int(place), "key": bad["key"], "message": bad["message"], "hint": None})
    return found


def _judge(case: Case, errors: Sequence[dict[str, Any]]) -> None:
    for error in errors:
        text = " ".join(str(error[part] or "") for part in ("message", "hint", "key"))
        assert len(text) <= LONGEST_MESSAGE, text[:300]
    told = "\n".join(f"{each['file']}:{each['line']}: {each['key']}: {each['message']}" for each in errors)
    assert any(_is_meant(case, error) for error in errors), (
        f"none of these is about {case.file}, line {case.line}, key {case.key}, and says {case.says!r}:\n{told[:2000]}"
    )


def _is_meant(case: Case, error: dict[str, Any]) -> bool:
    row = case.line is None or error["line"] == case.line
    file = case.file is None or error["file"] == case.file
    key = case.key is None or (error["key"] or "").startswith(case.key)
    return case.says in error["message"] and file and row and key and bool(error["file"] or error["key"])


def timed(*args: object, **options: Any) -> Ran:
    wall, cpu = time.monotonic(), time.process_time()
    ran = peftcli(*args, **options)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    assert min(wall, cpu) < SECONDS, f"{args[0]} took {wall:.1f} s, {cpu:.1f} s of computing"
    return ran


# --- data beyond all memory

ALLOWANCE = 1 << 30
"""Bytes of address space that ``inspect`` may take in addition to what it has when it starts."""
HUGE = 100_000_000


def beyond_memory() -> list[Trial]:
    return [Trial(name, partial(read_in_little_memory, *case)) for name, case in HUGE_FILES.items()]


def read_in_little_memory(name: str, make: Callable[[Path], object], code: int, says: str, folder: Path) -> None:
    """``inspect`` ends as it must where it cannot get more memory."""
    make(folder / name)
    path = recipe(folder, f"train: '{folder / name}', on_bad_row: skip")
    env = {"PEFTCLI_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    child = trainkit.Child(folder, "inspect", path, "--json", "--quiet", env=env, before=_little_memory)
    found = child.wait(300)
    assert found == code, f"ended with {found}: {child.err[-500:]}"
    assert says in child.err + child.out, child.err[-500:]
    assert len(child.err) < 5000
    assert "Traceback" not in child.err


def _little_memory() -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ALLOWANCE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _repeated(*parts: tuple[bytes, int]) -> Callable[[Path], None]:
    """Writes each part that many times, packed as the name says."""

    def make(path: Path) -> None:
        with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
            for part, times in parts:
                block = part * max(1, (1 << 20) // len(part))
                for _ in range(times * len(part) // len(block)):
                    file.write(block)
                file.write(part * (times % (len(block) // len(part))))

    return make


def _shared_text(path: Path) -> None:
    """A table of some kilobytes, in which 40 rows have one text of 30 megabytes."""
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 40, pyarrow.int32()), ["x" * 30_000_000])
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), path, compression="zstd", dictionary_pagesize_limit=1 << 30
    )


def _one_text(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 3 * HUGE]}), path, compression="zstd")


ROW = b'{"text": "one"}\n'
HUGE_FILES: dict[str, tuple[str, Callable[[Path], object], int, str]] = {
    "a good file": ("a.jsonl", _repeated((ROW, 3)), 0, '"used": 3'),
    "a row of 10^8 characters": (
        "a.jsonl",
        _repeated((ROW, 1), (b'{"text": "', 1), (b"x", HUGE), (b'"}\n', 1), (ROW, 1)),
        0,
        "a.jsonl:2",
    ),
    "a row of 10^8 escapes": (
        "a.jsonl",
        _repeated((b'{"text": "', 1), (b"\\u00e9", HUGE // 6), (b'"}\n', 1)),
        3,
        "a.jsonl:1",
    ),
    "a row of 10^8 brackets": ("a.jsonl", _repeated((b"[", HUGE), (b"\n", 1)), 3, "a row of more than 64 MiB"),
    "a row of 60 million brackets": ("a.jsonl", _repeated((b"[", 60_000_000), (b"\n", 1)), 3, "nested too deeply"),
    "a row of 20 million numbers": (
        "a.jsonl",
        _repeated((b'{"text": [0', 1), (b",1", 20_000_000), (b"]}\n", 1)),
        3,
        "a.jsonl:1",
    ),
    "a number of 10^7 digits": (
        "a.jsonl",
        _repeated((b'{"text": ', 1), (b"1", 10_000_000), (b"}\n", 1)),
        3,
        "a.jsonl:1",
    ),
    "10^8 characters without an end": ("a.jsonl", _repeated((b"x", HUGE)), 3, "a row of more than 64 MiB"),
    "a list with an item of 10^8 characters": (
        "a.json",
        _repeated((b'[{"text": "', 1), (b"x", HUGE), (b'"}]', 1)),
        3,
        "a row of more than 64 MiB",
    ),
    "a list of 10^8 blanks": ("a.json", _repeated((b"[", 1), (b" ", HUGE), (b'{"text": "one"}]', 1)), 0, '"used": 1'),
    "a field of 10^8 characters": (
        "a.csv",
        _repeated((b"text\none\n", 1), (b"x", HUGE), (b"\n", 1)),
        3,
        "a row of more than 64 MiB",
    ),
    "a quote that is not closed for 10^8 characters": (
        "a.csv",
        _repeated((b'text\n"', 1), (b"one " * 25 + b"\n", HUGE // 100)),
        3,
        "a row of more than 64 MiB",
    ),
    "a header of 10^8 commas": ("a.csv", _repeated((b",", HUGE), (b"\n1\n", 1)), 3, "a row of more than 64 MiB"),
    "a gzip of 2 GB of zeros": ("a.jsonl.gz", _repeated((b"\0", 2_000_000_000)), 3, "a row of more than 1,024 MiB"),
    "a gzip of 10^8 blanks and a row": ("a.jsonl.gz", _repeated((b" ", HUGE), (b"\n", 1), (ROW, 1)), 0, "a.jsonl.gz:1"),
    "a gzip of 30 million empty lines": ("a.jsonl.gz", _repeated((b"\n", 30_000_000), (ROW, 2)), 0, '"used": 2'),
    "a table in which many rows share a large text": ("a.parquet", _shared_text, 3, "characters of text, more than"),
    "a table with a text of 3 * 10^8 characters": ("a.parquet", _one_text, 3, "unpacks to more than"),
}


# --- valid data


def good_data() -> list[Trial]:
    return [Trial(name, partial(accepted, valid)) for name, valid in valid_data().items()]


def accepted(valid: Valid, folder: Path) -> None:
    """``inspect`` finds nothing that stops a run, and as many rows as there are."""
    for name, content in valid.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    valid.setup(folder)
    recipe(folder, valid.dataset, valid.task)
    env = {"PEFTCLI_CACHE": str(folder / "cache")}
    ran = timed("inspect", "recipe.yaml", "--json", "--quiet", "--rows", "20", cwd=folder, env=env)
    assert ran.code == 0, ran.err.decode()[-1000:]
    harmless(ran)
    answer = json.loads(ran.out)
    facts = answer["audit"]["train"]
    assert facts["used"] == valid.used, f"{facts['used']} rows are used"
    text = "\n".join(row["text"] for row in answer["rows"])
    assert valid.holds in text, f"no row holds {valid.holds!r}: {text[:500]!r}"
    if valid.trains:
        trained = timed("train", "recipe.yaml", "--json", "--quiet", cwd=folder, env=env)
        assert trained.code == 0, trained.err.decode()[-1000:]
        assert json.loads(trained.out)["data"]["used"] == valid.used


# --- mutations


def mutated_data() -> list[Trial]:
    return [
        Trial(f"mutations {start} to {start + GROUP - 1}", partial(unshaken, start))
        for start in range(0, MUTATIONS, GROUP)
    ]


def unshaken(start: int, folder: Path) -> None:
    """Each of some mutated files is encoded, or refused by an error of ours. One of them goes through ``inspect``."""
    env = {"PEFTCLI_CACHE": str(folder / "cache")}
    for number in range(start, start + GROUP):
        name, content = mutated_file(number)
        (folder / name).write_bytes(content)
        began = time.process_time()
        with trainkit.environment(**env):
            _encode(folder / name, number)
        assert time.process_time() - began < SLOWEST_MUTATION, number
    recipe(folder, f"train: {name}")
    ran = timed("inspect", "recipe.yaml", "--json", "--quiet", cwd=folder, env=env)
    harmless(ran)
    assert ran.code in (0, 3), f"mutation {number} ended with {ran.code}: {ran.err[-500:]!r}"
    json.loads(ran.out)


def _encode(path: Path, number: int) -> None:
    """What ``train`` does with a file before it trains."""
    task = CausalLM(settings.CausalLMSettings(), _tokenizer(), None)
    try:
        store = prepare(Source(train=str(path)), task, encoding("causal_lm", task), stop_at_bad=False)
        errors = [error for _, error in store.bad_rows()]
    except DataError as error:
        errors = [error]
    for error in errors:
        assert error.file == str(path) or error.key, number
        assert len(error.message) <= LONGEST_MESSAGE, number
        assert error.message.isprintable(), number


@cache
def _tokenizer() -> Any:
    return trainkit.tokenizer()


@cache
def _good_files() -> list[tuple[str, bytes]]:
    pairs = [{"prompt": f"q {n} é\U0001f600", "completion": 'x,"\n' * (n % 5) + f"a {n}"} for n in range(20)]
    chats = trainkit.MESSAGES[:10]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([list(pairs[0]), *(list(pair.values()) for pair in pairs)])
    plain = {
        "a.jsonl": bad_data_cases.lines(*pairs),
        "b.jsonl": bad_data_cases.lines(*chats),
        "a.json": json.dumps(pairs, indent=1).encode(),
        "b.json": json.dumps(chats).encode(),
        "a.csv": text.getvalue().encode(),
        "a.parquet": parquet(**{key: [pair[key] for pair in pairs] for key in pairs[0]}),
        "b.parquet": parquet(messages=[chat["messages"] for chat in chats]),
    }
    return [(f"{name}{packed}", pack(content)) for name, content in plain.items() for packed, pack in PACKERS.items()]


def mutated_file(number: int) -> tuple[str, bytes]:
    """A good file with some of its bytes or lines changed: as it is read, or, of a packed one, as it was packed."""
    rng = random.Random(f"data {number}")
    name, content = rng.choice(_good_files())
    change = rng.choice([mutated, _lines_changed])
    packed = next((ending for ending in PACKERS if ending and name.endswith(ending)), "")
    if packed and rng.random() < 0.5:
        plain = next(good for other, good in _good_files() if other == name.removesuffix(packed))
        return name, PACKERS[packed](change(plain, rng))
    return name, change(content, rng)


def _lines_changed(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    for _ in range(rng.choice([1, 2, 5])):
        one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        change = rng.randrange(4)
        if change == 0:
            lines[one], lines[other] = lines[other], lines[one]
        elif change == 1:
            lines[one:one] = [lines[other]] * rng.choice([1, 3])
        elif change == 2 and len(lines) > 1:
            del lines[one]
        else:
            lines[one] = lines[one].rstrip(b"\n")
    return b"".join(lines)


CAMPAIGNS = [
    Campaign(
        "bad data files",
        "`inspect` and `train` end with exit code 3, one message that names the file and the line, the row or the "
        "setting, no traceback, no terminal escape; the run folder holds the account of it and nothing else.",
        bad_files,
        least=300,
        sample=8,
    ),
    Campaign(
        "data beyond all memory",
        f"With {ALLOWANCE >> 20} MiB more than it has when it starts, `inspect` ends with exit code 0 or 3 on rows, "
        "fields and bombs of any size.",
        beyond_memory,
        least=18,
        sample=1,
    ),
    Campaign(
        "valid data files",
        "`inspect` and `train` read what is odd and in order, and every row of it.",
        good_data,
        least=70,
        sample=5,
    ),
    Campaign(
        "mutated data files",
        f"{GROUP} mutations of a good file each give rows or errors that name the file, within {SLOWEST_MUTATION:.0f} "
        "seconds of computing; `inspect` ends with exit code 0 or 3.",
        mutated_data,
        least=MUTATIONS // GROUP,
        sample=1,
    ),
]
