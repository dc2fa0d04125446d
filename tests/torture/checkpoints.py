"""Damaged checkpoints, and many commands that want one folder."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import safetensors.torch
import trainkit
from campaigns import Campaign, Trial
from training import assert_same, stopped_copy, whole
from trainkit import FULL, Child, read_run, run_recipe, write_recipe

from peftcli.errors import StorageError
from peftcli.system.disk import sha256

FILES = (
    "MANIFEST.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "best_adapter.safetensors",
    "optimizer.safetensors",
    "progress.json",
    "random-00000.safetensors",
)
Damage = Callable[[Path], object]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


OF_A_FILE: dict[str, Damage] = {
    "one bit": _flip,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "gone": Path.unlink,
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a link": _link,
    "a pipe": lambda path: _instead(path, os.mkfifo),
    "a folder": lambda path: _instead(path, Path.mkdir),
    "a device": lambda path: _instead(path, lambda at: at.symlink_to("/dev/zero")),
}


def _manifest(change: Callable[[dict], object]) -> Damage:
    """Changes a manifest, and its hash of itself with it."""

    def damage(folder: Path) -> None:
        path = folder / "MANIFEST.json"
        values = json.loads(path.read_text())
        change(values)
        rest = {key: value for key, value in values.items() if key != "manifest_sha256"}
        seal = hashlib.sha256(_as_json(rest)).hexdigest()
        path.write_bytes(_as_json({**rest, "manifest_sha256": seal}))

    return damage


def _as_json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


OF_THE_FOLDER: dict[str, Damage] = {
    "another recipe in the manifest": lambda folder: (folder / "MANIFEST.json").write_text(
        (folder / "MANIFEST.json").read_text().replace('"recipe_sha256": "', '"recipe_sha256": "0')
    ),
    "a file too many": lambda folder: (folder / "extra").write_text(""),
    "a folder too many": lambda folder: (folder / "more").mkdir(),
    "a manifest that is a list": lambda folder: (folder / "MANIFEST.json").write_text("[]"),
    "a manifest without files": lambda folder: (folder / "MANIFEST.json").write_text("{}"),
    "files that are a list": lambda folder: (folder / "MANIFEST.json").write_text('{"files": [1]}'),
    "files of no size": _manifest(lambda values: values.update(files={name: {} for name in values["files"]})),
    "files that are text": _manifest(lambda values: values.update(files=dict.fromkeys(values["files"], "x"))),
    "a manifest nested deeply": lambda folder: (folder / "MANIFEST.json").write_text("[" * 100_000),
    "a manifest that is no text": lambda folder: (folder / "MANIFEST.json").write_bytes(b"\xff\xfe{}"),
    "a manifest of 20 MB": lambda folder: (folder / "MANIFEST.json").write_text(" " * 20_000_000 + "{}"),
    "a manifest that leaves out the optimizer": lambda folder: (
        _manifest(lambda values: values["files"].pop("optimizer.safetensors"))(folder),
        (folder / "optimizer.safetensors").unlink(),
    ),
    "a manifest that leaves out the adapter": lambda folder: (
        _manifest(lambda values: values["files"].pop("adapter_model.safetensors"))(folder),
        (folder / "adapter_model.safetensors").unlink(),
    ),
    "a manifest that leaves out the random state": lambda folder: (
        _manifest(lambda values: values["files"].pop("random-00000.safetensors"))(folder),
        (folder / "random-00000.safetensors").unlink(),
    ),
    "another step in the manifest": _manifest(lambda values: values.update(step=3)),
    "a step that is text": _manifest(lambda values: values.update(step="7")),
    "a path out of the folder": _manifest(lambda values: values["files"].update({"../../recipe.yaml": {"bytes": 1}})),
    "another checkpoint under its name": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name("step-000006"), folder),
    ),
    "a link to another checkpoint": lambda folder: (shutil.rmtree(folder), folder.symlink_to("step-000006")),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


def _damaged(name: str, damage: Damage, folder: Path) -> None:
    """The newest checkpoint is damaged: the one before is used, and the damage is told."""
    recipe = stopped_copy(folder)
    checkpoints = folder / "out/checkpoints"
    damage(checkpoints / "step-000007" / name if name else checkpoints / "step-000007")
    done = run_recipe(recipe, *FULL)
    told = [text for text in done.warnings if "damaged" in text]
    assert len(told) == 1, f"told {len(told)} times of the damage"
    assert "step-000007 is damaged" in told[0], told[0]
    assert len(told[0]) < 500, "a message without end"
    assert os.path.lexists(checkpoints / ".damaged-step-000007"), "it was not set aside"
    assert done.run["attempts"][-1]["from_step"] == 6, f"went on from step {done.run['attempts'][-1]['from_step']}"
    assert_same(done.folder, whole())


def _forge(name: str, change: Callable[[dict], object]) -> Damage:
    """Changes the tensors of a file and makes its manifest agree."""

    def damage(folder: Path) -> None:
        path = folder / name
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
        said = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _manifest(lambda values: values["files"].update({name: said}))(folder)

    return damage


def _forge_progress(change: Callable[[dict], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "progress.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
        said = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _manifest(lambda values: values["files"].update({path.name: said}))(folder)

    return damage


def _first(tensors: dict) -> str:
    return min(name for name in tensors if tensors[name].dim() > 1)


FORGED: dict[str, Damage] = {
    "a tensor of the adapter missing": _forge("adapter_model.safetensors", lambda t: t.pop(_first(t))),
    "a tensor of the adapter too many": _forge("adapter_model.safetensors", lambda t: t.update(x=t[_first(t)] * 1)),
    "a tensor of another shape": _forge("adapter_model.safetensors", lambda t: t.update({_first(t): t[_first(t)][:1]})),
    "an average of the optimizer missing": _forge("optimizer.safetensors", lambda t: t.pop(_first(t))),
    "an average of another shape": _forge("optimizer.safetensors", lambda t: t.update({_first(t): t[_first(t)][:1]})),
    "an average of another tensor": _forge(
        "optimizer.safetensors", lambda t: t.update({"x.exp_avg": t[_first(t)] * 1})
    ),
    "a random state of nothing": _forge("random-00000.safetensors", lambda t: t.update(cpu=t["cpu"][:5])),
    "a random state of another name": _forge("random-00000.safetensors", lambda t: t.update(gpu=t.pop("cpu"))),
    "progress with a setting missing": _forge_progress(lambda values: values.pop("loss_sum")),
    "progress with a setting too many": _forge_progress(lambda values: values.update(more=1)),
}
PROGRESS_FORGED: dict[str, Damage] = {
    "progress of another type": _forge_progress(lambda values: values.update(num_tokens="many")),
    "progress of another step": _forge_progress(lambda values: values.update(step=2)),
    "pending that is a list": _forge_progress(lambda values: values.update(pending=[1])),
}


def _forged(damage: Damage, folder: Path) -> None:
    """A checkpoint whose hashes agree and whose content does not: nothing is trained, and nothing is lost."""
    recipe = stopped_copy(folder)
    chosen = folder / "out/checkpoints/step-000007"
    damage(chosen)
    before = trainkit.files_of(folder / "out/checkpoints")
    try:
        run_recipe(recipe, *FULL)
    except StorageError as error:
        message = str(error)
    else:
        raise AssertionError("it was trained on")
    assert "step-000007" in message, message
    assert trainkit.files_of(folder / "out/checkpoints") == before, "a checkpoint was changed"
    shutil.rmtree(chosen)
    assert_same(run_recipe(recipe, *FULL).folder, whole())


def damaged() -> Sequence[Trial]:
    """Each damage of each file, those of the folder, and forged ones."""
    trials = [
        Trial(f"{name}: {kind}", partial(_damaged, name, damage))
        for name in FILES
        for kind, damage in OF_A_FILE.items()
    ]
    trials += [
        Trial(kind, partial(_damaged, "", damage)) for kind, damage in {**OF_THE_FOLDER, **PROGRESS_FORGED}.items()
    ]
    return trials + [Trial(f"forged: {kind}", partial(_forged, damage)) for kind, damage in FORGED.items()]


# --- many commands, one folder ----------------------------------------------------------------------------------------


def _race(seed: int, folder: Path) -> None:
    """Several commands start on one folder at about the same time, and one may be killed: one trains."""
    chance = random.Random(seed)
    recipe = write_recipe(folder)
    killed = chance.random() < 0.5
    children = []
    for _ in range(chance.choice((2, 2, 3))):
        children.append(Child(folder, "train", recipe, *FULL))
        time.sleep(chance.choice((0.0, 0.0, chance.uniform(0, 1.5))))
    if killed:
        time.sleep(chance.uniform(0, 1.0))
        children[0].signal(signal.SIGKILL)
    codes = [child.wait() for child in children]
    for child, code in zip(children, codes, strict=True):
        if killed and child is children[0] and code == -signal.SIGKILL:
            continue
        assert code in (0, 11), f"{code}: {child.err}"
        assert code != 11 or "another run is using this folder" in child.err, child.err
        assert "Traceback" not in child.err, child.err
    if not killed:
        assert 0 in codes, f"nobody trained: {codes}"
    assert_same(run_recipe(recipe, *FULL).folder, whole())
    trained = [attempt for attempt in read_run(folder / "out")["attempts"] if attempt.get("reason") == "complete"]
    assert len(trained) == 1, f"{len(trained)} attempts were completed"


def _takes_over(seed: int, folder: Path) -> None:
    """A holder that is killed leaves the folder to the next at once."""
    chance = random.Random(seed)
    recipe = write_recipe(folder)
    holder = Child(folder, "train", recipe, *FULL)
    holder.until(lambda: (folder / "out/.lock").exists())
    time.sleep(chance.uniform(0, 0.8))
    holder.signal(signal.SIGKILL)
    holder.wait()
    next_one = Child(folder, "train", recipe, *FULL)
    assert next_one.wait() == 0, next_one.err
    assert_same(folder / "out", whole())


def races() -> Sequence[Trial]:
    """Starts at once, and holders that are killed."""
    together = [Trial(f"several at once, seed {seed}", partial(_race, seed)) for seed in range(40)]
    return together + [Trial(f"a killed holder, seed {seed}", partial(_takes_over, seed)) for seed in range(14)]


# --- a new run in the place of an old one -----------------------------------------------------------------------------


class _KillAtRename:
    """SIGKILL before the ``count``-th rename of the take-over."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self) -> None:
        from peftcli.train.runs.folder import RunFolder

        finish = RunFolder.finish_replacing

        def watched(self_: RunFolder) -> None:
            if self_.is_replacing():
                rename, calls = Path.rename, [0]

                def counted(path: Path, target: Path) -> Path:
                    calls[0] += 1
                    if calls[0] == self.count:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return rename(path, target)

                Path.rename = counted
            finish(self_)

        RunFolder.finish_replacing = watched


