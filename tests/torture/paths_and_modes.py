"""Outputs with every kind of path, into every kind of place, and the modes of what is written."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trainkit
from campaigns import Campaign, Trial
from hub_server import Hub
from in_process import Ran, peftcli, places, used


@dataclass(frozen=True)
class Writer:
    """A command that writes where it is told to."""

    name: str
    ending: str
    """Of the file that it writes; empty: it writes a folder."""
    args: Callable[[str], list[str]]
    """Its arguments for an output."""
    last: str
    """How its product ends: what is in the last file to be written, or what the file ends with."""

    def check(self, output: Path) -> None:
        """Fails unless the product is whole."""
        if self.ending:
            content = output.read_text()
            assert content.rstrip().endswith(self.last), f"{output} is not whole: {content[-100:]!r}"
            return
        for name in (self.last, "config.json" if self.name == "merge" else "adapter_config.json"):
            assert (output / name).stat().st_size > 100, f"{name} is not whole"
        hidden = [path.name for path in output.iterdir() if path.name.startswith(".") and path.name != ".lock"]
        assert not hidden, f"left over: {hidden}"


def _writers() -> list[Writer]:
    small = ["training.max_steps=2", "training.save_strategy=steps", "training.save_steps=1"]
    return [
        Writer("train", "", lambda out: ["train", "{recipe}", f"training.output_dir={out}", *small], "run.json"),
        Writer("merge", "", lambda out: ["merge", "{adapter}", f"--output={out}", "--no-verify"], "model.safetensors"),
        Writer("combine", "", lambda out: ["combine", "{adapter}=1", f"--output={out}"], "adapter_model.safetensors"),
        Writer(
            "generate",
            ".jsonl",
            lambda out: ["generate", "{adapter}", "--input={prompts}", f"--output={out}", "--max-new-tokens=2"],
            "}",
        ),
        Writer("inspect", ".html", lambda out: ["inspect", "{recipe}", f"--html={out}"], "</html>"),
    ]


WRITERS = {writer.name: writer for writer in _writers()}


@dataclass(frozen=True)
class Output:
    """Where a command is told to write, and where that is."""

    argument: str
    path: Path
    cwd: Path | None = None
    home: Path | None = None


Place = Callable[[Path, str], Output]
"""Prepares a folder for an output of that ending."""


def _write(writer: Writer, output: Output) -> Ran:
    # braces of the output's own are no places
    args = [word.format(**places()).replace("\0", output.argument) for word in writer.args("\0")]
    env = {"PEFTCLI_CACHE": str(trainkit.scratch() / "cache")} | ({"HOME": str(output.home)} if output.home else {})
    return peftcli(*args, cwd=output.cwd, env=env)


def works(writer: Writer, place: Place, folder: Path) -> None:
    """The command writes there, and nothing beside it."""
    output = place(folder, writer.ending)
    before = _listed(folder, output.path)
    ran = _write(writer, output)
    assert ran.code == 0, f"it ended with {ran.code}: {ran.err.decode()}"
    writer.check(output.path)
    assert _listed(folder, output.path) == before, f"beside it: {_listed(folder, output.path) ^ before}"


def refused(writer: Writer, place: Place, folder: Path) -> None:
    """The command ends with 2 or 7 and one message that names the place, and makes nothing."""
    _check_refused(writer, place(folder, writer.ending), folder)


def works_or_refused(writer: Writer, place: Place, folder: Path) -> None:
    """One or the other."""
    output = place(folder, writer.ending)
    before = _tree(folder)
    if (ran := _write(writer, output)).code == 0:
        writer.check(output.path)
    else:
        _check_message(ran, output)
        assert _tree(folder) == before


def _check_refused(writer: Writer, output: Output, folder: Path) -> None:
    before = _tree(folder)
    ran = _write(writer, output)
    _check_message(ran, output)
    assert _tree(folder) == before, f"changed: {set(_tree(folder).items()) ^ set(before.items())}"


def _check_message(ran: Ran, output: Output) -> None:
    said = ran.err.decode(errors="replace")
    assert ran.code in (2, 7), f"it ended with {ran.code}: {said}"
    assert len(ran.messages) == 1, f"{len(ran.messages)} messages: {said}"
    assert "Traceback" not in said, said
    shown = output.argument.removeprefix("./").encode("ascii", "backslashreplace").decode()
    told = said.encode("ascii", "backslashreplace").decode()
    assert shown in told or "training.output_dir" in told, f"the message does not name {shown}: {told}"


def _tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that is below a folder: its inode, its mode, its content."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_mode, content)
    return found


def _listed(folder: Path, output: Path) -> set[str]:
    """What is below a folder, but for what is on the way to the output or in it."""
    real = output.resolve()
    ways = {output, real, *output.parents, *real.parents}
    paths = {path for path in folder.rglob("*") if path not in ways and real not in path.resolve().parents}
    return {str(path.relative_to(folder)) for path in paths}


def _named(name: str) -> Place:
    """An output of that name."""

    def place(folder: Path, ending: str) -> Output:
        return Output(f"{folder}/{name}{ending}", folder / f"{name}{ending}")

    return place


def _of_bytes(letter: str, count: int) -> Place:
    """An output whose name has so many bytes."""

    def place(folder: Path, ending: str) -> Output:
        room = count - len(ending)
        name = letter * (room // len(letter.encode()))
        name += "x" * (room - len(name.encode())) + ending
        return Output(f"{folder}/{name}", folder / name)

    return place


def _relative(argument: str, path: str, cwd: str = "here") -> Place:
    """An output relative to a folder."""

    def place(folder: Path, ending: str) -> Output:
        (folder / cwd).mkdir(parents=True)
        (folder / "beside").mkdir()
        return Output(f"{argument}{ending}", folder / f"{path}{ending}", cwd=folder / cwd)

    return place


def _here(folder: Path, ending: str) -> Output:
    (folder / "here").mkdir()
    return Output(".", folder / "here", cwd=folder / "here")


def _at_home(folder: Path, ending: str) -> Output:
    (folder / "home").mkdir()
    return Output(f"~/out{ending}", folder / "home" / f"out{ending}", home=folder / "home", cwd=folder)


def _link(target: str, there: bool) -> Place:
    """A link to an output."""

    def place(folder: Path, ending: str) -> Output:
        real, link = folder / f"{target}{ending}", folder / f"link{ending}"
        real.parent.mkdir(parents=True, exist_ok=True)
        if there:
            real.write_text("before") if ending else real.mkdir()
        link.symlink_to(os.path.relpath(real, folder))
        return Output(str(link), real)

    return place


def _existing(folder: Path, ending: str) -> Output:
    path = folder / f"out{ending}"
    path.write_text("before") if ending else path.mkdir(mode=0o750)
    return Output(str(path), path)


def _on_another_file_system(folder: Path, ending: str) -> Output:
    other = _other_file_system()
    (folder / "link").symlink_to(other)
    return Output(f"{folder}/link/{folder.name}{ending}", other / f"{folder.name}{ending}")


@functools.cache
def _other_file_system() -> Path:
    """A folder in memory that lives as long as this process; an ordinary one where there is none."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None, prefix="peftcli-torture-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _deep(length: int) -> Place:
    """An output whose path is so long."""

    def place(folder: Path, ending: str) -> Output:
        path = folder
        while length - len(str(path)) > 130:
            path /= "d" * 100
        path.mkdir(parents=True)
        path /= "e" * (length - len(str(path)) - 1 - len(ending)) + ending
        return Output(str(path), path)

    return place


