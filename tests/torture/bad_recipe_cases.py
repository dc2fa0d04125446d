"""Recipes that are wrong, by hand: each with the key or line that its message must name, and words of the message."""

from __future__ import annotations

import codecs
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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


def override(text: str, says: str, key: str | None = None, **rest: object) -> Case:
    return Case(GOOD, says, key, None, (text,), **rest)


def bomb(width: int, depth: int, what: str = "[{}]") -> str:
    """Anchors of which each holds the one before several times."""
    lines = [f"a0: &a0 {what.format(', '.join(['x'] * width))}"]
    for at in range(1, depth):
        lines.append(f"a{at}: &a{at} {what.format(', '.join([f'*a{at - 1}'] * width))}")
    return "\n".join(lines) + "\n"


SYNTAX = {
    "nothing": Case("", "the recipe is empty", line=1),
    "white space": Case("\n  \n\n", "the recipe is empty", line=1),
    "a comment alone": Case("# to be written\n", "the recipe is empty", line=1),
    "a mark of a document alone": Case("---\n", "the recipe is empty", line=1),
    "null": Case("null\n", "the recipe is empty", line=1),
    "a list": Case("- base_model: org/model\n", "expected a mapping of sections, found a list", line=1),
    "a word": Case("hello\n", "expected a mapping of sections, found 'hello'", line=1),
    "a number": Case("42\n", "expected a mapping of sections, found 42", line=1),
    "a quoted text": Case("'base_model: x'\n", "expected a mapping of sections, found 'base_model: x'", line=1),
    "a text of many lines": Case("|\n  base_model: x\n", "expected a mapping of sections, found", line=1),
    "JSON with a comma too many": Case('{"base_model": "x",, "task": "y"}', "not valid YAML", line=1),
    "JSON that is cut": Case('{"base_model": "x"', "a [ or { that is never closed", line=1),
    "TOML": Case('base_model = "org/model"\n[training]\nseed = 1\n', "found 'base_model =", line=1),
    "INI": Case("[training]\nseed=1\n", "not valid YAML", line=2),
    "XML": Case("<recipe><seed>1</seed></recipe>\n", "expected a mapping of sections, found '<recipe>", line=1),
    "Python": Case("import peftcli\nrecipe = dict(seed=1)\n", "expected a mapping of sections, found 'import", line=1),
    "a shebang and JSON": Case("#!/usr/bin/env peftcli\n[1]\n", "found a list", line=2),
    "two documents": Case(GOOD + "---\n" + GOOD, "a second YAML document", line=8),
    "a document that ends, and goes on": Case(GOOD + "...\n---\nseed: 1\n", "a second YAML document", line=9),
    "an empty document first": Case("---\n---\n" + GOOD, "a second YAML document", line=2),
    "a tab before a key": more("\tseed: 1\n", "a tab"),
    "a tab after spaces": more("  \tseed: 1\n", "not valid YAML"),
    "two colons": more("  seed: 1: 2\n", "a second ': '"),
    "an unquoted name with a colon": instead("output_dir: out", "output_dir: C: out", "a second ': '"),
    "one space too many": more("   seed: 1\n", "not valid YAML"),
    "one space too few": more(" seed: 1\n", "does not fit the indentation"),
    "a key without a colon": more("  seed 1\n  max_steps: 1\n", "not valid YAML", line=9),
    "a value without a key": more("  - 1\n", "not valid YAML"),
    "a quote that is not closed": more("  metric_for_best_model: 'x\n", "a quote that is never closed", line=9),
    "a double quote that is not closed": more('  metric_for_best_model: "x\n', "a quote that is never closed", line=9),
    "text after a quote": more("  metric_for_best_model: 'x' y\n", "not valid YAML"),
    "a bracket that is not closed": more("gates: {a: '> 1'\n", "never closed", line=9),
    "a bracket too many": more("gates: {}}\n", "not valid YAML"),
    "mixed brackets": more("gates: [a}\n", "not valid YAML"),
    "an unknown escape": more('  metric_for_best_model: "\\q"\n', "not valid YAML"),
    "an escape that is cut": more('  metric_for_best_model: "\\x1"\n', "not valid YAML"),
    "an escape beyond Unicode": more('  metric_for_best_model: "\\UFFFFFFFF"\n', "not valid YAML"),
    "an at sign": more("  metric_for_best_model: @x\n", "cannot start with this character"),
    "a back quote": more("  metric_for_best_model: `x`\n", "cannot start with this character"),
    "a percent sign": more("  metric_for_best_model: %x\n", "cannot start with this character"),
    "a star that is no alias": more("  metric_for_best_model: **\n", "not valid YAML"),
    "an ampersand alone": more("  metric_for_best_model: & x\n", "not valid YAML"),
    "a block that says how deep it is": more("  metric_for_best_model: |11\n    x\n", "not valid YAML"),
    "a directive": Case("%YAML 9.9\n---\n" + GOOD, "not valid YAML", line=1),
    "a directive twice": Case("%YAML 1.1\n%YAML 1.1\n---\n" + GOOD, "not valid YAML", line=2),
    "a directive that is none": Case("%TAG !\n---\n" + GOOD, "not valid YAML", line=1),
    "a comma for a key": more(", : 1\n", "not valid YAML"),
    "a question mark alone": more("? \n", "a key must be a name"),
    "a list for a key": more("? [a]\n: 1\n", "a key must be a name, not a list or a mapping"),
    "a mapping for a key": more("? {a: 1}\n: 1\n", "a key must be a name, not a list or a mapping"),
    "a number for a key": more("1: x\n", "a key must be a name, found 1"),
    "true for a key": more("true: x\n", "a key must be a name, found true"),
    "null for a key": more("~: x\n", "a key must be a name, found ~"),
    "nothing for a key": Case(": x\n", "not valid YAML", line=1),
    "a list in braces": more("gates: {[a]: 1}\n", "a key must be a name", "gates"),
    "a megabyte of brackets": Case("[" * 999_000, "nested more than 64 levels deep", line=1),
    "a megabyte of braces": Case("{a: " * 249_000, "nested more than 64 levels deep", line=1),
    "a megabyte of dashes": Case("- " * 499_000, "nested more than 64 levels deep", line=1),
    "65 levels": more("gates: " + "[" * 65 + "]" * 65 + "\n", "nested more than 64 levels deep"),
    "65 levels of indentation": Case(
        "".join(" " * at + f"k{at}:\n" for at in range(70)), "nested more than 64 levels deep", line=64
    ),
    "a million question marks": Case("?" * 999_999, "expected a mapping of sections, found", line=1),
    "a hundred thousand question marks": Case("? " * 100_000, "nested more than 64 levels deep", line=1),
    "more than a megabyte": Case(GOOD + "#" * 1_000_000, "at most 1,000,000 are read"),
    "more than 20,000 values": more("gates: [" + "a," * 25_000 + "]\n", "more than 20000 values"),
    "a very long key": more("x" * 5000 + ": 1\n", "not valid YAML"),
    "a very long key in quotes": more('"' + "x" * 900 + '": 1\n', "unknown key"),
    "a line of a megabyte": Case("x" * 999_999, "expected a mapping of sections, found", line=1),
    "a megabyte of quotes": Case('"' * 999_999, "not valid YAML", line=1),
    "a megabyte of ampersands": Case("&a " * 300_000, "not valid YAML", line=1),
    "a megabyte of exclamation marks": Case("! " * 400_000, "not valid YAML", line=1),
    "500 unknown keys": more("".join(f"key{at}: 1\n" for at in range(500)), "unknown key", "key0"),
}

