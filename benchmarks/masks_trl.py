"""Which tokens are trained: TRL's assistant_only_loss and peftcli on the mask matrix of tests.

Every conversation goes through TRL as SFTTrainer's preprocessing does it: the training template that TRL has for the
model's chat template, then ``apply_chat_template(..., return_assistant_tokens_mask=True)``. Where TRL ships a copy of
the published template, both sides get that copy, since TRL knows a template by its exact text; else both get the
matrix's own. The truth is the frozen matrix. axolotl is not measured.

TRL is no dependency of this project: run it in an environment of its own that also has what peftcli needs:

    pip install trl==1.16.0
    PYTHONPATH=. python benchmarks/masks_trl.py
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from peftcli.tasks.text.chat import IGNORED, chat_template, encode_marked, mark_chat
from peftcli.tasks.text.formats import ChatExample

TESTS = Path(__file__).resolve().parent.parent / "tests"
COPIES = {
    "llama3": "llama3",
    "llama3_1": "llama3_2",
    "qwen2_5": "qwen2_5",
    "qwen3": "qwen3",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "deepseek_v3": "deepseekv3",
    "deepseek_r1": "deepseek_r1_distill",
    "command_r": "cohere",
    "gpt_oss": "gptoss",
}
"""The matrix's name of a template -> TRL's name of its copy."""
RIGHT, SPACE, IDS, OTHER, REFUSED = (
    "exactly right",
    "white space after the end too",
    "other ids than the model's template",
    "other tokens trained",
    "refused or nothing",
)


def load(trl_templates: Path, name: str, matrix: Any) -> Any:
    """The matrix's tokenizer with TRL's copy of the template, if it has one."""
    tokenizer = matrix.tokenizer(name)
    if name in COPIES:
        tokenizer.chat_template = (trl_templates / f"{COPIES[name]}.jinja").read_text(encoding="utf-8")
    return tokenizer


def runs(tokenizer: Any, ids: list[int], trained: list[bool]) -> list[str]:
    """The texts of the runs of trained tokens."""
    found: list[list[int]] = []
    for index, (token, inside) in enumerate(zip(ids, trained, strict=True)):
        if inside:
            if not index or not trained[index - 1]:
                found.append([])
            found[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in found]


def by_trl(tokenizer: Any, messages: list[Any], tools: Any) -> tuple[list[int], list[bool]]:
    """Ids, and which of them TRL trains.

    Raises:
        Exception: TRL, or the template, refuses the conversation or would train nothing.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    tagged = has_generation_markers(tokenizer.chat_template)
    encoded = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=None if tagged else get_training_chat_template(tokenizer),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    if 1 not in encoded["assistant_masks"]:
        raise RuntimeError("at least one example has no assistant tokens")
    return encoded["input_ids"], [each == 1 for each in encoded["assistant_masks"]]


def by_us(tokenizer: Any, messages: list[Any], tools: Any) -> tuple[list[int], list[bool]]:
    """Ids, and which of them peftcli trains.

    Raises:
        DataError: the conversation is refused.
    """
    marked = mark_chat(ChatExample(messages, tools), chat_template(tokenizer), "answers")
    (encoded,) = encode_marked([marked], tokenizer)
    return encoded.input_ids, [label != IGNORED for label in encoded.labels]


def verdict(side: Any, tokenizer: Any, messages: list[Any], tools: Any, truth: list[str] | None, swallows: bool) -> str:
    """What a side makes of a conversation of which ``truth`` is to be trained; None: it is to be refused.

    Where special tokens swallow white space, white space is not compared.
    """
    try:
        ids, trained = side(tokenizer, messages, tools)
    except Exception:
        return REFUSED
    if truth is None:
        return OTHER
    if ids != list(tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)):
        return IDS
    found = runs(tokenizer, ids, trained)
    if swallows:
        found, truth = (["".join(text.split()) for text in texts] for texts in (found, truth))
    if found == truth:
        return RIGHT
    return SPACE if [text.rstrip() for text in found] == truth else OTHER


def truth_of(matrix: Any, name: str, shape: str) -> list[str] | None:
    """The frozen trained texts; those that touch are one run."""
    expected = matrix.expected(name, shape)
    if isinstance(expected, str):
        return None
    text, spans = expected
    marked = "".join(f"⟦{text[start:end]}⟧" for start, end in spans) if spans else ""
    apart = [start != end for (_, end), (start, _) in pairwise(spans)]
    parts = re.findall("⟦(.*?)⟧", marked, re.DOTALL)
    joined = parts[:1]
    for part, new in zip(parts[1:], apart, strict=True):
        if new:
            joined.append(part)
        else:
            joined[-1] += part
    return joined


def main() -> None:
    """Print the table."""
    try:
        import trl
    except ModuleNotFoundError:
        print("not measured: needs TRL (pip install trl==1.16.0, in an environment of its own)")
        return
    import transformers.utils.chat_template_utils as rendering

    sys.path.insert(0, str(TESTS))
    import mask_matrix as matrix

    from peftcli.system import date

    rendering.datetime = matrix.Today
    warnings.simplefilter("ignore")
    templates = Path(trl.__file__).parent / "chat_templates"
    totals: dict[str, Counter[int]] = {"TRL": Counter(), "peftcli": Counter()}
    print(f"TRL {trl.__version__}, {len(matrix.PUBLISHED)} templates x {len(matrix.SHAPES)} conversations\n")
    columns = [
        "to train",
        "TRL right",
        "+ white space",
        "other ids",
        "other tokens",
        "refused",
        "to refuse",
        "TRL refuses",
    ]
    print("| template | " + " | ".join([*columns, "peftcli right"]) + " |")
    print("| --- " * (len(columns) + 2) + "|")
    for name in matrix.PUBLISHED:
        tokenizer = load(templates, name, matrix)
        counts: dict[str, Counter[tuple[bool, str]]] = {"TRL": Counter(), "peftcli": Counter()}
        for shape in matrix.SHAPES:
            truth = truth_of(matrix, name, shape)
            for side, run in (("TRL", by_trl), ("peftcli", by_us)):
                messages, tools = matrix.conversation(name, shape)
                with date.fixed_date(matrix.DAY):
                    found = verdict(run, tokenizer, messages, tools, truth, bool(matrix.PUBLISHED[name].swallow))
                counts[side][truth is None, found] += 1
        rows = {side: row(each) for side, each in counts.items()}
        print(f"| {name} | " + " | ".join(map(str, [*rows["TRL"], sum(rows["peftcli"][i] for i in (1, 7))])) + " |")
        for side, each in rows.items():
            totals[side].update(dict(enumerate(each)))
    last = [totals["TRL"][at] for at in range(8)]
    print("| all | " + " | ".join(map(str, [*last, totals["peftcli"][1] + totals["peftcli"][7]])) + " |")
    print(f"\nTRL: {last[1] + last[7]} of {last[0] + last[6]} as the matrix says, of the {last[0]} to train {last[1]}.")


def row(counts: Counter[tuple[bool, str]]) -> list[int]:
    """A line's numbers: of conversations to train, and to refuse."""
    train = {found: number for (refused, found), number in counts.items() if not refused}
    refuse = {found: number for (refused, found), number in counts.items() if refused}
    kinds = [train.get(kind, 0) for kind in (RIGHT, SPACE, IDS, OTHER, REFUSED)]
    return [sum(train.values()), *kinds, sum(refuse.values()), refuse.get(REFUSED, 0)]


if __name__ == "__main__":
    main()
