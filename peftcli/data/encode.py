"""Examples -> features, and the report of what was used, cut and left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from peftcli.data.chat import (
    IGNORED,
    Encoded,
    Plan,
    chat_template,
    check_ids,
    encode_plans,
    plan_chat,
    plan_pair,
    plan_text,
)
from peftcli.data.formats import AlpacaExample, ChatExample, Example, PairExample, TextExample
from peftcli.data.load import Rows
from peftcli.data.spans import Template, render
from peftcli.errors import DataError
from peftcli.schema import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Features = dict[str, list[int]]
"""``input_ids`` and ``labels`` of one example."""

OVERLONG = "longer than max_length"
CUT_OFF = "no trained token within max_length"
NO_TARGET = "no trained token"

_BATCH = 512
"""Texts tokenised at once."""


@dataclass
class DataReport:
    """What became of a dataset's rows."""

    rows: int
    files: list[str]
    sha256: dict[str, str]
    """File -> hash of its bytes."""
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> rows left out for it."""
    truncated: int = 0
    tokens: int = 0
    targets: int = 0
    """Labels that count in the loss. In a causal model the first token is never predicted, so its label does not."""
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as run.json holds it, under ``data``."""
        names = ("files", "sha256", "rows", "used", "truncated", "tokens", "targets")
        return {name: getattr(self, name) for name in names} | {"dropped": dict(self.dropped)}