TEXT = {
    "Latin-1": Case(GOOD.encode() + b"  metric_for_best_model: caf\xe9\n", "not UTF-8 text", line=8),
    "a byte that no UTF-8 holds": Case(b"base_model: \xff\n", "not UTF-8 text", line=1),
    "a character that is cut": Case(GOOD.encode() + b"# \xe2\x82", "not UTF-8 text", line=8),
    "a slash in two bytes": Case(b"base_model: org\xc0\xafmodel\n", "not UTF-8 text", line=1),
    "a surrogate as UTF-8": Case(b"base_model: \xed\xa0\x80\n", "not UTF-8 text", line=1),
    "UTF-16": Case(GOOD.encode("utf-16"), "not UTF-8", line=1),
    "UTF-16 without its mark": Case(GOOD.encode("utf-16-le"), "a character that YAML does not allow (0x00)", line=1),
    "UTF-16, big end first": Case(codecs.BOM_UTF16_BE + GOOD.encode("utf-16-be"), "not UTF-8", line=1),
    "UTF-32": Case(GOOD.encode("utf-32"), "not UTF-8", line=1),
    "gzip": Case(b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xff\xff", "not UTF-8", line=1),
    "a byte order mark alone": Case(codecs.BOM_UTF8, "the recipe is empty", line=1),
    "a byte order mark in the middle": Case(GOOD + "\ufefftask: x\n", "", line=8),
    "a NUL": more("  seed: \0\n", "a character that YAML does not allow (0x00)"),
    "NULs alone": Case("\0" * 100, "a character that YAML does not allow (0x00)", line=1),
    "a bell": more("  seed: \a\n", "a character that YAML does not allow (0x07)"),
    "an escape": more("  seed: \x1b[31m1\n", "a character that YAML does not allow (0x1b)"),
    "a backspace": more("  seed: 1\b2\n", "a character that YAML does not allow (0x08)"),
    "a delete": more("  seed: 1\x7f\n", "a character that YAML does not allow (0x7f)"),
    "a control character of Latin-1": more("  seed: \x9b31m\n", "a character that YAML does not allow (0x9b)"),
    "a non-character": more("  metric_for_best_model: \uffff\n", "a character that YAML does not allow (0xffff)"),
    "NUL by an escape": more('  metric_for_best_model: "\\0"\n', "that is not text", "training.metric_for_best_model"),
    "half a surrogate pair": more(
        '  metric_for_best_model: "\\ud800"\n', "that is not text", "training.metric_for_best_model"
    ),
    "half a surrogate pair in a key": more('"\\ud800": 1\n', "that is not text"),
    "half a surrogate pair in a gate's name": more('gates: {"\\ud800": "> 1"}\n', "that is not text"),
    "NUL in a key": more('"\\0": 1\n', "that is not text"),
    "NUL in a column's name": dataset('train: a/b, columns: {"prompt\\0": a}', "that is not text", "columns.prompt\0"),
    "a key that moves the cursor": more('"\\e[2J\\e]0;x\\a": 1\n', "unknown key"),
    "a key that is written backwards": more('"\\u202eseed": 1\n', "unknown key"),
    "a value that moves the cursor": instead("causal_lm", '"\\e[2J\\n\\rx"', "unknown task", "task"),
    "a line separator in a value": instead("causal_lm", '"causal\\u2028lm"', "unknown task", "task"),
    "a no-break space for an indent": more("\u00a0 seed: 1\n", "", line=8),
    "full-width letters": more("\uff53\uff45\uff45\uff44: 1\n", "unknown key"),
    "a letter that looks like another": more("  s\u0435ed: 1\n", "unknown key"),
}

TAGS = {
    "a function": more("  seed: !!python/object/apply:os.system ['id']\n", "has a YAML tag", "training.seed"),
    "an object": more("  seed: !!python/object/new:os.system [id]\n", "has a YAML tag", "training.seed"),
    "a name": more("  seed: !!python/name:os.system\n", "has a YAML tag", "training.seed"),
    "a module": more("  seed: !!python/module:os\n", "has a YAML tag", "training.seed"),
    "a tuple": more("gates: !!python/tuple [a]\n", "has a YAML tag", "gates"),
    "binary": more("  metric_for_best_model: !!binary aGVsbG8=\n", "has a YAML tag", "training.metric_for_best_model"),
    "a set": more("gates: !!set {a, b}\n", "has a YAML tag", "gates"),
    "an ordered map": more("gates: !!omap [a: 1]\n", "has a YAML tag", "gates"),
    "pairs": more("gates: !!pairs [a: 1]\n", "has a YAML tag", "gates"),
    "a date": more("  seed: !!timestamp 2024-01-01\n", "has a YAML tag", "training.seed"),
    "one of their own": more("  seed: !mine 3\n", "has a YAML tag", "training.seed"),
    "in full": more("  seed: !<tag:yaml.org,2002:python/none> 1\n", "has a YAML tag", "training.seed"),
    "for the whole recipe": Case("!!python/object:os.x\n" + GOOD, "has a YAML tag", line=1),
    "for a key": more("!!python/name:os.system x: 1\n", "has a YAML tag"),
    "with a handle that nobody made": more("  seed: !x!y 1\n", "not valid YAML"),
    "a tag that is cut": more("  seed: !<tag\n", "not valid YAML", line=8),
    "a merge key of a number": more("  <<: 5\n", "<< takes a mapping"),
    "a merge key of text": more("  <<: abc\n", "<< takes a mapping"),
    "a merge key of a list of text": more("  <<: [a, b]\n", "<< takes a mapping"),
    "a merge key of nothing": more("  <<:\n", "<< takes a mapping"),
    "a merge key of what is unknown": more("  <<: {sede: 1}\n", "unknown key", "training.sede"),
    "a merge key twice": more("  <<: {seed: 1}\n  <<: {seed: 2}\n", "given twice", "training.<<", line=9),
}

TWICE = {
    "a section": more("task: seq2seq_lm\n", "given twice; first in line 2", "task"),
    "a setting": more("  learning_rate: 2e-4\n", "given twice; first in line 7", "training.learning_rate"),
    "a setting with the same value": more("  learning_rate: 1e-4\n", "given twice", "training.learning_rate"),
    "in braces": method("type: lora, r: 4, r: 8", "given twice; first in line 3", "r"),
    "once in quotes": more('"task": causal_lm\n', "given twice; first in line 2", "task"),
    "once by an escape": more('"\\x74ask": causal_lm\n', "given twice; first in line 2", "task"),
    "a whole section": more("training:\n  output_dir: x\n", "given twice; first in line 5", "training"),
    "a gate": more("gates: {a: '> 1', a: '> 2'}\n", "given twice", "gates.a"),
    "a thousand times": more("task: x\n" * 1000, "given twice", "task"),
    "a column": dataset("train: a/b, columns: {prompt: a, prompt: b}", "given twice", "columns.prompt"),
    "extends": Case("extends: a.yaml\nextends: b.yaml\n", "given twice; first in line 1", "extends", 2),
}

ANCHORS = {
    "a bomb": Case(bomb(9, 12), "once its aliases are expanded", line=1),
    "a bomb of mappings": Case(
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 40)),
        "once its aliases are expanded",
        line=1,
    ),
    "a wide bomb": Case("a: &a [" + "x, " * 5000 + "]\nb: [" + "*a, " * 5000 + "]\n", "once its aliases are expanded"),
    "a bomb of merge keys": Case(
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)),
        "once its aliases are expanded",
    ),
    "a list within itself": Case("a: &a [*a]\n", "within itself", line=1),
    "a mapping within itself": Case("a: &a {b: *a}\n", "within itself", line=1),
    "two that hold each other": Case("a: &a [&b [*a]]\nb: *b\n", "within itself"),
    "a merge key of itself": Case("training: &t\n  <<: *t\n", "within itself"),
    "the whole recipe": Case("&r\nbase_model: *r\n", "within itself"),
    "an alias of nothing": more("  seed: *none\n", "an alias whose anchor is not defined above it"),
    "an alias before its anchor": Case("a: *x\nb: &x 1\n", "an alias whose anchor is not defined above it", line=1),
    "an alias of an alias": more("  seed: &x *y\n", "not valid YAML"),
    "an anchor that is made twice": more(
        "  seed: &x 1\n  max_steps: &x 2\n", "an anchor that is defined twice", line=9
    ),
    "two anchors of one value": more("  seed: &x &y 1\n", "not valid YAML"),
    "an alias for a key": more("*x : 1\n", "an alias whose anchor is not defined above it"),
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
    # other tools' spellings
    "model_name_or_path": more("model_name_or_path: x/y\n", "did you mean 'base_model'?", "model_name_or_path"),
    "lora_r": method("type: lora, lora_r: 8", "did you mean 'r'?", "lora_r"),
    "lora_rank at the top": more("lora_rank: 8\n", "did you mean 'method.r'?", "lora_rank"),
    "adapter": more("adapter: lora\n", "did you mean 'method.type'?", "adapter"),
    "load_in_4bit": more("load_in_4bit: true\n", "did you mean 'base_model.quantization'?", "load_in_4bit"),
    "sequence_len": more("sequence_len: 512\n", "did you mean 'dataset.max_length'?", "sequence_len"),
    "cutoff_len": dataset("train: a/b, cutoff_len: 512", "did you mean 'max_length'?", "cutoff_len"),
    "micro_batch_size": training("micro_batch_size: 2", "did you mean 'per_device_train_batch_size'?"),
    "evaluation_strategy": training("evaluation_strategy: epoch", "did you mean 'eval_strategy'?"),
    "datasets": more("datasets: [{path: x}]\n", "did you mean 'dataset.mix'?", "datasets"),
    "val_set_size": more("val_set_size: 0.1\n", "did you mean 'dataset.eval_fraction'?", "val_set_size"),
    "gradient_clipping": training("gradient_clipping: 1.0", "did you mean 'max_grad_norm'?"),
    "lr": training("lr: 3e-4", "did you mean 'learning_rate'?"),
    "num-epochs": training("num-epochs: 3", "did you mean 'num_train_epochs'?"),
    "Learning_Rate": training("Learning_Rate: 3e-4", "did you mean 'learning_rate'?"),
    # typing errors
    "a letter too few": training("sed: 3", "did you mean 'seed'?"),
    "two letters exchanged": training("sede: 3", "did you mean 'seed'?"),
    "a section misspelt": more("trainig: {}\n", "did you mean 'training'?", "trainig"),
    "a capital": instead("task: causal_lm", "Task: causal_lm", "did you mean 'task'?", "Task"),
    "a method's setting misspelt": method("type: lora, lora_aplha: 8", "did you mean 'lora_alpha'?", "lora_aplha"),
    "a name with a dot": more("training.seed: 3\n", "unknown key", "training.seed"),
    "a name with a space": more("learning rate: 3\n", "unknown key", "learning rate"),
    "an empty name": more('"": 3\n', "unknown key"),
    "a name that nobody knows": more("zzzzzz: 3\n", "unknown key", "zzzzzz"),
    "a Python name": more("__class__: 3\n", "unknown key", "__class__"),
    # in another section
    "learning_rate at the top": more("learning_rate: 3\n", "belongs in the section training", "learning_rate"),
    "max_length in training": training("max_length: 512", "belongs in the section dataset"),
    "output_dir in the dataset": dataset("train: a/b, output_dir: x", "belongs in the section training", "output_dir"),
    "num_processes in training": training("num_processes: 2", "belongs in the section launch"),
    "gates in training": training("gates: {}", "belongs at the top level"),
    "r in training": training("r: 8", "belongs in the section method"),
    "target_modules of prompt tuning": method(
        "type: prompt_tuning, target_modules: [a]", "not a setting of", "target_modules"
    ),
    "num_virtual_tokens of LoRA": method(
        "type: lora, num_virtual_tokens: 3", "not a setting of lora", "num_virtual_tokens"
    ),
    "inference_mode, which says nothing of a run": method(
        "type: lora, inference_mode: true", "unknown key", "inference_mode"
    ),
    # what is missing
    "no base model": instead("base_model: org/model\n", "", "is required", "base_model"),
    "no method": instead(
        "method: {type: lora, r: 4, target_modules: [q_proj, v_proj]}\n", "", "is required", "method", line=1
    ),
    "no dataset": instead("dataset: {train: org/data, eval: org/held-out}\n", "", "is required", "dataset", line=1),
    "no training": Case(GOOD.partition("training:")[0], "is required", "training", 1),
    "no output_dir": instead("  output_dir: out\n", "", "is required", "training.output_dir", line=5),
    "no training data": dataset("eval: a/b", "is required, unless dataset.mix", "train"),
    "no type of method": method("r: 4", "is required", "type"),
    "an empty base model": base("{}", "is required", "base_model.name"),
    "an empty method": method("", "is required", "type"),
    "a section of nothing": more("launch:\ntraining:\n", "given twice", "training", line=9),
}

