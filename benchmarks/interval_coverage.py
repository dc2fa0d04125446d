"""How often the interval of a difference holds the truth: python benchmarks/interval_coverage.py [RESAMPLINGS] [ROWS].

A population of 20,000 rows with made-up outcomes of two models stands for the world: its metrics are the truth. Time
and again rows are drawn from it as evaluation rows, and the interval is computed as ``compare_with_base`` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from peftcli.adapters.proof.bootstrap import paired_intervals
from peftcli.tasks.parts import Parts, f1, mean_of_some, means, ratio

POPULATION = 20_000
Pair = tuple[Parts, Parts]


def losses(random: np.random.Generator) -> Pair:
    """Skewed losses of rows; the second model's are lower, by another share of each."""
    base = random.gamma(2, 1.5, POPULATION)
    other = base * random.uniform(0.4, 1.05, POPULATION) + random.normal(0, 0.2, POPULATION)
    return means(np.ones(POPULATION), metric=base), means(np.ones(POPULATION), metric=other)


def decisions(random: np.random.Generator) -> Pair:
    """Three rows in ten are of a class; the second model finds them better."""
    wanted, hard = random.random(POPULATION) < 0.3, random.normal(0, 0.8, POPULATION)

    def model(skill: float) -> Parts:
        found = wanted * skill * 2 - skill + hard + random.normal(0, 0.6, POPULATION) > 0
        counts = np.stack([wanted & found, wanted, found], axis=1).astype(float)
        return Parts(counts, lambda sums: {"metric": f1(*sums.T)})

    return model(0.6), model(1.1)


def words(random: np.random.Generator) -> Pair:
    """Sentences of about ten words, some of them hard to hear."""
    count, hard = random.poisson(9, POPULATION) + 1, random.beta(1, 4, POPULATION)
    base, other = (means(count, metric=random.binomial(count, hard * share)) for share in (1.0, 0.7))
    return base, other


def masks(random: np.random.Generator) -> Pair:
    """Pictures of 400 pixels in four classes, the last of which is rare and in half of them."""
    there = random.random((POPULATION, 4)) < [1, 0.8, 0.6, 0.5]
    wanted = random.multinomial(400, [0.6, 0.25, 0.1, 0.05], size=POPULATION) * there
    hard = random.beta(2, 3, POPULATION)[:, None]

    def model(share: float) -> Parts:
        right = random.binomial(wanted, 1 - hard * share)
        wrong = random.multinomial((wanted - right).sum(axis=1), [0.25] * 4)
        counts = np.concatenate([right, wanted, right + wrong], axis=1).astype(float)
        return Parts(counts, mean_iou)

    return model(1.0), model(0.7)


def mean_iou(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The mean IoU of counts of right, wanted and found pixels."""
    right, wanted, found = np.split(sums, 3, axis=1)
    return {"metric": mean_of_some(ratio(right, wanted + found - right))}


METRICS: dict[str, Callable[[np.random.Generator], Pair]] = {
    "mean": losses,
    "F1": decisions,
    "WER": words,
    "mean IoU": masks,
}


def coverage(name: str, resamplings: int, rows: int) -> float:
    """Return the share of resamplings whose interval holds the difference in the population."""
    random, held = np.random.default_rng(0), 0
    base, other = METRICS[name](random)
    truth = [each.metrics_of(each.values.sum(axis=0, keepdims=True))["metric"][0] for each in (base, other)]
    for seed in range(resamplings):
        drawn = random.integers(POPULATION, size=rows)
        some = [Parts(each.values[drawn], each.metrics_of) for each in (base, other)]
        interval = paired_intervals(*some, seed=seed)["metric"]
        held += interval.low <= truth[1] - truth[0] <= interval.high
    return held / resamplings


if __name__ == "__main__":
    times, size = map(int, (sys.argv[1:] + ["200", "200"][len(sys.argv) - 1 :])[:2])
    for metric in METRICS:
        print(f"{metric}: {coverage(metric, times, size):.1%} of {times} intervals of {size} rows")
