"""A hub that refuses, fails, lies and falls silent, under every command that talks to it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import signal
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from campaigns import Campaign, Trial
from hub_client import Seen, peftcli, start
from hub_server import TOKEN, USER, Answer, Commit, Hub, Repo
from in_process import inputs
from tables import cases
from trainkit import PROMPTS, base_folder, scratch

from peftcli.adapters.load import SHARED_FILES

PUSHED = f"{USER}/my-adapter"
ADAPTER = "acme/adapter"
BASE = "acme/tiny"
ROWS = "datasets/acme/rows"
TRIES = 5
LONGEST_MESSAGE = 1000
LIMIT = 0.5
"""Seconds of silence after which a connection counts as dead, in trials of silence."""

PAGE, OF_PAGES = "<html>Welcome to the hotel's network</html>", {"Content-Type": "text/html"}
SAID = {"error": f"because of {TOKEN}\x1b[31m " + "x" * 5000}
"""An answer of a hub that repeats a secret, tries to steer the terminal, and does not end."""


@dataclass(frozen=True)
class Case:
    """A fault, and what must come of it."""

    fault: Callable[[Hub], None]
    """Sets it up. Faults that did not all happen fail the trial, as more requests than faults do."""
    code: int
    says: str = ""
    """A pattern that the error has."""
    asked: dict[str, int] = dataclasses.field(default_factory=dict)
    """How many requests an endpoint gets, as ``commit`` or ``GET resolve``."""
    waits: Sequence[float] | None = None
    """What is waited between the tries."""
    limit: float | None = None
    token: str = TOKEN


# --- what is on the hub, and on this machine


def _shared(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SHARED_FILES if (folder / name).is_file()}


def hub_with(*names: str) -> Hub:
    """A hub with some of the adapter, its base model and a dataset."""
    hub = Hub()
    contents: dict[str, Callable[[], dict[str, bytes]]] = {
        ADAPTER: lambda: _shared(inputs().adapter),
        BASE: lambda: {path.name: path.read_bytes() for path in base_folder().iterdir()},
        ROWS: lambda: {"train.jsonl": "".join(json.dumps(row) + "\n" for row in PROMPTS).encode()},
    }
    for name in names:
        hub.repos[name] = Repo(private=False)
        hub.repos[name].refs["main"].append(Commit("files", contents[name]()))
    return hub


# --- what holds whatever the hub does


def _as_promised(seen: Seen, hub: Hub, case: Case, folder: Path) -> None:
    told = f"exit {seen.code}: {seen.err[-1500:]}"
    assert seen.code == case.code, f"exit {case.code} expected; {told}"
    assert re.search(case.says, seen.error), f"{case.says!r} is not said; {told}"
    assert bool(seen.error) == (case.code != 0), told
    assert len(seen.error) <= LONGEST_MESSAGE, f"an error of {len(seen.error)} characters; {told}"
    for text in (seen.out, seen.err):
        assert "Traceback" not in text, told
        assert TOKEN not in text, "the token is printed"
        assert "\x1b" not in text, "the hub steers the terminal"
    assert seen.strangers == [], f"asked {seen.strangers}"
    assert hub.faults_left == 0, f"{hub.faults_left} faults did not happen; {told}"
    for what, count in case.asked.items():
        method, _, endpoint = what.rpartition(" ")
        found = len(hub.asked(endpoint, method or None))
        assert found == count, f"{found} requests of {what}, not {count}; {told}"
    if case.waits is not None:
        assert seen.waits == list(case.waits), f"waited {seen.waits}, not {list(case.waits)}"
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), f"the token is in {path}"


# --- push


def _push(case: Case, folder: Path) -> None:
    with hub_with() as hub:
        case.fault(hub)
        seen = peftcli(folder, "push", _pushable(), PUSHED, url=hub.url, limit=case.limit, token=case.token)
        _as_promised(seen, hub, case, folder)
        made = hub.repos[PUSHED].commits if PUSHED in hub.repos else 0
        assert made == (case.code == 0), f"{made} commits"
        hub.faults.clear()
        again = peftcli(folder, "push", _pushable(), PUSHED, url=hub.url)
        assert again.code == 0, f"the hub is well again, and the push is not: {again.err}"
        assert hub.repos[PUSHED].commits == 1, "a second commit of the same files"
        pushed = hub.repos[PUSHED].refs["main"][-1].files
        assert {name: content for name, content in pushed.items() if name != "README.md"} == _shared(_pushable())


# --- pulls of an adapter


def _pull(case: Case, folder: Path) -> None:
    cache = folder / "cache"
    with hub_with(ADAPTER) as hub:
        case.fault(hub)
        pull = functools.partial(peftcli, folder, "info", ADAPTER, "--no-updates", cache=cache)
        seen = pull(url=hub.url, limit=case.limit, token=case.token)
        _as_promised(seen, hub, case, folder)
        assert not list(folder.glob("escaped*")), "a file outside of the cache"
        if case.code == 0:
            _is_pulled(hub, cache)
            return
        alone = pull(network=False)
        assert alone.code == 5, f"half an adapter in the cache counts as a whole one: {alone.err or alone.out}"
        hub.faults.clear()
        _holds(hub, _shared(inputs().adapter))
        again = pull(url=hub.url)
        assert again.code == 0, f"the hub is well again, and the pull is not: {again.err}"
        _is_pulled(hub, cache)


def _is_pulled(hub: Hub, cache: Path) -> None:
    head = hub.repos[ADAPTER].refs["main"][-1]
    snapshot = cache / "hub" / f"models--{ADAPTER.replace('/', '--')}" / "snapshots" / head.oid
    pulled = {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()}
    assert pulled == {name: head.files[name] for name in SHARED_FILES if name in head.files}, "other bytes are cached"
    assert not list(cache.rglob("*.incomplete"))


# --- other hosts, no host, and signals


def _elsewhere(command: str, send: Callable[[Hub, Hub], None], folder: Path) -> None:
    """The hub sends a command to another host, which must not see the token, and may know nothing."""
    with hub_with(ADAPTER, BASE) as hub, hub_with(ADAPTER, BASE) as other:
        hub.repos[PUSHED] = Repo(private=True)
        other.token = None
        send(hub, other)
        seen = peftcli(folder, *_words(command), url=hub.url)
        assert seen.code in (0, 5, 6), f"exit {seen.code}: {seen.err[-1500:]}"
        assert "Traceback" not in seen.err
        assert TOKEN not in seen.err + seen.out
        assert hub.faults_left == 0, "nobody was sent"
        assert other.requests, f"nobody went; exit {seen.code}: {seen.err[-1500:]}"
        assert not [request for request in other.requests if request.token], "the token went to another host"


def _to(endpoint: str, status: int, path: str, method: str | None = None) -> Callable[[Hub, Hub], None]:
    """Send the requests of an endpoint to a path of the other host."""

    def send(hub: Hub, other: Hub) -> None:
        hub.fail(endpoint, status, headers={"Location": f"{other.url}{path}"}, method=method)

    return send


def _uploads_to(hub: Hub, other: Hub) -> None:
    """Large files go to the other host, and are verified there."""

    def change(answer: Answer) -> Answer:
        return dataclasses.replace(answer, content=answer.content.replace(hub.url.encode(), other.url.encode()))

    hub.alter("lfs_batch", change)


def _refused(command: str, folder: Path) -> None:
    """Nobody listens: told after one try."""
    with hub_with() as hub:
        url = hub.url
    seen = peftcli(folder, *_words(command), url=url)
    assert seen.code == 5, f"exit {seen.code}: {seen.err[-1500:]}"
    assert seen.waits == []
    assert "cannot reach" in seen.error
    assert len(seen.error) <= LONGEST_MESSAGE


def _stopped(command: str, endpoint: str, method: str | None, number: signal.Signals, folder: Path) -> None:
    """A signal while the hub is silent ends the command, whatever threads wait for an answer."""
    with hub_with(ADAPTER) as hub:
        hub.delay(endpoint, 60, method=method, times=8)
        child, _ = start(folder, *_words(command), url=hub.url)
        child.until(lambda: bool(hub.asked(endpoint, method)))
        child.signal(number)
        code = child.wait(10)
    assert code == (130 if number == signal.SIGINT else 143), f"exit {code}: {child.err}"
    assert child.err.count("error: ") == 1, child.err


def _words(command: str) -> list[object]:
    return ["push", _pushable(), PUSHED] if command == "push" else ["info", ADAPTER, "--no-updates"]


def _others() -> list[Trial]:
    sent = [
        ("push", "the look", _to("info", 307, f"/api/models/{PUSHED}")),
        ("push", "the preparation", _to("preupload", 307, f"/api/models/{ADAPTER}/preupload/main")),
        ("push", "the commit", _to("commit", 307, f"/api/models/{ADAPTER}/commit/main")),
        ("push", "the upload", _uploads_to),
        ("pull", "the look", _to("info", 302, f"/api/models/{ADAPTER}")),
        ("pull", "the list", _to("tree", 302, f"/api/models/{ADAPTER}/tree/main")),
        ("pull", "the file", _to("resolve", 302, f"/{ADAPTER}/resolve/main/{WEIGHTS}", "GET")),
    ]
    waiting = [
        ("push", "commit", None),
        ("pull", "info", None),
        ("pull", "resolve", "HEAD"),
        ("pull", "resolve", "GET"),
    ]
    return [
        *(
            Trial(f"{command}: {what} is sent elsewhere", functools.partial(_elsewhere, command, send))
            for command, what, send in sent
        ),
        *(Trial(f"{command}: nobody listens", functools.partial(_refused, command)) for command in ("push", "pull")),
        *(
            Trial(
                f"{command}: {number.name} while {endpoint}{f' ({method})' if method else ''} is silent",
                functools.partial(_stopped, command, endpoint, method, number),
            )
            for command, endpoint, method in waiting
            for number in (signal.SIGINT, signal.SIGTERM)
        ),
    ]


# --- other commands, base models and datasets


def _read(command: str, case: Case, folder: Path) -> None:
    """A command that reads from the hub, and again once the hub is well."""
    cache = folder / "cache"
    with hub_with(ADAPTER, BASE, ROWS) as hub:
        case.fault(hub)
        seen = peftcli(folder, *_command(command, folder / "first"), url=hub.url, cache=cache, limit=case.limit)
        _as_promised(seen, hub, case, folder)
        assert case.code == 0 or not list((folder / "first").rglob("*.safetensors")), "what failed left a model"
        hub.faults.clear()
        again = peftcli(folder, *_command(command, folder / "second"), url=hub.url, cache=cache)
        assert again.code == 0, f"the hub is well again, and the command is not: {again.err}"
        for name in (BASE, ADAPTER, ROWS):
            _holds_only(hub, name, cache)


def _command(name: str, output: Path) -> list[object]:
    recipe = inputs().recipe
    rows = [f"dataset.train={ROWS.removeprefix('datasets/')}", "dataset.eval=null"]
    train = ["train", recipe, f"training.output_dir={output}", "training.max_steps=1"]
    generate = ["generate", "--prompt", "What follows?", "--max-new-tokens", "1"]
    return {
        "check --deep": ["check", "--deep", _recipe_ofhub_with()],
        "train": [*train, f"base_model={BASE}"],
        "generate": [*generate, inputs().adapter, "--base", BASE],
        "merge": ["merge", inputs().adapter, "--base", BASE, "--output", output],
        "train on a dataset": [*train, *rows],
        "train on a stream": [*train, *rows, "dataset.streaming=true"],
        "inspect a dataset": ["inspect", recipe, *rows],
        "generate with an adapter": [*generate, ADAPTER],
        "merge an adapter": ["merge", ADAPTER, "--output", output],
        "evaluate an adapter": ["evaluate", recipe, "--adapter", ADAPTER],
        "compare adapters": ["diff", ADAPTER, inputs().adapter],
        "combine adapters": ["combine", f"{ADAPTER}=1", f"{inputs().adapter}=1", "--output", output],
    }[name]


@functools.cache
def _recipe_ofhub_with() -> Path:
    path = scratch() / "of-hub.yaml"
    recipe = inputs().recipe
    path.write_text(recipe.read_text().replace(str(base_folder()), BASE))
    return path


def _holds_only(hub: Hub, name: str, cache: Path) -> None:
    """Of a repository, the cache holds the bytes of the hub, though perhaps not all files."""
    head = hub.repos[name].refs["main"][-1]
    kind = "" if name.startswith("datasets/") else "models/"
    snapshot = cache / "hub" / f"{kind}{name}".replace("/", "--") / "snapshots" / head.oid
    for path in snapshot.rglob("*"):
        held = str(path.relative_to(snapshot))
        assert not path.is_file() or path.read_bytes() == head.files[held], f"other bytes of {held} are cached"


@functools.cache
def _pushable() -> Path:
    """An adapter folder of one tensor whose base model is on the hub."""
    folder = scratch() / "pushable"
    folder.mkdir()
    config = {"base_model_name_or_path": BASE, "lora_alpha": 16, "peft_type": "LORA", "r": 8, "task_type": "CAUSAL_LM"}
    config["target_modules"] = ["q_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"base_model.model.q_proj.lora_A.weight": entry}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return folder


BACKING_OFF = (1, 2, 4, 8)
DROPPED = "connection was dropped|closed|disconnected|no answer"


WEIGHTS = "adapter_model.safetensors"


CLIMBS = "../../../../escaped"


def _holds(hub: Hub, files: dict[str, bytes]) -> None:
    """A commit of other files."""
    hub.repos[ADAPTER].refs["main"].append(Commit("others", files))


def _large_and_cut(hub: Hub) -> None:
    """Of the rest of 32 megabytes one half comes each time; huggingface_hub keeps what it has of it in tens."""
    files = hub.repos[ADAPTER].refs["main"][-1].files
    _holds(hub, {**files, WEIGHTS: _grown(files[WEIGHTS])})
    hub.cut("resolve", times=2, method="GET", path=WEIGHTS)


def _grown(weights: bytes) -> bytes:
    """One more tensor."""
    (size,) = struct.unpack("<Q", weights[:8])
    header, data = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    more = bytes(32 << 20)
    header["base_model.model.more.weight"] = {
        "dtype": "U8",
        "shape": [len(more)],
        "data_offsets": [len(data), len(data) + len(more)],
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data + more


def _climbing_commit(hub: Hub) -> None:
    hub.repos[ADAPTER].refs[CLIMBS] = hub.repos[ADAPTER].refs["main"]
    hub.alter("info", _with(sha=CLIMBS))


def _with(**changes: object) -> Callable[[Answer], Answer]:
    return lambda answer: dataclasses.replace(
        answer, content=json.dumps({**json.loads(answer.content), **changes}).encode()
    )


def _listing(*names: str) -> Callable[[Answer], Answer]:
    more = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
    return lambda answer: dataclasses.replace(answer, content=json.dumps(json.loads(answer.content) + more).encode())


def _headed(**changes: str | None) -> Callable[[Answer], Answer]:
    return lambda answer: dataclasses.replace(
        answer, headers={name: value for name, value in {**answer.headers, **changes}.items() if value is not None}
    )


def _short(answer: Answer) -> Answer:
    return dataclasses.replace(answer, content=answer.content[:-5])


def _long(answer: Answer) -> Answer:
    return dataclasses.replace(answer, content=answer.content + b"more")


def _flipped(answer: Answer) -> Answer:
    """Another content of the same size."""
    return dataclasses.replace(answer, content=answer.content[:-1] + bytes([answer.content[-1] ^ 1]))


NO_OBJECT = {"transfer": "basic", "objects": [{"oid": "0" * 64, "size": 1, "error": {"code": 403, "message": TOKEN}}]}


def _each(endpoint: str, *statuses: int) -> Callable[[Hub], None]:
    return lambda hub: [hub.fail(endpoint, status) for status in statuses] and None


def _holding(files: dict[str, bytes]) -> Callable[[Hub], None]:
    return lambda hub: _holds(hub, files)


def _nothing() -> Callable[[Hub], None]:
    return lambda hub: None


def _lost_then_503(hub: Hub) -> None:
    hub.lose_answer("commit")
    hub.fail("paths_info", 503, times=3)


def _all_lost(hub: Hub) -> None:
    for endpoint in ("create_repo", "preupload", "lfs_put", "commit"):
        hub.lose_answer(endpoint)


CASES: dict[str, dict[str, Case]] = cases(
    "hub_faults",
    globals()
    | {
        "SHORT": _short,
        "LONG": _long,
        "FLIPPED": _flipped,
        "ALL_LOST": _all_lost,
        "LOST_THEN_DOWN": _lost_then_503,
        "LARGE_AND_CUT": _large_and_cut,
        "CLIMBING_COMMIT": _climbing_commit,
    },
)


def _pushes() -> list[Trial]:
    return [Trial(f"push: {name}", functools.partial(_push, case)) for name, case in CASES["push"].items()]


def _pulls() -> list[Trial]:
    return [Trial(f"pull: {name}", functools.partial(_pull, case)) for name, case in CASES["pull"].items()]


def _reads() -> list[Trial]:
    return [
        Trial(f"{command}: {name}", functools.partial(_read, command, case))
        for commands, own in CASES.items()
        if commands not in ("push", "pull")
        for command in commands.split(", ")
        for name, case in own.items()
    ]


CAMPAIGNS = [
    Campaign(
        name="hub faults under push",
        promise="A refusal ends it at once with 6, a failure with 5 after at most 5 tries; "
        "no commit is made twice, no token shown.",
        trials=_pushes,
        least=30,
        sample=1,
    ),
    Campaign(
        name="hub faults under pulls",
        promise="A refusal ends it at once with 6, a failure with 5 after at most 5 tries; "
        "nothing half, false or astray is cached.",
        trials=_pulls,
        least=40,
        sample=2,
    ),
    Campaign(
        name="other hosts, no hub, a silent hub",
        promise="No other host sees the token; without a hub the exit code is 5 at once; a signal "
        "ends the wait for it.",
        trials=_others,
        least=15,
        sample=1,
    ),
    Campaign(
        name="hub faults under other commands",
        promise="A refusal ends them at once with 6, a failure with 5 after at most 5 tries; "
        "with the hub well they work again.",
        trials=_reads,
        least=40,
        sample=1,
    ),
]