KINDS = {
    "a list for a section": instead("{train: org/data, eval: org/held-out}", "[a]", "expected a mapping", "dataset"),
    "a number for a section": more("launch: 3\n", "expected a mapping of settings, found 3", "launch"),
    "text for a section": more("launch: two\n", "expected a mapping of settings, found 'two'", "launch"),
    "a method's bare name": instead(
        "{type: lora, r: 4, target_modules: [q_proj, v_proj]}", "lora", "did you mean '{type: lora}'?", "method"
    ),
    "a method's bare name, to go on from an adapter": Case(
        GOOD.replace("{type: lora, r: 4, target_modules: [q_proj, v_proj]}", "lora") + "  init_adapter_from: x\n",
        "did you mean '{type: lora}'?",
        "method",
        3,
    ),
    "a method without a type, to go on from an adapter": Case(
        GOOD.replace("type: lora, ", "") + "  init_adapter_from: x\n", "is required", "method.type", 3
    ),
    "a dataset's bare name": instead(
        "{train: org/data, eval: org/held-out}", "org/data", "did you mean '{train: org/data}'?", "dataset"
    ),
    "a mapping for a name": base("{name: {a: b}}", "expected a string, found a mapping", "base_model.name"),
    "a list for the base model": base("[a]", "expected a mapping of settings, found a list", "base_model"),
    "null for the base model": base("null", "is required", "base_model"),
    "a number for a number in quotes": training(
        "seed: '3'", "expected an integer, found '3' in quotes; remove the quotes"
    ),
    "a fraction for an integer": training("seed: 1.5", "expected an integer, found 1.5"),
    "a whole fraction for an integer": training("max_steps: 10.0", "did you mean '10'?"),
    "an exponent for an integer": training("max_steps: 1e3", "did you mean '1000'?"),
    "true for an integer": training("seed: true", "expected an integer, found true"),
    "yes for an integer": training("seed: yes", "expected an integer, found 'yes'"),
    "nothing for an integer": training("seed:", "expected an integer, found nothing"),
    "a list for an integer": training("seed: [1]", "expected an integer, found a list"),
    "a mapping for an integer": training("seed: {a: 1}", "expected an integer, found a mapping"),
    "a date for an integer": training("seed: 2024-01-01", "expected an integer, found '2024-01-01'"),
    "a time for an integer": training("seed: 12:30:00", "expected an integer, found '12:30:00'"),
    "an octal number of old": training("seed: 0123", "expected an integer, found '0123'"),
    "an integer with commas": training("max_steps: '1,000'", "expected an integer, found '1,000'"),
    "an integer with a unit": training("max_steps: 1000 steps", "expected an integer, found '1000 steps'"),
    "an integer of 20 digits": training("seed: 99999999999999999999", "which is too large"),
    "an integer of 1000 digits": training(f"seed: {'9' * 1000}", "expected an integer, found '9999"),
    "a hexadecimal number of 40 digits": training(f"seed: 0x{'f' * 40}", "which is too large"),
    "text for a number": training("weight_decay: some", "expected a number, found 'some'"),
    "true for a number": training("weight_decay: true", "expected a number, found true"),
    "NaN": training("weight_decay: .nan", "expected a number, found .nan, which is not finite"),
    "infinity": training("weight_decay: .inf", "expected a number, found .inf, which is not finite"),
    "negative infinity": training("weight_decay: -.INF", "which is not finite"),
    "1e999": training("weight_decay: 1e999", "which is not finite"),
    "nan as Python writes it": training("weight_decay: nan", "expected a number, found 'nan'"),
    "inf as Python writes it": training("weight_decay: inf", "expected a number, found 'inf'"),
    "a percentage": training("warmup_ratio: 10%", "expected a number, found '10%'"),
    "a fraction by a slash": training("warmup_ratio: 1/10", "expected a number, found '1/10'"),
    "a comma for a point": training("warmup_ratio: 0,1", "expected a number, found '0,1'"),
    "1 for true": training("eval_on_start: 1", "expected true or false, found 1"),
    "0 for false": training("eval_on_start: 0", "expected true or false, found 0"),
    "true in quotes": training("eval_on_start: 'true'", "expected true or false, found 'true'"),
    "y for true": training("eval_on_start: y", "expected true or false, found 'y'"),
    "nothing for true": training("eval_on_start:", "expected true or false, found nothing"),
    "another word for auto": training("bf16: sometimes", "expected true, false or auto, found 'sometimes'"),
    "a choice that is none": training("lr_scheduler_type: cosin", "did you mean 'cosine'?"),
    "a choice of another tool": base("{name: a/b, dtype: fp16}", "did you mean 'float16'?", "base_model.dtype"),
    "a list for a choice": training("eval_strategy: [epoch]", "expected no, steps or epoch, found a list"),
    "a number for a choice": training("eval_strategy: 3", "expected no, steps or epoch, found 3"),
    "a number among names": method(
        "type: lora, target_modules: [q, 1.5, true]", "expected a string, found true", "target_modules[2]"
    ),
    "null among names": method("type: lora, target_modules: [q, null]", "expected a string", "target_modules[1]"),
    "a list among names": method("type: lora, target_modules: [[q]]", "expected a string", "target_modules[0]"),
    "a mapping for a list": method(
        "type: lora, target_modules: {q: 1}", "expected a list of strings", "target_modules"
    ),
    "a list for a mapping": method("type: lora, rank_pattern: [q]", "expected a mapping of names", "rank_pattern"),
    "text in a mapping of numbers": method(
        "type: lora, rank_pattern: {q: big}", "expected an integer", "rank_pattern.q"
    ),
    "a mapping in a mapping": method("type: lora, rank_pattern: {q: {v: 1}}", "expected an integer", "rank_pattern.q"),
    "columns as a list": dataset("train: a/b, columns: [prompt]", "expected a mapping of names", "columns"),
    "a mapping for a column": dataset("train: a/b, columns: {prompt: {x: y}}", "expected a", "columns.prompt"),
    "a mapping of gates as a list": more("gates: ['eval_loss <= 1']\n", "expected a mapping of names", "gates"),
    "a number for a gate": more("gates: {eval_loss: [1]}\n", "expected a string", "gates.eval_loss"),
    "text for new tokens": base("{name: a/b, new_tokens: <x>}", "did you mean '[<x>]'?", "base_model.new_tokens"),
    "a number for the number of processes": more("launch: {num_processes: two}\n", "expected", "launch.num_processes"),
    "a mix that is a mapping": dataset("mix: {train: a.jsonl}", "expected a list of mappings", "mix"),
    "a mix that is text": dataset("mix: a.jsonl", "expected a list of mappings", "mix"),
    "a mix of nothing": dataset("mix: [null]", "", "mix[0]"),
    "a mix of lists": dataset("mix: [[a]]", "expected a mapping of settings, found a list", "mix[0]"),
    "a mix without names": dataset("mix: [{weight: 1}]", "is required", "mix[0].train"),
    "an unknown key in a mix": dataset("mix: [{train: a/b, wieght: 1}]", "did you mean 'weight'?", "mix[0].wieght"),
    "a quantization that is none": base(
        "{name: a/b, quantization: nf5}", "did you mean 'nf4'?", "base_model.quantization"
    ),
    "a quantization of a list": base("{name: a/b, quantization: [nf4]}", "expected", "base_model.quantization"),
    "a quantization without a type": base(
        "{name: a/b, quantization: {double_quant: true}}", "is required", "base_model.quantization.type"
    ),
    "an unknown key of a quantization": base(
        "{name: a/b, quantization: {type: nf4, bits: 4}}", "unknown key", "base_model.quantization.bits"
    ),
}

