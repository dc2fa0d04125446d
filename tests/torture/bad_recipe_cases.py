"""Recipes that are wrong, by hand: each with the key or line that its message must name, and words of the message."""

from __future__ import annotations

import codecs
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tables import cases

GOOD = """\
base_model: org/model
task: causal_lm
method: {type: lora, r: 4, target_modules: [q_proj, v_proj]}
dataset: {train: org/data, eval: org/held-out}
training:
  output_dir: out
  learning_rate: 1e-4
"""
TOKEN = "hf_" + "aB3dE6" * 6
PASSWORD = "correct-horse-battery"


@dataclass(frozen=True)
class Case:
    """A recipe that is wrong."""

    text: str | bytes
    says: str
    """Words of the message."""
    key: str | None = None
    line: int | None = None
    args: tuple[str, ...] = ()
    """Overrides on the command line of ``train``. ``check`` takes none."""
    setup: Callable[[Path], object] = lambda folder: None
    """Makes what stands beside the recipe."""
    env: dict[str, str] = field(default_factory=dict)
    secret: str | None = None
    """What no output may hold."""


def more(text: str, says: str, key: str | None = None, line: int = 8, **rest: object) -> Case:
    """The good recipe with lines after it, the first of which is wrong."""
    return Case(GOOD + text, says, key, line, **rest)


def instead(old: str, new: str, says: str, key: str | None = None, line: int | None = None, **rest: object) -> Case:
    """The good recipe with a part replaced."""
    assert GOOD.count(old) == 1, old
    return Case(GOOD.replace(old, new), says, key, line or GOOD[: GOOD.index(old)].count("\n") + 1, **rest)


def method(settings: str, says: str, key: str, **rest: object) -> Case:
    return instead(
        "{type: lora, r: 4, target_modules: [q_proj, v_proj]}", f"{{{settings}}}", says, f"method.{key}", **rest
    )


def dataset(settings: str, says: str, key: str, **rest: object) -> Case:
    key = f"dataset.{key}" if key else "dataset"
    return instead("{train: org/data, eval: org/held-out}", f"{{{settings}}}", says, key, **rest)


def base(value: str, says: str, key: str, **rest: object) -> Case:
    return instead("org/model", value, says, key, **rest)


def training(line: str, says: str, **rest: object) -> Case:
    return more(f"  {line}\n", says, f"training.{line.partition(':')[0]}", **rest)


def gate(text: str) -> Case:
    return more(f'gates: {{eval_loss: "{text}"}}\n', "expected an operator", "gates.eval_loss")


def override(text: str, says: str, key: str | None = None, **rest: object) -> Case:
    return Case(GOOD, says, key, None, (text,), **rest)


def bomb(width: int, depth: int, what: str = "[{}]") -> str:
    """Anchors of which each holds the one before several times."""
    lines = [f"a0: &a0 {what.format(', '.join(['x'] * width))}"]
    for at in range(1, depth):
        lines.append(f"a{at}: &a{at} {what.format(', '.join([f'*a{at - 1}'] * width))}")
    return "\n".join(lines) + "\n"


SYNTAX = {
    "65 levels of indentation": Case(
        "".join(" " * at + f"k{at}:\n" for at in range(70)), "nested more than 64 levels deep", line=64
    ),
    "500 unknown keys": more("".join(f"key{at}: 1\n" for at in range(500)), "unknown key", "key0"),
}

TEXT = {
    "Latin-1": Case(GOOD.encode() + b"  metric_for_best_model: caf\xe9\n", "not UTF-8 text", line=8),
    "a character that is cut": Case(GOOD.encode() + b"# \xe2\x82", "not UTF-8 text", line=8),
    "UTF-16": Case(GOOD.encode("utf-16"), "not UTF-8", line=1),
    "UTF-16 without its mark": Case(GOOD.encode("utf-16-le"), "a character that YAML does not allow (0x00)", line=1),
    "UTF-16, big end first": Case(codecs.BOM_UTF16_BE + GOOD.encode("utf-16-be"), "not UTF-8", line=1),
    "UTF-32": Case(GOOD.encode("utf-32"), "not UTF-8", line=1),
}