def encode_examples(
    examples: Sequence[Example], rows: Rows, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> tuple[list[Features], DataReport]:
    """Features for a causal language model.

    Args:
        examples: One for each row.
        rows: Where the examples came from, for errors and the report.
        tokenizer: The base model's.
        dataset: Says which tokens are trained, how long an example may be, and what happens to longer ones.

    Raises:
        DataError: a conversation whose answers cannot be found, a row that is too long where that is an error, or no
            row with a trained token.
    """
    report = _report(rows)
    template = _template(examples, rows, tokenizer)
    plans = [_plan(example, rows, index, template, dataset.train_on) for index, example in enumerate(examples)]
    if open_ := sum(not plan.closed for plan in plans):
        report.warnings.append(
            f"{open_} of {len(plans)} conversations have an answer without an end-of-turn token in this chat template: "
            "the model does not learn there where to stop"
        )
    if tokenizer.eos_token_id is None and any(not plan.rendered for plan in plans):
        report.warnings.append("the tokenizer has no EOS token: the model does not learn where to stop")
    encoded: list[Encoded] = []
    for _, group in groupby(plans, key=lambda plan: plan.rendered):
        same = list(group)
        for start in range(0, len(same), _BATCH):
            first = len(encoded)
            encoded += encode_plans(same[start : start + _BATCH], tokenizer)
            # The others of the batch differ from the first in their text only.
            if (chat := _as_chat(examples[first])) and same[start].rendered:
                with _placed(rows, first):
                    check_ids(chat, encoded[first], tokenizer)
    features = []
    for index, each in enumerate(encoded):
        reason = _overlong(len(each.input_ids), index, rows, dataset, report)
        ids, labels = each.input_ids[: dataset.max_length], each.labels[: dataset.max_length]
        targets = sum(label != IGNORED for label in labels[1:])
        if reason is None and not targets:
            reason = CUT_OFF if len(ids) < len(each.input_ids) else NO_TARGET
        if reason is not None:
            report.dropped[reason] += 1
            continue
        report.truncated += len(ids) < len(each.input_ids)
        report.tokens, report.targets = report.tokens + len(ids), report.targets + targets
        features.append({"input_ids": ids, "labels": labels})
    return features, _close(report, len(features), dataset)


def encode_seq2seq(
    examples: Sequence[Example], rows: Rows, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> tuple[list[Features], DataReport]:
    """Features for an encoder-decoder: the source in ``input_ids``, the target and EOS in ``labels``.

    The source is the prompt, the instruction and input, or the conversation up to its last answer; the target is the
    completion, the output, or that answer.

    Args:
        examples: One for each row.
        rows: Where the examples came from, for errors and the report.
        tokenizer: The base model's.
        dataset: Says how long source and target may each be, and what happens to longer ones.

    Raises:
        DataError: an example without a target, a row that is too long where that is an error, or no row left.
    """
    if dataset.train_on == "all":
        raise DataError("an encoder-decoder is trained on the target only", key="dataset.train_on")
    report = _report(rows)
    pairs = [_source_and_target(example, rows, index, tokenizer) for index, example in enumerate(examples)]
    # A chat template has written the special tokens already.
    rendered = bool(tokenizer.chat_template) and bool(examples) and isinstance(examples[0], ChatExample)
    sources = _ids(tokenizer, [source for source, _ in pairs], add_special_tokens=not rendered)
    targets = _ids(tokenizer, [target for _, target in pairs], target=True)
    features = []
    for index, (source, target) in enumerate(zip(sources, targets, strict=True)):
        longest = max(len(source), len(target))
        reason = _overlong(longest, index, rows, dataset, report)
        if reason is not None:
            report.dropped[reason] += 1
            continue
        if len(source) > dataset.max_length:
            source = _cut_source(tokenizer, pairs[index][0], dataset.max_length, add_special_tokens=not rendered)
        report.truncated += longest > dataset.max_length
        labels = target[: dataset.max_length]
        report.tokens, report.targets = report.tokens + len(source) + len(labels), report.targets + len(labels)
        features.append({"input_ids": source, "labels": labels})
    return features, _close(report, len(features), dataset)


def _report(rows: Rows) -> DataReport:
    return DataReport(len(rows), [rows.source], {} if rows.sha256 is None else {rows.source: rows.sha256})


def _as_chat(example: Example) -> ChatExample | None:
    if isinstance(example, AlpacaExample):
        return example.chat()
    return example if isinstance(example, ChatExample) else None


def _template(examples: Sequence[Example], rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The chat template, if the examples are conversations, or can be and the tokenizer has one."""
    wanted = any(
        isinstance(each, ChatExample) or (isinstance(each, AlpacaExample) and tokenizer.chat_template)
        for each in examples
    )
    try:
        return chat_template(tokenizer) if wanted else None
    except DataError as error:
        raise DataError(error.message, file=rows.source, hint=error.hint) from error


def _plan(example: Example, rows: Rows, index: int, template: Template | None, train_on: str) -> Plan:
    if isinstance(example, TextExample):
        return plan_text(example)
    if isinstance(example, AlpacaExample):
        example = example.pair() if template is None else example.chat()
    if isinstance(example, PairExample):
        return plan_pair(example, train_on)
    assert template is not None
    with _placed(rows, index):
        return plan_chat(example, template, train_on)


@contextmanager
def _placed(rows: Rows, index: int) -> Iterator[None]:
    """Gives a DataError the place of row ``index``."""
    try:
        yield
    except DataError as error:
        raise rows.error(index, error.message, key=error.key, hint=error.hint) from error


def _overlong(length: int, index: int, rows: Rows, dataset: Dataset, report: DataReport) -> str | None:
    """Why an example of ``length`` tokens is left out, if it is for its length."""
    if length <= dataset.max_length or dataset.overlong == "truncate":
        return None
    if dataset.overlong == "drop":
        return OVERLONG
    raise rows.error(
        index,
        f"{length} tokens, more than dataset.max_length: {dataset.max_length}",
        hint="Raise dataset.max_length, or set dataset.overlong: truncate or drop.",
    )


def _close(report: DataReport, used: int, dataset: Dataset) -> DataReport:
    report.used = used
    if not used:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        short = OVERLONG in report.dropped or CUT_OFF in report.dropped
        raise DataError(
            f"zero trained tokens: all {report.rows} rows are left out ({reasons})",
            file=report.files[0],
            hint=f"Raise dataset.max_length: {dataset.max_length}." if short else None,
        )
    return report


def _source_and_target(example: Example, rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if isinstance(example, PairExample):
        return example.prompt, example.completion
    if isinstance(example, AlpacaExample):
        return "\n\n".join(filter(None, [example.system, example.request()])), example.output
    if isinstance(example, TextExample):
        raise rows.error(
            index,
            "a text alone has no source and target",
            key="dataset.format",
            hint="An encoder-decoder is trained on prompt and completion, or on instruction and output.",
        )
    last = max(
        (at for at, turn in enumerate(example.messages) if turn["role"] == "assistant" and at not in example.untrained),
        default=0,
    )
    answer, before = example.messages[last].get("content"), example.messages[:last]
    if not isinstance(answer, str) or not answer.strip() or not before:
        raise rows.error(index, "the conversation has no question with a trained answer in text")
    if not tokenizer.chat_template:
        if len(before) == 1:
            return str(before[0].get("content", "")), answer
        return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in before), answer
    with _placed(rows, index):
        return render(tokenizer, before, example.tools, prompt=True), answer


def _ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, target: bool = False, add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of sources, or of targets with EOS."""
    options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
    found = tokenizer(text_target=texts, **options) if target else tokenizer(texts, **options)
    eos = tokenizer.eos_token_id
    if not target or eos is None:
        return list(found["input_ids"])
    # Some tokenizers put a language code after EOS.
    return [ids if eos in ids[-2:] else [*ids, eos] for ids in found["input_ids"]]


def _cut_source(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, *, add_special_tokens: bool
) -> list[int]:
    """The beginning of ``text``, with the special tokens that the tokenizer puts at its end."""
    cut = tokenizer(text, add_special_tokens=add_special_tokens, truncation=True, max_length=max_length)
    return list(cut["input_ids"])