RANGES = {
    line: training(line, says)
    for line, says in {
        "num_train_epochs: 0": "must be above 0",
        "num_train_epochs: -3": "must be above 0",
        "max_steps: 0": "must be at least 1, or -1",
        "max_steps: -2": "must be at least 1, or -1",
        "per_device_train_batch_size: 0": "must be at least 1, not 0",
        "per_device_train_batch_size: -8": "must be at least 1, not -8",
        "per_device_eval_batch_size: 0": "must be at least 1, not 0",
        "gradient_accumulation_steps: 0": "must be at least 1, not 0",
        "gradient_accumulation_steps: -1": "must be at least 1, not -1",
        "loraplus_lr_ratio: 0": "must be above 0",
        "loraplus_lr_ratio: -16": "must be above 0",
        "loraplus_lr_embedding: -1e-6": "must not be negative",
        "warmup_ratio: -0.1": "must not be negative",
        "warmup_ratio: 1.5": "must be at most 1",
        "warmup_steps: -5": "must not be negative",
        "weight_decay: -0.01": "must not be negative",
        "adam_beta1: 1": "must be below 1",
        "adam_beta1: -0.1": "must not be negative",
        "adam_beta2: 1.0": "must be below 1",
        "adam_beta2: 2": "must be below 1",
        "adam_epsilon: 0": "must be above 0",
        "adam_epsilon: -1e-8": "must be above 0",
        "max_grad_norm: -1": "must not be negative",
        "seed: -1": "must not be negative",
        "seed: 4294967296": "must be at most 4,294,967,295",
        "eval_steps: 0": "must be at least 1",
        "save_steps: 0": "must be at least 1",
        "save_total_limit: 1": "must be at least 2",
        "save_total_limit: 0": "must be at least 2",
        "logging_steps: 0": "must be at least 1",
        "logging_steps: -10": "must be at least 1",
        "max_time: soon": "expected days, hours, minutes and seconds",
        "max_time: 0s": "expected days, hours, minutes and seconds",
        "max_time: -3h": "expected days, hours, minutes and seconds",
        "max_time: 3 weeks": "expected days, hours, minutes and seconds",
        "metric_for_best_model: ''": "is empty",
        "weight_decay: 1e300": "float32",
        "adam_epsilon: 1e39": "float32",
        "per_device_train_batch_size: 9223372036854775807": "must be at most",
        "per_device_eval_batch_size: 1000000000": "must be at most",
        "gradient_accumulation_steps: 1000000000": "must be at most",
        "loraplus_lr_ratio: 1e30": "must be at most",
        "loraplus_lr_embedding: 1e30": "must be at most",
    }.items()
} | {
    "learning_rate: -1e-4": instead("1e-4", "-1e-4", "must not be negative", "training.learning_rate"),
    "learning_rate: 1e300": instead("1e-4", "1e300", "must be at most", "training.learning_rate"),
    "learning_rate: 3e38": instead("1e-4", "3e38", "must be at most", "training.learning_rate"),
    "a batch of ten million million": training(
        "per_device_train_batch_size: 1000000\n  gradient_accumulation_steps: 1000000",
        "make a batch of 1,000,000,000,000 examples",
    ),
    "num_processes: 1000000000": more(
        "launch: {num_processes: 1000000000}\n", "must be at most", "launch.num_processes"
    ),
    "num_machines: 1000000000": more(
        "launch: {num_machines: 1000000000, main_process_port: 1}\n", "must be at most", "launch.num_machines"
    ),
    "max_length: 0": dataset("train: a/b, max_length: 0", "must be at least 1, not 0", "max_length"),
    "max_length: -1": dataset("train: a/b, max_length: -1", "must be at least 1, not -1", "max_length"),
    "limit: 0": dataset("train: a/b, limit: 0", "must be at least 1, not 0", "limit"),
    "eval_fraction: 0": dataset("train: a/b, eval_fraction: 0", "must be above 0", "eval_fraction"),
    "eval_fraction: 1": dataset("train: a/b, eval_fraction: 1", "must be below 1", "eval_fraction"),
    "eval_fraction: 20": dataset("train: a/b, eval_fraction: 20", "must be below 1", "eval_fraction"),
    "num_processes: 0": more("launch: {num_processes: 0}\n", "must be at least 1", "launch.num_processes"),
    "num_machines: 0": more("launch: {num_machines: 0}\n", "must be at least 1", "launch.num_machines"),
    "machine_rank: -1": more("launch: {machine_rank: -1}\n", "must not be negative", "launch.machine_rank"),
    "machine_rank: 1 of 1": more(
        "launch: {machine_rank: 1}\n", "must be below launch.num_machines", "launch.machine_rank"
    ),
    "main_process_port: 0": more("launch: {main_process_port: 0}\n", "must be at least 1", "launch.main_process_port"),
    "main_process_port: 65536": more(
        "launch: {main_process_port: 65536}\n", "must be at most 65,535", "launch.main_process_port"
    ),
    "group_size: 0": base(
        "{name: a/b, quantization: {type: int4_weight_only, group_size: 0}}",
        "must be at least 1",
        "base_model.quantization.group_size",
    ),
    "weight: 0": dataset("mix: [{train: a/b, weight: 0}]", "must be above 0", "mix[0].weight"),
    "weight: -1": dataset("mix: [{train: a/b, weight: -1}]", "must be above 0", "mix[0].weight"),
}

