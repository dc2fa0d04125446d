"""Write train.jsonl and eval.jsonl anew: functions of Python's standard library, and their docstrings' first lines.

    python3.11 configs/quickstart/make_data.py

The same Python version gives the same files; DATA.md says which one made those in this folder, and what a row is.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
STDLIB = Path(sysconfig.get_path("stdlib"))
SKIPPED = {"test", "tests", "idle_test", "site-packages", "turtledemo", "lib2to3", "distutils", "__pycache__"}
PROMPT = "Write a one-line docstring for this Python function:\n\n```python\n{code}\n```"
TRAIN_ROWS, EVAL_ROWS = 200, 40
HELD_OUT = {"calendar", "collections", "ftplib", "heapq", "queue", "random", "shlex", "statistics"}
CODE_LENGTH = range(40, 181)
SUMMARY_LENGTH = range(15, 73)
MOST_OF_ONE_LIBRARY = 25
VERBS = """
Acquire Activate Add Allow Append Apply Assert Bind Block Build Calculate Call Cancel Change Check Choose
Clean Clear Close Collect Compare Compile Compute Configure Connect Construct Convert Copy Count Create Decide
Decode Decrement Delete Destroy Determine Discard Divide Draw Dump Emit Encode Enter Escape Evaluate Execute
Expand Extract Feed Fetch Fill Find Flush Force Format Generate Get Handle Identify Indent Indicate Initialize
Insert Install Instantiate Invert Invoke Iterate Join List Load Look Make Map Mark Merge Move Multiply
Normalize Open Override Parse Perform Pop Post Prepare Print Process Produce Push Put Query Quote Raise Read
Recognize Record Redirect Register Release Reload Remove Rename Repeat Replace Report Request Reset Resolve
Restore Resume Retrieve Return Reverse Rewind Round Run Save Schedule Search Select Send Separate Set Show
Shuffle Signal Skip Sort Split Start Stop Store Strip Subscribe Subtract Switch Take Tally Terminate Test
Tokenize Transform Trigger Truncate Unquote Unregister Update Use Validate Wait Wake Walk Wrap Write Yield
"""


class Pair(NamedTuple):
    """One function, without its docstring, and the docstring's first line."""

    library: str
    code: str
    summary: str

    @property
    def order(self) -> str:
        """A place in the files that does not depend on where the function stands."""
        return hashlib.sha256(self.code.encode()).hexdigest()


def main() -> None:
    """Write both files beside this one."""
    pairs = distinct(pair for file in library_files() for pair in pairs_of(file))
    train = [pair for pair in pairs if pair.library not in HELD_OUT][:TRAIN_ROWS]
    held_out = [pair for pair in pairs if pair.library in HELD_OUT][:EVAL_ROWS]
    for name, chosen in (("train", train), ("eval", held_out)):
        lines = [json.dumps(row(pair), ensure_ascii=False) + "\n" for pair in chosen]
        (HERE / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}.jsonl: {len(lines)} rows from {len({pair.library for pair in chosen})} libraries")


def library_files() -> Iterator[Path]:
    """The library's own modules. Files under a notice of somebody else's copyright are left out."""
    for file in sorted(STDLIB.rglob("*.py")):
        if SKIPPED.isdisjoint(file.relative_to(STDLIB).parts):
            text = file.read_text(encoding="utf-8", errors="replace")
            notices = re.findall(r".*(?:copyright|permission).*", text, re.IGNORECASE)
            if all("Python Software Foundation" in notice for notice in notices):
                yield file


def pairs_of(file: Path) -> Iterator[Pair]:
    """The short functions of one file whose docstring starts with a clean imperative sentence."""
    text = file.read_text(encoding="utf-8")
    library = file.relative_to(STDLIB).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            code, summary = without_docstring(text, node), doc.split("\n\n")[0]
            if len(code) in CODE_LENGTH and is_clean(summary):
                yield Pair(library, code, summary)


def without_docstring(text: str, node: ast.FunctionDef) -> str:
    """The source of the function; empty when only the docstring tells what it does."""
    doc, *rest = node.body
    if not rest or "NotImplementedError" in ast.unparse(node):
        return ""
    lines = text.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = lines[first - 1 : doc.lineno - 1] + lines[doc.end_lineno or 0 : node.end_lineno]
    return textwrap.dedent("\n".join(line for line in kept if line.strip()))


def is_clean(summary: str) -> bool:
    """One imperative sentence on one line: "Return the number of items.", not "Returns ..." or "The number ..."."""
    is_sentence = summary.isascii() and re.fullmatch(r"[^.:;\n]+\.", summary) is not None
    return is_sentence and len(summary) in SUMMARY_LENGTH and summary.split()[0] in VERBS.split()


def distinct(pairs: Iterator[Pair]) -> list[Pair]:
    """Without repeated code or summaries, at most so many of one library, in an order that mixes the libraries."""
    codes, summaries, count = set(), set(), Counter[str]()
    kept = []
    for pair in sorted(pairs, key=lambda pair: pair.order):
        if pair.code in codes or pair.summary.lower() in summaries or count[pair.library] == MOST_OF_ONE_LIBRARY:
            continue
        codes.add(pair.code)
        summaries.add(pair.summary.lower())
        count[pair.library] += 1
        kept.append(pair)
    return kept


def row(pair: Pair) -> dict[str, list[dict[str, str]]]:
    """The pair as a conversation."""
    return {
        "messages": [
            {"role": "user", "content": PROMPT.format(code=pair.code)},
            {"role": "assistant", "content": pair.summary},
        ]
    }


if __name__ == "__main__":
    main()