def _below_a_file(folder: Path, ending: str) -> Output:
    (folder / "file").write_text("mine")
    return Output(f"{folder}/file/new/out{ending}", folder / "file")


def _of_the_other_kind(folder: Path, ending: str) -> Output:
    path = folder / f"out{ending}"
    path.mkdir() if ending else path.write_text("mine")
    return Output(str(path), path)


def _not_empty(folder: Path, ending: str) -> Output:
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("mine")
    return Output(f"{folder}/out", folder / "out")


def _loop(folder: Path, ending: str) -> Output:
    (folder / "loop").symlink_to("loop")
    return Output(f"{folder}/loop/out{ending}", folder / "loop")


def _at(path: str) -> Place:
    return lambda folder, ending: Output(f"{path}{ending}", Path(f"{path}{ending}"))


WORKS: dict[str, Place] = {
    "a new path": _named("out"),
    "below folders that are not there": _named("a/b/c/out"),
    "what is there already": _existing,
    "unicode, composed": _named(unicodedata.normalize("NFC", "Übergröße-é")),
    "unicode, decomposed": _named(unicodedata.normalize("NFD", "Übergröße-é")),
    "other scripts and emoji": _named("文件 ملف 👩\u200d👧"),
    "255 bytes": _of_bytes("x", 255),
    "255 bytes of unicode": _of_bytes("é", 255),
    "spaces and quotes": _named("a 'b' \"c\" d"),
    "braces, percent, dollar": _named("{a} %s $HOME [b]*?"),
    "a newline": _named("one\ntwo"),
    "a leading dot": _named(".out"),
    "a leading dash": _relative("-out", "here/-out"),
    "relative": _relative("out", "here/out"),
    "relative, by way of others": _relative("./../beside/./../beside/out", "beside/out"),
    "the home folder": _at_home,
    "a link to what is there": _link("real/out", there=True),
    "another file system": _on_another_file_system,
    "a path of 3900 bytes": _deep(3900),
}
REFUSED: dict[str, Place] = {
    "below a file": _below_a_file,
    "what is of the other kind": _of_the_other_kind,
    "a loop of links": _loop,
    "256 bytes": _of_bytes("x", 256),
    "a path of 4200 bytes": lambda folder, ending: Output("/".join([str(folder), *["d" * 100] * 41]) + ending, folder),
    "proc": _at("/proc/out"),
    "proc, a process": _at("/proc/self/out"),
}
EITHER: dict[str, Place] = {
    "a link to what is not there": _link("real/out", there=False),
    "a path of 4080 bytes": _deep(4080),
    "no UTF-8": _named(os.fsdecode(b"\xff\xfeout")),
    "control characters": _named("\x1b[31m\x07out"),
}