METHOD = {
    "a method that is none": method("type: lorra", "unknown method: 'lorra'", "type"),
    "a method in capitals": method("type: LORA", "did you mean 'lora'?", "type"),
    "a list of methods": method("type: [lora, dora]", "expected a string, found a list", "type"),
    "r: 0": method("type: lora, r: 0", "must be", "r"),
    "r: -4": method("type: lora, r: -4", "must be", "r"),
    "r: all": method("type: lora, r: all", "expected an integer", "r"),
    "a dropout of 1": method("type: lora, lora_dropout: 1", "must be", "lora_dropout"),
    "a dropout of 50": method("type: lora, lora_dropout: 50", "must be", "lora_dropout"),
    "a negative dropout": method("type: lora, lora_dropout: -0.1", "must be", "lora_dropout"),
    "a bias that is none": method("type: lora, bias: some", "expected none, all or lora_only", "bias"),
    "no target module": method("type: lora, target_modules: []", "names no module", "target_modules"),
    "an empty target module": method("type: lora, target_modules: ''", "names no module", "target_modules"),
    "an alpha beyond float32": method("type: lora, lora_alpha: 1e300", "float32", "lora_alpha"),
    "a rank of 0 in a pattern": method("type: lora, rank_pattern: {q_proj: 0}", "", "rank_pattern"),
    "a pattern that is none": method("type: lora, rank_pattern: {'(q': 4}", "", "rank_pattern"),
    "a pattern without end": method(
        "type: lora, rank_pattern: {'(q{1000}){1000}x': 4}", "repeats its parts too often", "rank_pattern"
    ),
    "an initialisation that is none": method("type: lora, init_lora_weights: pisa", "", "init_lora_weights"),
    "a layer replication that is none": method("type: lora, layer_replication: [[0]]", "", "layer_replication"),
    "no virtual tokens": method("type: prompt_tuning, num_virtual_tokens: 0", "", "num_virtual_tokens"),
    "an initial text without the text": method(
        "type: prompt_tuning, prompt_tuning_init: TEXT", "", "prompt_tuning_init_text"
    ),
    "no tokens to train": method("type: trainable_tokens", "", "token_indices"),
    "a token below 0": method("type: trainable_tokens, token_indices: [-1]", "", "token_indices"),
    "an activation that is none": method("type: peanut, act_fn: rleu", "", "act_fn"),
    "an activation that is a function": method("type: peanut, act_fn: __import__", "", "act_fn"),
    "a wavelet that is none": method("type: waveft, wavelet_family: db99", "", "wavelet_family"),
    "AdaLoRA that ends larger than it began": method("type: adalora, init_r: 4, target_r: 8", "", "target_r"),
    "topk above the number of vectors": method("type: vblora, num_vectors: 2, topk: 3", "", "topk"),
    "both sizes of blocks": method("type: oft, r: 4, oft_block_size: 4", "give either r or", "oft_block_size"),
    "neither size of blocks": method("type: oft, r: 0, oft_block_size: 0", "give either r or", "oft_block_size"),
    "an encoder without layers": method("type: p_tuning, encoder_num_layers: 0", "", "encoder_num_layers"),
    "a variant that is none": method("type: road, variant: road_3", "did you mean", "variant"),
    "an odd size of groups": method("type: road, group_size: 63", "", "group_size"),
    "sparsity of 1": method("type: supertuning, sparsity: 1", "", "sparsity"),
    "a task below 0": method(
        "type: multitask_prompt_tuning, prompt_tuning_init_task: -1", "", "prompt_tuning_init_task"
    ),
    "a rank beyond all memory": method("type: lora, r: 9223372036854775807", "must be at most", "r"),
    "virtual tokens beyond all memory": method(
        "type: prompt_tuning, num_virtual_tokens: 1e12", "", "num_virtual_tokens"
    ),
    "targets that are no pattern": method(
        "type: lora, target_modules: '(q_proj'", "is not a regular expression", "target_modules"
    ),
    "exceptions that are no pattern": method(
        "type: lora, exclude_modules: '*.q'", "is not a regular expression", "exclude_modules"
    ),
    "layers below 0": method("type: lora, layers_to_transform: [-1]", "", "layers_to_transform"),
    "a pattern of layers without layers": method("type: lora, layers_pattern: h", "", "layers_pattern"),
}

