"""Metrics of generated texts, which tasks measure in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module

import numpy as np
import regex

from peftcli.errors import DataError
from peftcli.tasks.base import Loss
from peftcli.tasks.parts import Parts, join, means
from peftcli.tasks.settings import GeneratedSettings
from peftcli.tasks.text.answers import UNSPACED
from peftcli.tasks.text.own_code import as_data_error, own_function

_KEY = "task.metric_code"
OwnMetric = Callable[[list[str], list[str]], dict[str, float]]
_LATIN, _LETTER = regex.compile(r"\p{Latin}"), regex.compile(r"\p{L}")
_WORD = regex.compile(rf"{UNSPACED.pattern}\p{{M}}*|(?:(?!{UNSPACED.pattern})[[\w\p{{M}}]--_])+", regex.V1)
"""A word, or one letter of a script without blanks between words."""


def with_texts(loss: Loss, wanted: Sequence[str] | None, generate: Callable[[], Iterable[str]]) -> Loss:
    """The loss of a batch, with what is wanted of each row and what the model says as outputs; None: with neither."""
    return loss if wanted is None else replace(loss, outputs=list(zip(wanted, generate(), strict=True)))


def text_metrics(names: Iterable[str], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Compute metrics of ``METRICS`` over pairs of the wanted text and the generated one."""
    wanted, found = ([pair[side] for pair in pairs] for side in (0, 1))
    return {name: METRICS[name](wanted, found) for name in names}


def text_parts(names: Iterable[str], pairs: Sequence[tuple[str, str]]) -> Parts:
    """Return the parts of metrics of ``METRICS``, one pair of texts a row. A row is right by the last of them."""
    wanted, found = ([pair[side] for pair in pairs] for side in (0, 1))
    return join(*(_PARTS[name](name, wanted, found) for name in names))


def own_metric_of(settings: GeneratedSettings) -> OwnMetric | None:
    """The user's own metric that a task's settings name; None: they name none.

    Raises:
        DataError: the settings do not allow its code, or there is no such function.
    """
    if settings.metric_code is None:
        return None
    return own_metric(settings.metric_code, allowed=settings.trust_metric_code)


def generated_metrics(
    settings: GeneratedSettings, own: OwnMetric | None, pairs: Sequence[tuple[str, str]], known: Mapping[str, float]
) -> dict[str, float]:
    """Compute the metrics of generated answers that settings name, beside those that are ``known``.

    Raises:
        DataError: the user's own function fails, or returns one under a name that is taken.
    """
    found = {**known, **text_metrics(settings.generate_metrics, pairs)}
    added = own(*map(list, zip(*pairs, strict=True))) if own else {}
    if taken := sorted(found.keys() & added.keys()):
        message = f"returns {', '.join(taken)}, which the task measures itself"
        raise DataError(message, key=_KEY, hint="return it under another name")
    return found | added


def own_metric(name: str, *, allowed: bool) -> OwnMetric:
    """Load a function of the user's own file, named as ``metrics.py:score``, which compares like those of ``METRICS``.

    Raises:
        DataError: its code is not ``allowed``, or there is no such function. The result raises it too, where the
            function fails or returns no numbers.
    """
    own, function = own_function(name, _KEY, allowed=allowed, switch="task.trust_metric_code"), name.rpartition(":")[2]

    def compare(wanted: list[str], found: list[str]) -> dict[str, float]:
        with as_data_error(_KEY):
            value = own(found, wanted)
            values = value if isinstance(value, Mapping) else {function: value}
            return {str(each): float(number) for each, number in values.items()}

    return compare


def _exact_matches(wanted: list[str], found: list[str]) -> np.ndarray:
    return np.array([one.strip() == other.strip() for one, other in zip(wanted, found, strict=True)])


class _Words:
    """The words of texts in any script. rouge-score's own are of the letters a to z: other texts have none."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def _rouge_l(wanted: list[str], found: list[str]) -> np.ndarray:
    from rouge_score.rouge_scorer import RougeScorer

    def is_latin(text: str) -> bool:
        return 2 * len(_LATIN.findall(text)) >= len(_LETTER.findall(text))

    usual, others = RougeScorer(["rougeL"]), RougeScorer(["rougeL"], tokenizer=_Words())
    return np.array(
        [
            (usual if is_latin(one) else others).score(one, other)["rougeL"].fmeasure
            for one, other in zip(wanted, found, strict=True)
        ]
    )


def _mean_parts(name: str, wanted: list[str], found: list[str]) -> Parts:
    values = {"exact_match": _exact_matches, "rouge_l": _rouge_l}[name](wanted, found)
    right = values if name == "exact_match" else None
    return means(np.ones(len(wanted)), right, **{name: values})


def _error_parts(name: str, wanted: list[str], found: list[str]) -> Parts:
    """Wrong, missing and surplus words or letters, and those that are wanted."""
    jiwer = import_module("jiwer")
    compared = (jiwer.process_words if name == "wer" else jiwer.process_characters)(wanted, found)
    errors = [
        sum(
            max(part.ref_end_idx - part.ref_start_idx, part.hyp_end_idx - part.hyp_start_idx)
            for part in each
            if part.type != "equal"
        )
        for each in compared.alignments
    ]
    right = np.array(errors) == 0 if name == "wer" else None
    return means(np.array(list(map(len, compared.references))), right, **{name: errors})


def _corpus_parts(name: str, wanted: list[str], found: list[str]) -> Parts:
    """Sacrebleu's own counts of sequences that both texts share, for its own score of their sums."""
    sacrebleu = import_module("sacrebleu")
    metric = sacrebleu.BLEU() if name == "bleu" else sacrebleu.CHRF()
    counts = np.array(metric._extract_corpus_statistics(found, [wanted]), np.float64)

    def metrics_of(sums: np.ndarray) -> dict[str, np.ndarray]:
        scores = [metric._compute_score_from_stats(row).score for row in sums.round().astype(int).tolist()]
        return {name: np.array(scores)}

    return Parts(counts, metrics_of)


_PARTS: dict[str, Callable[[str, list[str], list[str]], Parts]] = {
    "wer": _error_parts,
    "cer": _error_parts,
    "exact_match": _mean_parts,
    "bleu": _corpus_parts,
    "chrf": _corpus_parts,
    "rouge_l": _mean_parts,
}


METRICS: dict[str, Callable[[list[str], list[str]], float]] = {
    "wer": lambda wanted, found: import_module("jiwer").wer(wanted, found),
    "cer": lambda wanted, found: import_module("jiwer").cer(wanted, found),
    "exact_match": lambda wanted, found: float(_exact_matches(wanted, found).mean()),
    "bleu": lambda wanted, found: import_module("sacrebleu").corpus_bleu(found, [wanted]).score,
    "chrf": lambda wanted, found: import_module("sacrebleu").corpus_chrf(found, [wanted]).score,
    "rouge_l": lambda wanted, found: float(_rouge_l(wanted, found).mean()),
}
"""Each compares the wanted texts of a corpus with the generated ones. Word error rates, BLEU (0 to 100,
https://aclanthology.org/P02-1040), chrF (0 to 100, https://aclanthology.org/W15-3049), the mean F1 of ROUGE-L (0 to 1,
https://aclanthology.org/W04-1013)."""
PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge_l": "rouge_score"}
"""The package of the extra ``metrics`` that each needs."""