def _overwritten(count: int, folder: Path) -> None:
    """Killed at a rename, the same command again ends with the new run in place and the old one aside."""
    recipe = write_recipe(folder)
    old = run_recipe(recipe).weights
    killed = Child(folder, "train", recipe, *FULL, "--overwrite", before=_KillAtRename(count))
    code = killed.wait()
    assert code in (-signal.SIGKILL, 0), killed.err
    assert code != 0 or count > 12, "the kill did not happen"
    again = Child(folder, "train", recipe, *FULL, "--overwrite")
    assert again.wait() == 0, again.err
    assert_same(folder / "out", whole())
    assert (folder / "out/previous-1/adapter_model.safetensors").read_bytes() == old, "the old run is lost"
    assert not (folder / "out/.overwrite").exists()


def overwriting() -> Sequence[Trial]:
    """A kill before each rename of the take-over."""
    return [Trial(f"--overwrite killed before rename {count}", partial(_overwritten, count)) for count in range(1, 19)]


def _all() -> Iterator[Campaign]:
    yield Campaign(
        "damaged checkpoints",
        "The damaged checkpoint is set aside and named, and the run ends byte-identical from the one before; one whose "
        "hashes were forged to agree ends the command with exit code 7, and nothing is changed.",
        damaged,
        least=60,
        sample=3,
    )
    yield Campaign(
        "lock races",
        "One command trains; the others end with exit code 11, or find the run complete; the result is byte-identical.",
        races,
        least=50,
        sample=1,
    )
    yield Campaign(
        "a new run in the place of an old one",
        "Killed at any rename, the same command again ends with the new run in place, and the old one whole beside it.",
        overwriting,
        least=15,
        sample=1,
    )


CAMPAIGNS = list(_all())
