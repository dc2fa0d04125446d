"""Measure the structure of the package: how much there is to read, and how often things are opened.

``python docs/house.py [ROOT]`` prints the figures of the checkout at ROOT (default: this one) as a Markdown table.
docs/log.md has how they changed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Counts what `peftcli generate` opens and parses to load a tiny model with an adapter. Runs in a process of its own.
_LOAD = """
import collections, json, os, sys, tempfile, warnings
warnings.simplefilter("ignore")
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from peftcli import LoraConfig, get_peft_model
try:
    from peftcli.adapters.generate import load_generator
except ImportError:  # its name until the house was rebuilt
    from peftcli.generate import load_speaker as load_generator
folder = tempfile.mkdtemp()
base, adapter = os.path.join(folder, "base"), os.path.join(folder, "adapter")
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
LlamaForCausalLM(config).save_pretrained(base)
words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(base)
model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"))
model.save_pretrained(adapter)
load_generator(adapter)  # once before, so that imports are not counted
opened, parsed, counting = collections.Counter(), collections.Counter(), True
LIBRARIES = ("transformers", "safetensors", "huggingface_hub", "tokenizers", "torch", "accelerate")
def who():
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith((*LIBRARIES, "peftcli")):
            return "ours" if name.startswith("peftcli") else "theirs"
        frame = frame.f_back
    return "theirs"
def hook(event, args):
    if counting and event == "open" and isinstance(args[0], (str, os.PathLike)):
        path = os.fspath(args[0])
        if path.startswith(folder) and os.path.isfile(path):
            opened[who(), path] += 1
sys.addaudithook(hook)
decode = json.JSONDecoder.decode
def counted(self, *args, **kwargs):
    parsed[who()] += 1
    return decode(self, *args, **kwargs)
json.JSONDecoder.decode = counted
load_generator(adapter)
counting = False
json.JSONDecoder.decode = decode
ours = {path: count for (whose, path), count in opened.items() if whose == "ours"}
print(json.dumps({"opened": sum(ours.values()), "most": max(ours.values(), default=0), "parsed": parsed["ours"],
                  "all opened": sum(opened.values()), "all parsed": sum(parsed.values())}))
"""


def main(root: Path) -> None:
    """Print the table."""
    package = root / "peftcli"
    modules = parsed(root)
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules}
    core = sum(size for path, size in lines.items() if path.parent == package / "core")
    functions = sorted(_functions(modules, root), reverse=True)
    loaded = _load(root)
    rows = {
        "lines of the package": f"{sum(lines.values()):,}",
        "loose modules": str(len(list(package.glob("*.py")))),
        "lines of core, without core/prompts": f"{core:,}",
        "functions of more than 50 lines": str(sum(size > 50 for size, _ in functions)),
        "import cycles, function-level imports included": str(len(cycles(imports(modules, root)))),
        "imports of the package inside functions": str(inner_imports(modules, root).total()),
        "files that load an adapter's config from its folder": str(_resolving(modules, root)),
        "files opened by one load of a tiny model and an adapter, by us / by all": _both(loaded, "opened"),
        "most times that we open one of them": str(loaded["most"]),
        "JSON texts parsed by that load, by us / by all": _both(loaded, "parsed"),
    }
    print("| figure | value |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    print("\nThe ten longest functions: " + ", ".join(f"`{name}` {size}" for size, name in functions[:10]))


def parsed(root: Path) -> dict[Path, ast.Module]:
    """The package's files, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((root / "peftcli").rglob("*.py"))}


def _functions(modules: dict[Path, ast.Module], root: Path) -> Iterator[tuple[int, str]]:
    for path, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                yield node.end_lineno - node.lineno + 1, f"{path.relative_to(root / 'peftcli')}:{node.name}"


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(modules: dict[Path, ast.Module], root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports anywhere, except for type checkers only."""
    names = {_name(path, root) for path in modules}
    found: dict[str, set[str]] = {name: set() for name in names}
    for path, tree in modules.items():
        skipped = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if node in skipped:
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                found[_name(path, root)] |= {full if full in names else node.module for full in wanted} & names
            elif isinstance(node, ast.Import):
                found[_name(path, root)] |= {alias.name for alias in node.names} & names
    return {name: wanted - {name} for name, wanted in found.items()}


def cycles(imported: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another (strongly connected components of more than one), by Tarjan."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imported[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(imported):
        if name not in index:
            visit(name)
    return found


def inner_imports(modules: dict[Path, ast.Module], root: Path) -> Counter[str]:
    """Module -> how many of its imports of the package stand inside functions."""
    found: Counter[str] = Counter()
    for path, tree in modules.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)}
        count = sum((node.module or "").startswith("peftcli") for node in inside)
        found += Counter({_name(path, root): count})
    return found


def _resolving(modules: dict[Path, ast.Module], root: Path) -> int:
    """Files outside core that turn an adapter folder into its config by themselves."""
    counts = Counter(
        path
        for path, tree in modules.items()
        if (root / "peftcli" / "core") not in path.parents
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and re.fullmatch(r"(\w+\.)?config_from_dict", ast.unparse(node.func))
    )
    return len(counts)


def _both(loaded: dict[str, int], what: str) -> str:
    return f"{loaded[what]} / {loaded[f'all {what}']}"


def _load(root: Path) -> dict[str, int]:
    env = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", _LOAD], env=env, capture_output=True, text=True, check=True, cwd="/")
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve())
