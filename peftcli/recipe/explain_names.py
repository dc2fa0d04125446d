"""Help on any name that peftcli says: a setting, section, method, task, finding, exit code, metric or message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from peftcli.errors import PeftcliError, UsageError, exit_codes
from peftcli.recipe.checks import FORGETTING, MAX_REGRESSION
from peftcli.recipe.messages import MESSAGES, Message, find_message
from peftcli.recipe.names import REMEDIES, SAME, closest, find_alias, find_task_alias
from peftcli.recipe.reference import Explanation, explained_settings
from peftcli.tasks.findings import FINDINGS
from peftcli.tasks.metrics import METRICS, Metric, find_metric

_NEAR = 0.65
"""How similar a suggested name must be; 1 is equal. With less than this, nearly any word gets a suggestion."""
_CODE = re.compile(r"(?:exit |exit[ _-]?code |code )?([0-9]{1,3})", re.IGNORECASE)
_LISTED = re.compile(r"\[[0-9]+\]")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*")
_FORGETTING = (
    "By how much the loss of the base model on texts that ship with peftcli (English, nine other languages, code, "
    "conversations) has risen with the adapter, in nats a token. Of tasks that write no text: the share of the "
    "evaluation rows that the base model has right and the adapter has wrong. See docs/forgetting.md."
)
_REGRESSION = (
    "By how much a metric may be worse than in an earlier run on the same evaluation rows, decided by the 95 % "
    "interval of the difference where that is on one side. See docs/proof.md."
)
_REGRESSION_GATE = f"gates:\n  {MAX_REGRESSION}: {{against: outputs/last/run.json, eval_loss: 2%}}"
_FORGETTING_GATE = f'gates:\n  {FORGETTING}: "<= 0.05"'
_MAX_TEXT, _MAX_LINES = 10_000, 5
"""Characters of a message that are read, and lines of an error after which none is added."""


def explain(name: str) -> Explanation:
    """Explain a name, given in full or by its last part, or the text of an error or warning.

    Items of lists are accepted as in error messages: ``dataset.mix[1].weight``.

    Raises:
        UsageError: the name is unknown.
    """
    key = _LISTED.sub("", name.strip())
    section, _, last = key.rpartition(".")
    if ours := SAME.get(section or "training", {}).get(last):
        key = f"{section or 'training'}.{ours}"
    if found := _find(key, explainable()):
        return found
    above = _find(key.rpartition(".")[0], explainable())
    if above and (above.type or "").startswith("a mapping of names"):  # names of the user's: gates.eval_loss
        return above
    if (code := _CODE.fullmatch(key)) and code[1] in explainable():
        return explainable()[code[1]]
    if metric := find_metric(key):
        return _explain_metric(metric)
    if re.search(r"\s", key) and (found := _find_in_text(name[:_MAX_TEXT])):
        return found
    last = key.rpartition(".")[2]
    alias = find_alias(last, key.partition(".")[0]) or find_task_alias(last) or ""
    suggestion = alias.partition(":")[0] or _similar(key)
    meant = f"did you mean {suggestion!r}?" if suggestion else "`peftcli schema` lists every setting"
    raise UsageError(f"unknown name: {key[:60]!r}", hint=REMEDIES.get(last) or meant)


def help_on(error: PeftcliError) -> str | None:
    """Return the name that ``explain`` knows and that says more of an error; None without one, or a long error."""
    text = str(error)
    if text.count("\n") >= _MAX_LINES or "peftcli explain" in text:
        return None
    if message := find_message(error.message):
        return message.name
    known, words = explainable(), _NAME.findall(error.message)
    if finding := next((word for word in words if word in FINDINGS), None):
        return finding
    key = _LISTED.sub("", error.key or "")
    keys = [name for name in (key, f"method.{key}") if key and name in known]
    return next((name for name in keys if known[name].kind == "setting"), None)


@cache
def explainable() -> dict[str, Explanation]:
    """Return the explanations of all names."""
    return {each.key: each for each in [*_topics(), *explained_settings().values()]}


def _topics() -> Iterator[Explanation]:
    for name, kind in FINDINGS.items():
        example = f"dataset:\n  allow: [{name}]" if kind.can_stop and name != "bad_rows" else None
        yield Explanation(name, "finding", f"Rows that {kind.summary}. {kind.advice}", kind.levels, example=example)
    for code, meaning in exit_codes().items():
        yield Explanation(str(code), "exit code", meaning)
    yield from map(_explain_metric, METRICS.values())
    bound = "a share of the earlier value, as 2%, or a number in the metric's unit"
    yield Explanation(MAX_REGRESSION, "metric", _REGRESSION, bound, example=_REGRESSION_GATE)
    yield Explanation(FORGETTING, "metric", _FORGETTING, "less is better", example=_FORGETTING_GATE)
    yield from map(_explain_message, MESSAGES.values())


def _explain_metric(metric: Metric) -> Explanation:
    name = f"eval_{metric.name}"
    bound = "<= 1.2" if "less is better" in metric.scale else ">= 0.9"
    return Explanation(name, "metric", metric.summary, metric.scale, example=f'gates:\n  {name}: "{bound}"')


def _explain_message(message: Message) -> Explanation:
    return Explanation(message.name, "message", f"{message.meaning} {message.advice}", link=f"docs/{message.page}")


def _find(key: str, known: Mapping[str, Explanation]) -> Explanation | None:
    """Find a key by its full or its last name."""
    ends = [found for name, found in known.items() if name.endswith(f".{key}")] if key else []
    return known.get(key) or min(ends, key=lambda found: found.key.count("."), default=None)


def _find_in_text(text: str) -> Explanation | None:
    """Find what a pasted text is about: a message, else the finding, setting, metric or exit code that it names."""
    if message := find_message(text):
        return explainable()[message.name]
    words = _NAME.findall(_LISTED.sub("", text))
    named = [explainable()[word] for word in words if word in explainable() and ("." in word or "_" in word)]
    named.sort(key=lambda found: found.kind != "finding")
    metrics = (find_metric(word) for word in words if word.startswith("eval_"))
    code = re.search(r"exit code ([0-9]{1,3})\b", text)
    metric = next(filter(None, metrics), None)
    if named or metric:
        return named[0] if named else _explain_metric(metric) if metric else None
    return explainable().get(code[1]) if code else None


def _similar(key: str) -> str | None:
    """Return the name most similar to ``key``: one without a section first, then a full one, then a last part."""
    known = [name.removeprefix("eval_") if key[:5] != "eval_" else name for name in explainable()]
    return (
        closest(key, (name for name in known if "." not in name), _NEAR)
        or closest(key, (name for name in known if "." in key), _NEAR)
        or closest(key, (name.rpartition(".")[2] for name in known), _NEAR)
    )
