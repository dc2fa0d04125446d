"""What each row adds to the sums that metrics are made of: for their intervals, and to see which rows changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MetricsOf = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class RowScore:
    """What evaluation found of one row, all of its examples together."""

    sums: Mapping[str, np.ndarray]
    """Those of ``Loss``, float64."""
    outputs: Sequence[Any]
    """Those of ``Loss``, in order."""
    num_targets: int


@dataclass(frozen=True)
class Parts:
    """The parts of rows, and the metrics of their sums."""

    values: np.ndarray
    """What each row adds: (N, K), float64."""
    metrics_of: MetricsOf
    """Sums over rows (D, K) -> each metric (D,), NaN where it is not defined."""
    right: np.ndarray | None = None
    """Which rows are right: (N,), bool. None: a row is neither right nor wrong."""


def join(*parts: Parts) -> Parts:
    """Return the parts and metrics of all; which rows are right is what the last one says that says it."""
    ends = np.cumsum([each.values.shape[1] for each in parts])[:-1]

    def metrics_of(sums: np.ndarray) -> dict[str, np.ndarray]:
        split = zip(parts, np.split(sums, ends, axis=1), strict=True)
        return {name: value for each, own in split for name, value in each.metrics_of(own).items()}

    right = [each.right for each in parts if each.right is not None]
    return Parts(np.concatenate([each.values for each in parts], axis=1), metrics_of, right[-1] if right else None)


def means(over: np.ndarray, right: np.ndarray | None = None, **values: Any) -> Parts:
    """Return the parts of metrics that are a sum over rows divided by that of ``over``, each (N,)."""

    def metrics_of(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {name: ratio(sums[:, at], sums[:, -1]) for at, name in enumerate(values)}

    return Parts(np.array([*values.values(), over], np.float64).T, metrics_of, right)


def loss_parts(rows: Sequence[RowScore]) -> Parts:
    """Return the parts of a loss that is a mean over targets."""
    return means(targets_of(rows), loss=[float(row.sums["loss"]) for row in rows])


def parts_of_sums(rows: Sequence[RowScore], metrics: Callable[..., Mapping[str, float]]) -> Parts:
    """Return the parts of metrics that need nothing but ``sums`` and targets, by a task's own ``metrics``."""
    shapes = {name: np.shape(value) for name, value in rows[0].sums.items()}
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    flat = [np.concatenate([*(np.ravel(row.sums[name]) for name in shapes), [row.num_targets]]) for row in rows]

    def metrics_of(sums: np.ndarray) -> dict[str, np.ndarray]:
        found = list[Mapping[str, float]]()
        for row in sums:
            split = np.split(row, ends)
            whole = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), split, strict=False)}
            found.append(metrics(whole, (), int(row[-1])))
        names = dict.fromkeys(name for each in found for name in each)
        return {name: np.array([each.get(name, np.nan) for each in found]) for name in names}

    return Parts(np.array(flat, np.float64), metrics_of)


def pearson_parts(wanted: np.ndarray, found: np.ndarray) -> Parts:
    """Return the parts of Pearson's correlation of two numbers of each row; it is 0 where one is constant."""
    x, y = wanted - wanted.mean(), found - wanted.mean()  # of large numbers the squares would lose digits

    def metrics_of(sums: np.ndarray) -> dict[str, np.ndarray]:
        count, x, y, xx, yy, xy = sums.T
        spread = (count * xx - x * x).clip(min=0) * (count * yy - y * y).clip(min=0)
        return {"pearson": np.where(spread > 0, ratio(count * xy - x * y, np.sqrt(spread)), 0.0)}

    return Parts(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1).astype(np.float64), metrics_of)


def targets_of(rows: Sequence[RowScore]) -> np.ndarray:
    """Return the targets of each row: (N,)."""
    return np.array([row.num_targets for row in rows], np.float64)


def ratio(number: np.ndarray, of: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """Divide, with ``empty`` where the divisor is 0."""
    return np.divide(number, of, out=np.full(np.shape(number), empty), where=of != 0)


def f1(right: np.ndarray, wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the F1 of counts: 0 where something is wanted or found and nothing right, NaN where there is nothing."""
    return ratio(2 * right, wanted + found)


def mean_of_some(values: np.ndarray) -> np.ndarray:
    """Return the mean of each row (D, C) over what is not NaN; NaN where nothing is left."""
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0.0).sum(axis=1), there.sum(axis=1))