ANCHORS = {
    "a bomb of mappings": Case(
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 40)),
        "once its aliases are expanded",
        line=1,
    ),
    "a bomb of merge keys": Case(
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)),
        "once its aliases are expanded",
    ),
    "an alias of the wrong kind": Case(
        GOOD.replace("learning_rate: 1e-4", "learning_rate: &x 1e-4\n  seed: *x"),
        "expected an integer",
        "training.seed",
        7,
    ),
    "a deep alias": Case(
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 90)), "nested more than 64 levels deep"
    ),
}

KEYS = {
    "no training": Case(GOOD.partition("training:")[0], "is required", "training", 1),
}

KINDS = {
    "a method's bare name, to go on from an adapter": Case(
        GOOD.replace("{type: lora, r: 4, target_modules: [q_proj, v_proj]}", "lora") + "  init_adapter_from: x\n",
        "did you mean '{type: lora}'?",
        "method",
        3,
    ),
    "a method without a type, to go on from an adapter": Case(
        GOOD.replace("type: lora, ", "") + "  init_adapter_from: x\n", "is required", "method.type", 3
    ),
}


TOGETHER = {
    "packing for an encoder-decoder": Case(
        GOOD.replace("causal_lm", "seq2seq_lm").replace("eval:", "packing: true, eval:"),
        "cannot pack examples",
        "dataset.packing",
        4,
    ),
    "pieces for an encoder-decoder": Case(
        GOOD.replace("causal_lm", "seq2seq_lm").replace("eval:", "overlong: split, eval:"),
        "cannot split examples",
        "dataset.overlong",
        4,
    ),
    "packing by length": Case(
        GOOD.replace("eval:", "packing: true, eval:") + "  train_sampling_strategy: group_by_length\n",
        "has no effect with dataset.packing",
        "training.train_sampling_strategy",
        8,
    ),
    "the best without data": Case(
        GOOD.replace(", eval: org/held-out", "") + "  load_best_model_at_end: true\n",
        "needs evaluation data",
        "training.load_best_model_at_end",
        8,
    ),
    "a gate without data": Case(
        GOOD.replace(", eval: org/held-out", "") + "gates: {eval_loss: '<= 1'}\n",
        "needs evaluation data",
        "gates.eval_loss",
        8,
    ),
}


def _chain(length: int) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        for at in range(length):
            (folder / f"r{at}.yaml").write_text(f"extends: r{at + 1}.yaml\n")

    return make


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _socket(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("other.yaml")
    os.chdir(here)


OTHER = "extends: other.yaml\n"
EXTENDS = {
    "itself, by a link": Case(
        OTHER, "extends itself", "extends", 1, setup=lambda f: (f / "other.yaml").symlink_to("recipe.yaml")
    ),
    "a pipe": Case(OTHER, "not a regular file", "", 1, setup=lambda folder: os.mkfifo(folder / "other.yaml")),
    "a socket": Case(OTHER, "not a regular file", "", 1, setup=_socket),
    "a link to nowhere": Case(OTHER, "no such file", "", 1, setup=lambda f: (f / "other.yaml").symlink_to("gone")),
    "a link to itself": Case(
        OTHER, "cannot be read", "", 1, setup=lambda f: (f / "other.yaml").symlink_to("other.yaml")
    ),
}

URLS = {
    f"{what}: {url[:12]}": case
    for url in (
        "https://host/x.jsonl",
        "http://127.0.0.1:9/x",
        "ftp://host/x",
        "file:///etc/passwd",
        "s3://bucket/x",
        "hf://a/b",
        "data://x",
        "gs://b/c.csv",
    )
    for what, case in {
        "model": base(url, "not a URL", "base_model.name"),
        "data": instead("org/data", url, "not a URL", "dataset.train"),
        "evaluation": instead("org/held-out", url, "not a URL", "dataset.eval"),
    }.items()
}


def _file(name: str, kind: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: kind(folder / name)


PATHS = {}

CLASSES: dict[str, dict[str, Case]] = cases(
    "bad_recipes",
    globals(),
    syntax=SYNTAX,
    text=TEXT,
    anchors=ANCHORS,
    keys=KEYS,
    kinds=KINDS,
    together=TOGETHER,
    extends=EXTENDS,
    urls=URLS,
    paths=PATHS,
)