TOGETHER = {
    "training data and a mix": dataset("train: a/b, mix: [c/d]", "cannot be given together with dataset.train", "mix"),
    "two ways to evaluate": dataset(
        "train: a/b, eval: c/d, eval_fraction: 0.1", "cannot be given together", "eval_fraction"
    ),
    "a split of a folder": dataset("train: a/b, eval: ., eval_split: test", "dataset.eval is local", "eval_split"),
    "weights for some": dataset("mix: [{train: a/b, weight: 1}, c/d]", "is missing", "mix[1].weight"),
    "one dataset twice": dataset("mix: [a/b, a/b]", "repeats dataset.mix[0]", "mix[1]"),
    "a limit beside a mix": dataset("mix: [a/b], limit: 5", "applies to a single dataset", "limit"),
    "a split beside a mix": dataset("mix: [a/b], eval_split: test", "is a split of dataset.train", "eval_split"),
    "an empty mix": dataset("mix: []", "is required", "train"),
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
    "the best of no evaluations": training("load_best_model_at_end: true\n  eval_strategy: 'no'", "needs evaluations"),
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
    "a gate without evaluations": Case(
        GOOD + "  eval_strategy: 'no'\ngates: {eval_loss: '<= 1'}\n",
        "training.eval_strategy is no",
        "gates.eval_loss",
        9,
    ),
    "several machines without a port": more(
        "launch: {num_machines: 2}\n", "above 1 needs launch.main_process_port", "launch.num_machines"
    ),
    "foreign code of an unnamed commit": base(
        "{name: a/b, trust_remote_code: true}",
        "base_model.revision must name the commit",
        "base_model.trust_remote_code",
    ),
    "double quantisation of int8": base(
        "{name: a/b, quantization: {type: int8, double_quant: true}}",
        "is a setting of nf4 and fp4",
        "base_model.quantization.double_quant",
    ),
    "a number format of int8": base(
        "{name: a/b, quantization: {type: int8, compute_dtype: float16}}",
        "is a setting of nf4 and fp4",
        "base_model.quantization.compute_dtype",
    ),
    "groups of nf4": base(
        "{name: a/b, quantization: {type: nf4, group_size: 32}}",
        "is a setting of int4_weight_only",
        "base_model.quantization.group_size",
    ),
    "a .gguf file to quantise": base(
        "{name: a.gguf, quantization: nf4}", "is dequantised on loading", "base_model.quantization"
    ),
    "a task that is none": instead("causal_lm", "causal_language_model", "unknown task", "task"),
    "a task by PEFT's name": instead("causal_lm", "CAUSAL_LM", "did you mean 'causal_lm'?", "task"),
    "a finding that is none": dataset(
        "train: a/b, allow: [no_trained_token]", "did you mean 'no_trained_tokens'?", "allow[0]"
    ),
    "bad rows that are allowed": dataset("train: a/b, allow: [bad_rows]", "cannot be allowed", "allow[0]"),
    "a finding that never stops a run": dataset("train: a/b, allow: [rows_truncated]", "never stops a run", "allow[0]"),
    "a format that is none": dataset("train: a/b, format: chatml", "expected auto, text", "format"),
}

GATES = {
    gate: more(f'gates: {{eval_loss: "{gate}"}}\n', "expected an operator", "gates.eval_loss")
    for gate in (
        "",
        "1.2",
        "<=",
        "< = 1",
        "=< 1",
        "= 1",
        "!= 1",
        "<= 1.2.3",
        "<= one",
        "<= 1e",
        "<= .nan",
        "<= inf",
        "<= 1 or 2",
        "<= 1; ls",
        "__import__('os')",
        "<= 0x10",
        "<= 1,5",
        "≤ 1",
        "<= 1e9999",
        ">> 1",
        "<=" + " " * 200 + "1",
    )
} | {
    "a number in place of a gate": more("gates: {eval_loss: 1.2}\n", "expected an operator", "gates.eval_loss"),
    "true in place of a gate": more("gates: {eval_loss: true}\n", "", "gates.eval_loss"),
    "null in place of a gate": more("gates: {eval_loss: null}\n", "", "gates.eval_loss"),
    "a gate of a mapping": more("gates: {eval_loss: {max: 1}}\n", "found a mapping", "gates.eval_loss"),
    "a gate without a name": more("gates: {'': '< 1'}\n", "has an empty name", "gates."),
}