def follows_umask(writer: Writer, umask: int, folder: Path) -> None:
    """Every file and folder that is written has the mode that the umask wants."""
    before = os.umask(umask)
    try:
        works(writer, _named("new/out"), folder)
    finally:
        os.umask(before)
    for path in folder.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        mode = path.stat().st_mode & 0o777
        assert mode == wanted, f"{path.relative_to(folder)} has mode {mode:03o}, not {wanted:03o}"


def may_not_write(writer: Writer, mode: int, owned: bool, folder: Path) -> None:
    """A folder that this user may not write to, or not even look into."""
    place = folder / "theirs"
    place.mkdir()
    works(writer, _named("before/out"), folder)  # all is imported: nobody may read where Python is
    shutil.rmtree(folder / "before")
    with _as_nobody() as nobody:
        if owned and nobody:
            _as_root(lambda: os.chown(place, nobody, nobody))
        _as_root(lambda: folder.chmod(0o755))
        _as_root(lambda: place.chmod(mode))
        try:
            _check_message(_write(writer, Output(f"{place}/new/out{writer.ending}", place)), Output(str(place), place))
        finally:
            _as_root(lambda: place.chmod(0o755))
    assert list(folder.iterdir()) == [place]
    assert not list(place.iterdir())


@contextlib.contextmanager
def _as_nobody() -> Iterator[int]:
    """Inside, root is nobody, whom modes concern. Gives its number; 0: this user is not root."""
    if os.geteuid():
        yield 0
        return
    for path in [trainkit.scratch(), *trainkit.scratch().rglob("*")]:
        path.chmod(0o755)
    os.seteuid(_NOBODY)
    try:
        yield _NOBODY
    finally:
        os.seteuid(0)


_NOBODY = 65534


def _as_root(action: Callable[[], object]) -> None:
    """Does something as who this process was started by."""
    effective = os.geteuid()
    os.seteuid(os.getuid())
    try:
        action()
    finally:
        os.seteuid(effective)


def answers_into(path: str, code: int, folder: Path) -> None:
    """Answers go into a device or a pipe as it is."""
    ran = _write(WRITERS["generate"], Output(path, Path(path), cwd=folder))
    assert ran.code == code, f"it ended with {ran.code}: {ran.err.decode()}"
    if code:
        assert len(ran.messages) == 1, ran.err.decode()
        assert path in ran.messages[0], ran.messages[0]
    if path.endswith("stdout") or path.endswith("/1"):
        lines = ran.out.decode().splitlines()
        assert len([json.loads(line) for line in lines[:6]]) == 6, lines
    assert not list(folder.iterdir())


