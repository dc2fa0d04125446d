"""Every command without a network: local inputs need none, and what is on the hub is told at once, or is cached."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from campaigns import Campaign, Trial
from hub_client import Seen, peftcli
from hub_faults import ADAPTER, BASE, ROWS, hub_with
from in_process import inputs

_SOON = 1.0
"""Seconds that may be spent on finding that there is no network."""
_CHANGING = re.compile(r"\d[\d.,:e+-]*")
"""Times and speeds, and what else differs from run to run."""


def _local(name: str, output: Path) -> list[object]:
    """A command that needs nothing but this machine."""
    given = inputs()
    return {
        "train": ["train", given.recipe, f"training.output_dir={output}", "training.max_steps=2"],
        "train --dry-run": ["train", given.recipe, f"training.output_dir={output}", "--dry-run"],
        "train, complete already": ["train", given.recipe, f"training.output_dir={given.adapter}", "training.seed=1"],
        "status": ["status", given.adapter],
        "evaluate": ["evaluate", given.recipe, "--adapter", given.adapter],
        "evaluate the base": ["evaluate", given.recipe],
        "inspect": ["inspect", given.recipe],
        "inspect --json": ["inspect", given.recipe, "--json"],
        "check": ["check", given.recipe],
        "check --deep": ["check", "--deep", given.recipe],
        "generate": ["generate", given.adapter, "--prompt", "Who?", "--max-new-tokens", "4"],
        "generate a file": ["generate", given.adapter, "--input", given.prompts, "--output", output],
        "merge": ["merge", given.adapter, "--output", output],
        "info": ["info", given.adapter],
        "info methods": ["info", "methods"],
        "info tasks": ["info", "tasks"],
        "info env": ["info", "env"],
        "diff": ["diff", given.adapter, given.other],
        "combine": ["combine", f"{given.adapter}=0.5", f"{given.other}=0.5", "--output", output],
        "cache": ["cache"],
        "schema": ["schema"],
        "explain": ["explain", "method.r"],
        "push --dry-run": ["push", given.adapter, "alice/mine", "--base-model-id", BASE, "--dry-run"],
    }[name]


_LOCALS = (
    "train", "train --dry-run", "train, complete already", "status", "evaluate", "evaluate the base", "inspect",
    "inspect --json", "check", "check --deep", "generate", "generate a file", "merge", "info", "info methods",
    "info tasks", "info env", "diff", "combine", "cache", "schema", "explain", "push --dry-run",
)  # fmt: skip


def _needs_none(name: str, folder: Path) -> None:
    """The same with and without a network, and nobody is asked for or waited for."""
    with_one, without = folder / "with", folder / "without"
    online, offline = _run(name, folder, with_one, network=True), _run(name, folder, without, network=False)
    for seen in (online, offline):
        assert seen.code == 0, f"exit {seen.code}: {seen.err[-1500:]}"
        assert seen.strangers == [], f"asked {seen.strangers}"
        assert seen.waits == [], f"waited {seen.waits}"
    assert _lasting(online.out, with_one) == _lasting(offline.out, without), "another answer"
    assert _products(with_one) == _products(without), "other bytes"


def _run(name: str, folder: Path, output: Path, *, network: bool) -> Seen:
    return peftcli(folder, *_local(name, output), network=network, cache=folder / output.name / "no-cache")


def _lasting(text: str, output: Path) -> str:
    return _CHANGING.sub("#", text.replace(str(output), "OUTPUT"))


def _products(output: Path) -> dict[str, bytes]:
    """The files that a command made and others may have: no journals."""
    files = [output, *output.rglob("*")] if output.exists() else []
    kinds = (".safetensors", ".jsonl", ".jinja", ".model")
    made = [path for path in files if path.is_file() and (path.suffix in kinds or path == output)]
    return {str(path.relative_to(output)): path.read_bytes() for path in made if path.name != "metrics.jsonl"}


def _hub_command(name: str, output: Path) -> list[object]:
    """A command that needs something of the hub."""
    given = inputs()
    train = ["train", given.recipe, f"training.output_dir={output}", "training.max_steps=1"]
    rows = [f"dataset.train={ROWS.removeprefix('datasets/')}", "dataset.eval=null"]
    generate = ["generate", "--prompt", "Who?", "--max-new-tokens", "4"]
    return {
        "train, base model": [*train, f"base_model={BASE}"],
        "train, dataset": [*train, *rows],
        "inspect, dataset": ["inspect", given.recipe, *rows],
        "evaluate, adapter": ["evaluate", given.recipe, "--adapter", ADAPTER],
        "generate, base model": [*generate, given.adapter, "--base", BASE],
        "generate, adapter": [*generate, ADAPTER],
        "merge, base model": ["merge", given.adapter, "--base", BASE, "--output", output],
        "merge, adapter": ["merge", ADAPTER, "--output", output],
        "info, adapter": ["info", ADAPTER],
        "diff, adapter": ["diff", given.adapter, ADAPTER],
        "combine, adapter": ["combine", f"{ADAPTER}=1", f"{given.other}=1", "--output", output],
    }[name]


_HUB_COMMANDS = (
    "train, base model", "train, dataset", "inspect, dataset", "evaluate, adapter", "generate, base model",
    "generate, adapter", "merge, base model", "merge, adapter", "info, adapter", "diff, adapter", "combine, adapter",
)  # fmt: skip


def _is_told(name: str, folder: Path, *, network: bool, offline: bool) -> None:
    """Exit 5 at once, with the name that is missing and what to do."""
    command = _hub_command(name, folder / "output")
    seen = peftcli(folder, *command, network=network, offline=offline)
    assert seen.code == 5, f"exit {seen.code}: {seen.err[-1500:]}"
    assert seen.waits == [], f"waited {seen.waits}"
    assert seen.asking <= _SOON, f"asked {seen.strangers} for {seen.asking:.1f} s"
    missing = next(each for each in (BASE, ADAPTER, ROWS.removeprefix("datasets/")) if each in str(command))
    assert missing in seen.error, f"{missing} is not named: {seen.error}"
    assert seen.error.count("\n") >= 2, f"nothing to do is named: {seen.error}"
    assert "Traceback" not in seen.err
    assert len(seen.err.splitlines()) <= 8, f"much is told: {seen.err}"
    assert not list(folder.glob("output/**/*.safetensors")), "a product of nothing"


def _is_cached(name: str, folder: Path, *, offline: bool) -> None:
    """What was fetched once serves without a network, to the same result."""
    cache = folder / "cache"
    with hub_with(ADAPTER, BASE, ROWS) as hub:
        online = peftcli(folder, *_hub_command(name, folder / "online"), url=hub.url, cache=cache)
        assert online.code == 0, f"with the hub: exit {online.code}: {online.err[-1500:]}"
        alone = peftcli(
            folder, *_hub_command(name, folder / "alone"), url=hub.url, cache=cache, network=False, offline=offline
        )
    assert alone.code == 0, f"exit {alone.code}: {alone.err[-1500:]}"
    assert alone.waits == [], f"waited {alone.waits}"
    assert _lasting(online.out, folder / "online") == _lasting(alone.out, folder / "alone"), "another answer"
    assert _products(folder / "online") == _products(folder / "alone"), "other bytes"


def _trials() -> Sequence[Trial]:
    return [
        *(Trial(f"{name}: local inputs", functools.partial(_needs_none, name)) for name in _LOCALS),
        *(
            Trial(f"{name} of the hub: no network", functools.partial(_is_told, name, network=False, offline=False))
            for name in _HUB_COMMANDS
        ),
        *(
            Trial(f"{name} of the hub: HF_HUB_OFFLINE", functools.partial(_is_told, name, network=True, offline=True))
            for name in _HUB_COMMANDS
        ),
        *(
            Trial(f"{name} of the hub: cached", functools.partial(_is_cached, name, offline=offline))
            for name, offline in zip(_HUB_COMMANDS, [False, True] * len(_HUB_COMMANDS), strict=False)
        ),
        Trial("push: no network", _push_is_told),
    ]


def _push_is_told(folder: Path) -> None:
    seen = peftcli(folder, "push", inputs().adapter, "alice/mine", "--base-model-id", BASE, network=False)
    assert seen.code == 5, f"exit {seen.code}: {seen.err[-1500:]}"
    assert seen.waits == [], f"waited {seen.waits}"
    assert "alice/mine" in seen.error


CAMPAIGNS = [
    Campaign(
        name="offline",
        promise="With local inputs no network is asked for or missed; what is on the hub comes from the cache, or "
        "the command ends with 5 and its name within a second.",
        trials=_trials,
        least=15,
        sample=2,
    )
]