OVERRIDES = {
    "a word": override("nothing", "expected KEY=VALUE, found 'nothing'"),
    "no key": override("=1", "expected KEY=VALUE, found '=1'"),
    "a key of white space": override("  =1", "expected KEY=VALUE"),
    "two dots": override("training..seed=1", "expected KEY=VALUE"),
    "a dot at the end": override("training.=1", "expected KEY=VALUE"),
    "a dot at the beginning": override(".training=1", "expected KEY=VALUE"),
    "an unknown key": override("training.sede=1", "did you mean 'seed'?", "training.sede"),
    "an unknown section": override("trainig.seed=1", "unknown key", "trainig"),
    "another tool's spelling": override("lora_r=8", "did you mean 'method.r'?", "lora_r"),
    "text for an integer": override("method.r=eight", "expected an integer, found 'eight'", "method.r"),
    "nothing for an integer": override("method.r=", "expected an integer, found nothing", "method.r"),
    "quotes": override("method.r='8'", "in quotes; remove the quotes", "method.r"),
    "NaN": override("training.learning_rate=.nan", "which is not finite", "training.learning_rate"),
    "a list that is not closed": override("method.target_modules=[a", "never closed", "method.target_modules"),
    "a mapping that is not closed": override("method={type: lora", "never closed", "method"),
    "a quote that is not closed": override(
        "training.output_dir='x", "a quote that is never closed", "training.output_dir"
    ),
    "two values": override("method.target_modules=[a] [b]", "", "method.target_modules"),
    "a second key by a newline": override(
        "method.target_modules=[a]\nx: 2", "expected one value", "method.target_modules"
    ),
    "a tag": override("method.target_modules=[!!python/name:os.system x]", "has a YAML tag", "method.target_modules"),
    "an alias": override("method.target_modules=[*x]", "an alias whose anchor", "method.target_modules"),
    "a bomb": override(
        "method.target_modules=[&a [x,x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], "
        "&c [*b,*b,*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]]",
        "once its aliases are expanded",
        "method.target_modules",
    ),
    "65 levels": override(
        "method.target_modules=" + "[" * 70 + "]" * 70, "nested more than 64", "method.target_modules"
    ),
    "extends": override("extends=other.yaml", "cannot be overridden", "extends"),
    "a section in place of a setting": override("training=5", "expected a mapping of settings, found 5", "training"),
    "a setting of a setting": override("training.seed.x=5", "expected an integer, found a mapping", "training.seed"),
    "a required setting taken away": override("training.output_dir=", "", "training.output_dir"),
    "a section taken away": override("dataset=null", "", "dataset"),
    "a token": override(f"base_model={TOKEN}", "looks like a token", "base_model", secret=TOKEN),
    "a URL with a password": override(
        f"base_model=https://me:{PASSWORD}@host/x", "looks like a token or password", "base_model", secret=PASSWORD
    ),
    "a variable that is not set": override("training.seed=${PEFTCLI_NOT_SET}", "is not set", "training.seed"),
    "a gate that is none": override("gates.eval_loss=low", "expected an operator", "gates.eval_loss"),
    "a gate without its operator": override("gates.eval_loss=1", "expected an operator", "gates.eval_loss"),
    "a NUL": override('training.output_dir="a\\0b"', "that is not text", "training.output_dir"),
    "an escape": override("task=\x1b[31mx", "unknown task", "task"),
    "half a surrogate pair in a key": override("gates.\udcff=> 1", "that is not text"),
    "half a surrogate pair": override("base_model=\udcff", "that is not text", "base_model"),
    "a megabyte": override("task=" + "x" * 100_000, "unknown task", "task"),
    "a key of a megabyte": override("x" * 100_000 + "=1", "unknown key"),
    "an option that is none": override("--learning-rate=3", "No such option"),
    "a flag of another tool": override("--lora_r", "No such option"),
    "a mix by its number": override("dataset.mix[0]=a.jsonl", "unknown key", "dataset.mix[0]"),
    "JSON": override('{"training": {"seed": 1}}', "expected KEY=VALUE"),
    "a colon in place of the equals sign": override("training.seed:1", "expected KEY=VALUE"),
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
    "itself": Case("extends: recipe.yaml\n", "extends itself", "extends", 1),
    "itself, by another name": Case("extends: .//./recipe.yaml\n", "extends itself", "extends", 1),
    "itself, by way of another": Case(
        OTHER, "extends itself", "extends", 1, setup=_write("other.yaml", "extends: recipe.yaml\n")
    ),
    "itself, by a link": Case(
        OTHER, "extends itself", "extends", 1, setup=lambda f: (f / "other.yaml").symlink_to("recipe.yaml")
    ),
    "a file that is not there": Case("extends: none.yaml\n", "no such file", "", 1),
    "a file with a near name": Case("extends: othr.yaml\n", "did you mean", "", 1, setup=_write("other.yaml", GOOD)),
    "a folder": Case("extends: .\n", "is a folder", "", 1),
    "a pipe": Case(OTHER, "not a regular file", "", 1, setup=lambda folder: os.mkfifo(folder / "other.yaml")),
    "a socket": Case(OTHER, "not a regular file", "", 1, setup=_socket),
    "a device": Case("extends: /dev/zero\n", "not a regular file", "", 1),
    "the terminal": Case("extends: /dev/tty\n", "not a regular file", "", 1),
    "a link to nowhere": Case(OTHER, "no such file", "", 1, setup=lambda f: (f / "other.yaml").symlink_to("gone")),
    "a link to itself": Case(
        OTHER, "cannot be read", "", 1, setup=lambda f: (f / "other.yaml").symlink_to("other.yaml")
    ),
    "a list": Case("extends: [a.yaml, b.yaml]\n", "expected the path of a recipe, found a list", "extends", 1),
    "a mapping": Case("extends: {a: b}\n", "expected the path of a recipe, found a mapping", "extends", 1),
    "nothing": Case("extends:\n", "expected the path of a recipe, found nothing", "extends", 1),
    "a number": Case("extends: 5\n", "no such file", "", 1),
    "a URL": Case("extends: https://example.org/a.yaml\n", "no such file", "", 1),
    "a NUL": Case('extends: "a\\0"\n', "that is not text", "extends", 1),
    "a very long name": Case(f"extends: {'x' * 5000}\n", "cannot be read", "", 1),
    "a long chain": Case(
        "extends: r0.yaml\n", "more than 16 recipes extend one another", "extends", 1, setup=_chain(40)
    ),
    "a file that is no YAML": Case(OTHER, "not valid YAML", None, 1, setup=_write("other.yaml", "a: b: c\n")),
    "a file that is a list": Case(
        OTHER, "expected a mapping of sections", None, 1, setup=_write("other.yaml", "- a\n")
    ),
    "an empty file": Case(OTHER, "the recipe is empty", None, 1, setup=_write("other.yaml", "")),
    "a file of two documents": Case(
        OTHER, "a second YAML document", None, 8, setup=_write("other.yaml", GOOD + "---\na: 1\n")
    ),
    "a file with a mistake": Case(
        OTHER, "unknown key", "training.sede", 8, setup=_write("other.yaml", GOOD + "  sede: 1\n")
    ),
    "a file that is large": Case(
        OTHER, "at most 1,000,000 are read", "", 1, setup=_write("other.yaml", "#" * 1_000_001)
    ),
    "a variable that is not set": Case("extends: ${PEFTCLI_NOT_SET}/a.yaml\n", "is not set", "extends", 1),
    "in a section": more("  extends: other.yaml\n", "unknown key", "training.extends"),
}

