"""Write docs/conformance.md: every method x base model x promise, from a run of all of them.

    .venv/bin/python docs/conformance.py

Takes some minutes. Ends with status 1, and writes nothing, when a promise is broken.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from promises import MODELS, PROMISES, NotApplicable, is_refused, why_not  # noqa: E402

from peftcli.methods import METHODS  # noqa: E402

PAGE = ROOT / "docs/conformance.md"


def main() -> int:
    """Run everything, write the page, and say how it went."""
    cells: dict[tuple[str, str, str], str] = {}
    for number, method in enumerate(METHODS, 1):
        print(f"{number} of {len(METHODS)}: {method}", flush=True)
        for kind in MODELS:
            for promise in PROMISES:
                cells[method, kind, promise] = cell(method, kind, promise)
                if cells[method, kind, promise].startswith("fail"):
                    print(f"  {kind}: {promise}: {cells[method, kind, promise]}", flush=True)
    failed = sum(text.startswith("fail") for text in cells.values())
    passed = sum(text == "pass" for text in cells.values())
    print(f"{passed} pass, {failed} fail, {len(cells) - passed - failed} not applicable")
    if failed:
        return 1
    PAGE.write_text("\n".join(page(cells)) + "\n")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def cell(method: str, kind: str, promise: str) -> str:
    """``pass``, ``fail: why`` or the reason why the promise does not apply."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if reason := why_not(method, kind):
                is_refused(method, kind)
                return reason
            PROMISES[promise](method, kind, Path(folder))
        except NotApplicable as reason:
            return str(reason)
        except BaseException as error:  # pytest.fail raises no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"fail: {type(error).__name__}: {error}".splitlines()[0][:200]
    return "pass"


def page(cells: dict[tuple[str, str, str], str]) -> Iterator[str]:
    """The lines of the page."""
    passed = sum(text == "pass" for text in cells.values())
    yield "# Conformance"
    yield ""
    yield (
        f"What each method promises on each shape of base model, as `python docs/conformance.py` found it with peft "
        f"{version('peft')}, transformers {version('transformers')} and torch {version('torch').partition('+')[0]} on "
        f"the CPU: {passed} of {len(cells)} checks pass, none fails, and {len(cells) - passed} mean nothing where they "
        "stand, for the reason that is given. The models are tiny and random; their layers and tensor names are those "
        "of the real families. `tests/promises.py` says what each promise means, to the line."
    )
    yield ""
    yield "Promises:"
    yield ""
    yield from (f"{number}. {promise}" for number, promise in enumerate(PROMISES, 1))
    for method, row in METHODS.items():
        reasons: list[str] = []
        yield from ("", f"## {row.title}", "")
        yield f"| | {' | '.join(str(number) for number in range(1, len(PROMISES) + 1))} |"
        yield f"|---|{'---|' * len(PROMISES)}"
        for kind, title in MODELS.items():
            marks = [_mark(cells[method, kind, promise], reasons) for promise in PROMISES]
            yield f"| {title} | {' | '.join(marks)} |"
        if reasons:
            yield ""
            yield from (f"{_letter(number)}: {reason}  " for number, reason in enumerate(reasons))


def _mark(text: str, reasons: list[str]) -> str:
    if text == "pass":
        return "pass"
    if text not in reasons:
        reasons.append(text)
    return f"({_letter(reasons.index(text))})"


def _letter(number: int) -> str:
    return chr(ord("a") + number)


if __name__ == "__main__":
    raise SystemExit(main())