def no_path_in_the_product(folder: Path) -> None:
    """Adapter config and card name the base as the recipe did; nothing else of the product names the machine."""
    base = folder / "models" / "tiny"
    shutil.copytree(trainkit.base_folder(), base)
    recipe = trainkit.write_recipe(folder / "in", Path("models/tiny"))
    ran = peftcli("train", recipe, "training.output_dir=out", "training.max_steps=1", cwd=folder)
    assert ran.code == 0, ran.err.decode()
    out = folder / "out"
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "models/tiny"
    ran = peftcli("merge", "out", "--output", "merged", cwd=folder)
    assert ran.code == 0, ran.err.decode()
    ran = peftcli("combine", "out=1", "--output", "combined", cwd=folder)
    assert ran.code == 0, ran.err.decode()
    products = [out / name for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png")]
    for path in [*products, *(folder / "merged").rglob("*"), *(folder / "combined").rglob("*")]:
        for told in (str(folder), str(Path.home()), os.uname().nodename):
            assert told.encode() not in path.read_bytes() or len(told) < 6, f"{path.name} names {told}"


def local_base_is_not_pushed(folder: Path) -> None:
    """An adapter that was trained on a folder of this machine is pushed with the hub's id for it only."""
    shutil.copytree(trainkit.base_folder(), folder / "models" / "tiny")
    recipe = trainkit.write_recipe(folder / "in", Path("models/tiny"))
    ran = peftcli("train", recipe, "training.output_dir=out", "training.max_steps=1", cwd=folder)
    assert ran.code == 0, ran.err.decode()
    (folder / "elsewhere").mkdir()
    with Hub() as hub, used(hub) as env:
        refused = peftcli("push", folder / "out", "alice/mine", cwd=folder / "elsewhere", env=env)
        assert refused.code == 2, refused.err.decode()
        assert not hub.requests
        ran = peftcli("push", "out", "alice/mine", "--base-model-id", "acme/tiny", cwd=folder, env=env)
        assert ran.code == 0, ran.err.decode()
        assert hub.repos["alice/mine"].private
        files = hub.repos["alice/mine"].refs["main"][-1].files
        allowed = {"adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "task.json"}
        assert set(files) == allowed, f"uploaded: {sorted(files)}"
        assert not [name for name, content in files.items() if str(folder).encode() in content]


def _trials() -> Sequence[Trial]:
    trials = [
        Trial(f"{writer.name}: {name}", functools.partial(check, writer, place))
        for check, places in ((works, WORKS), (refused, REFUSED), (works_or_refused, EITHER))
        for name, place in places.items()
        for writer in WRITERS.values()
    ]
    folders = [writer for writer in WRITERS.values() if not writer.ending]
    trials += [
        Trial(f"{writer.name}: the folder it is in", functools.partial(works, writer, _here)) for writer in folders
    ]
    trials += [Trial(f"{writer.name}: not empty", functools.partial(refused, writer, _not_empty)) for writer in folders]
    trials += [
        Trial(f"{writer.name}: umask {umask:03o}", functools.partial(follows_umask, writer, umask))
        for writer in WRITERS.values()
        for umask in (0o022, 0o027, 0o077)
    ]
    trials += [
        Trial(f"{writer.name}: {name}", functools.partial(may_not_write, writer, mode, owned))
        for writer in WRITERS.values()
        for name, mode, owned in (
            ("a read-only folder", 0o555, True),
            ("somebody else's folder", 0o755, False),
            ("a folder that may not be looked into", 0o700, False),
        )
    ]
    trials += [
        Trial(f"generate: {path}", functools.partial(answers_into, path, code))
        for path, code in (("/dev/full", 7), ("/dev/stdout", 0), ("/dev/fd/1", 0), ("/dev/null", 0))
    ]
    return [
        *trials,
        Trial("a product names no path", no_path_in_the_product),
        Trial("a base that is a folder is not pushed", local_base_is_not_pushed),
    ]


CAMPAIGNS = [
    Campaign(
        "paths and modes",
        "A command writes where it is told to, with the umask's modes, or ends with 2 or 7 and one message.",
        _trials,
        least=150,
        sample=3,
    )
]