ENVIRONMENT = {
    "not set": training("seed: ${PEFTCLI_NOT_SET}", "PEFTCLI_NOT_SET is not set"),
    "empty": training("seed: ${PEFTCLI_EMPTY}", "expected an integer, found nothing", env={"PEFTCLI_EMPTY": ""}),
    "no name": training("seed: ${}", "expected ${NAME}"),
    "a name with a space": training("seed: ${A B}", "expected ${NAME}"),
    "a name of a number": training("seed: ${1}", "expected ${NAME}"),
    "not closed": training("seed: '${HOME'", "expected ${NAME}"),
    "one within another": training("seed: '${A:-${B}}'", "expected"),
    "a shell's other forms": training("seed: '${HOME:?no}'", "expected ${NAME}"),
    "a shell's commands": training("metric_for_best_model: '${$(id)}'", "expected ${NAME}"),
    "the hub's token": training(
        "metric_for_best_model: ${HF_TOKEN}", "is a secret", env={"HF_TOKEN": TOKEN}, secret=TOKEN
    ),
    "a key": training(
        "metric_for_best_model: ${MY_API_KEY}", "is a secret", env={"MY_API_KEY": PASSWORD}, secret=PASSWORD
    ),
    "a password": training(
        "metric_for_best_model: ${MY_PASSWORD:-x}", "is a secret", env={"MY_PASSWORD": PASSWORD}, secret=PASSWORD
    ),
    "a secret": training(
        "metric_for_best_model: ${my_secret}", "is a secret", env={"my_secret": PASSWORD}, secret=PASSWORD
    ),
    "a token by another name": training(
        "metric_for_best_model: ${PEFTCLI_X}", "looks like a token", env={"PEFTCLI_X": TOKEN}, secret=TOKEN
    ),
    "a password of a URL by another name": training(
        "metric_for_best_model: ${PEFTCLI_X}",
        "looks like a token",
        env={"PEFTCLI_X": f"ssh://me:{PASSWORD}@host/x"},
        secret=PASSWORD,
    ),
    "text for a number": training("seed: ${PEFTCLI_X}", "expected an integer, found 'many'", env={"PEFTCLI_X": "many"}),
    "YAML for a list": instead(
        "[q_proj, v_proj]", "'${PEFTCLI_X}'", "", "method.target_modules", env={"PEFTCLI_X": "(q"}
    ),
    "101 of them": training("metric_for_best_model: '" + "${A}" * 101 + "'", "more than 100 variables"),
    "in a key": more("${HOME}: 1\n", "unknown key", "${HOME}"),
}

SECRETS = {
    "a token as a value": training(f"metric_for_best_model: {TOKEN}", "looks like a token", secret=TOKEN),
    "a token in a longer value": training(
        f"metric_for_best_model: use {TOKEN} here", "looks like a token", secret=TOKEN
    ),
    "a token as a key": more(f"{TOKEN}: 1\n", "", secret=TOKEN),
    "a token as a setting": training(f"token: {TOKEN}", "unknown key", secret=TOKEN),
    "a token among names": instead(
        "q_proj, v_proj", f"q_proj, {TOKEN}", "looks like a token", "method.target_modules[1]", secret=TOKEN
    ),
    "a token as a gate": more(
        f"gates: {{eval_loss: {TOKEN}}}\n", "looks like a token", "gates.eval_loss", secret=TOKEN
    ),
    "a token where a number belongs": training(f"seed: {TOKEN}", "looks like a token", secret=TOKEN),
    "a token in a file's name": instead(
        "train: org/data", f"train: ./{TOKEN}.jsonl", "looks like a token", "dataset.train", secret=TOKEN
    ),
    "a token in a YAML error": more(f"  seed: {TOKEN}: 1\n", "a second ': '", secret=TOKEN),
    "a token in a tag": more(f"  seed: !{TOKEN} 1\n", "has a YAML tag", secret=TOKEN),
    "a token for an anchor": more(f"  seed: *{TOKEN}\n", "an alias whose anchor", secret=TOKEN),
    "a token in a comment and an error": more(f"  seed: x # {TOKEN}\n", "expected an integer", secret=TOKEN),
    "a password in the model's URL": base(
        f"https://me:{PASSWORD}@host/model", "looks like a token or password", "base_model", secret=PASSWORD
    ),
    "a password in the data's URL": instead(
        "org/data",
        f"s3://me:{PASSWORD}@host/x.jsonl",
        "looks like a token or password",
        "dataset.train",
        secret=PASSWORD,
    ),
    "a token before an at sign": base(
        f"https://{TOKEN}@huggingface.co/a/b", "looks like a token", "base_model", secret=TOKEN
    ),
    "a token in extends": Case(f"extends: {TOKEN}.yaml\n", "looks like a token", "extends", 1, secret=TOKEN),
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


PATHS = {
    "data that are not there": instead("org/data", "./data.jsonl", "no such file", "dataset.train"),
    "data with a near name": instead(
        "org/data", "./dat.jsonl", "did you mean", "dataset.train", setup=_write("data.jsonl", "")
    ),
    "evaluation data that are not there": instead("org/held-out", "./none.jsonl", "no such file", "dataset.eval"),
    "data of a mix that are not there": dataset("mix: [a/b, ./none.csv]", "no such file", "mix[1].train"),
    "an empty name": instead("org/data", "''", "is empty", "dataset.train"),
    "a name of white space": instead("org/data", "'  '", "is empty", "dataset.train"),
    "no output_dir": instead("output_dir: out", "output_dir: ''", "is empty", "training.output_dir"),
    "an output_dir of white space": instead("output_dir: out", "output_dir: ' '", "is empty", "training.output_dir"),
    "no model": base("''", "is empty", "base_model.name"),
    "a model of white space": base("'  '", "is empty", "base_model.name"),
    "a very long file name": instead("org/data", "./" + "x" * 5000 + ".jsonl", "no such file", "dataset.train"),
    "a template in the recipe": base(
        "{name: a/b, chat_template: '{% for m in messages %}'}", "contains a template", "base_model.chat_template"
    ),
    "a template that is not there": base(
        "{name: a/b, chat_template: none.jinja}", "no such file", "base_model.chat_template"
    ),
    "a template by a name": base(
        "{name: a/b, chat_template: chat_ml}", "did you mean 'chatml'?", "base_model.chat_template"
    ),
    "a template that is a folder": base(
        "{name: a/b, chat_template: t.jinja}",
        "not a regular file",
        "base_model.chat_template",
        setup=_file("t.jinja", Path.mkdir),
    ),
    "a template that is a pipe": base(
        "{name: a/b, chat_template: t.jinja}",
        "not a regular file",
        "base_model.chat_template",
        setup=_file("t.jinja", os.mkfifo),
    ),
    "an empty new token": base("{name: a/b, new_tokens: ['']}", "is empty", "base_model.new_tokens[0]"),
    "a new token with white space": base("{name: a/b, new_tokens: [' x']}", "white space", "base_model.new_tokens[0]"),
    "a new token twice": base("{name: a/b, new_tokens: [x, x]}", "twice", "base_model.new_tokens[1]"),
    "a split of a file": instead(
        "org/data",
        "./d.jsonl, split: test",
        "applies to hub datasets",
        "dataset.split",
        setup=_write("d.jsonl", "{}"),
    ),
    "a revision of a file": instead(
        "org/data",
        "./d.jsonl, revision: main",
        "applies to hub datasets",
        "dataset.revision",
        setup=_write("d.jsonl", "{}"),
    ),
    "a file that is streamed": instead(
        "org/data",
        "./d.jsonl, streaming: true",
        "local files are always streamed",
        "dataset.streaming",
        setup=_write("d.jsonl", "{}"),
    ),
}

CLASSES: dict[str, dict[str, Case]] = {
    "syntax": SYNTAX,
    "text": TEXT,
    "tags": TAGS,
    "twice": TWICE,
    "anchors": ANCHORS,
    "keys": KEYS,
    "kinds": KINDS,
    "ranges": RANGES,
    "method": METHOD,
    "together": TOGETHER,
    "gates": GATES,
    "overrides": OVERRIDES,
    "extends": EXTENDS,
    "environment": ENVIRONMENT,
    "secrets": SECRETS,
    "urls": URLS,
    "paths": PATHS,
}
