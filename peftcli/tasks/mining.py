"""Hard negatives: of each query the documents that an embedding model finds nearest, and that are not right."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peftcli.data.cache import cached
from peftcli.data.rows import Place
from peftcli.data.store import Column, Example, Outcome, Writer

_CHUNK = 512
"""Queries that are compared with all documents at once."""


class Pairs(NamedTuple):
    """The texts of rows."""

    queries: list[str]
    positives: list[str]
    """One of each query."""
    documents: set[str]
    """Further documents, which are no query's positive."""


def nearest_negatives(
    pairs: Pairs,
    embed: Callable[[Sequence[str]], np.ndarray],
    count: int,
    margin: float | None,
    *,
    spread: bool = False,
) -> Mapping[tuple[str, str], Sequence[str]]:
    """Return for each query and its positive the nearest other documents, at most ``count``.

    With ``spread`` they go from the nearest one to the farthest, in steps that grow: 1, 13, 179 and 2,390 of 2,390.

    A document is not taken that is a positive of the same query, or the query itself; nor one whose cosine is within
    ``margin``, a share of the positive's cosine, of it: it may be right as well. None: only what is right is left out.
    ``embed`` returns a vector for each text, (N, D).
    """
    documents = sorted({*pairs.positives, *pairs.documents})
    queries = list(dict.fromkeys(pairs.queries))
    if not queries:
        return {}
    texts = list(dict.fromkeys([*documents, *queries]))
    vectors = embed(texts)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = {text: at for at, text in enumerate(texts)}
    corpus, column = vectors[: len(documents)], {text: at for at, text in enumerate(documents)}
    rights = defaultdict[str, list[int]](list)
    for query, positive in zip(pairs.queries, pairs.positives, strict=True):
        rights[query].append(column[positive])
    found = dict[tuple[str, str], Sequence[str]]()
    for start in range(0, len(pairs.queries), _CHUNK):
        some = list(zip(pairs.queries, pairs.positives, strict=True))[start : start + _CHUNK]
        cosines = vectors[[place[query] for query, _ in some]] @ corpus.T
        for (query, positive), own in zip(some, cosines, strict=True):
            right = own[column[positive]]
            barred = own > right - margin * abs(right) if margin is not None else np.zeros(len(own), bool)
            barred[rights[query]] = True
            barred[column.get(query, [])] = True
            own[barred] = -np.inf
            nearest = np.argsort(-own, kind="stable")[: np.isfinite(own).sum()]
            if spread and count < len(nearest):
                nearest = nearest[_spread(len(nearest), count)]
            found[query, positive] = [documents[at] for at in nearest[:count]]
    return found


def _spread(total: int, count: int) -> np.ndarray:
    """Return ``count`` places, from 0 to ``total`` - 1, whose distances grow."""
    places = np.geomspace(1, total, count).round().astype(int) - 1
    return np.maximum(places, np.arange(count))  # of few places some would be one


def cached_vectors(
    texts: Sequence[str], embed: Callable[[Sequence[str]], Iterable[Sequence[float]]], model: str, source: str
) -> np.ndarray:
    """Return the vector of each text, (N, D), which are computed once for the same texts and ``model``.

    ``source`` is what the cache lists them as.
    """

    def build(folder: Path) -> None:
        with Writer(folder, {"vector": Column("float32")}) as writer:
            for number, vector in enumerate(embed(texts), start=1):
                example = Example({"vector": np.asarray(vector, np.float32)}, 1, 0)
                writer.add([Place(source, number)], [Outcome([example])])
            writer.finish(source=source, fingerprint={})

    digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    store = cached({"vectors_of": digest, "model": model}, build)
    return np.stack([store.value("vector", at) for at in range(len(store))])
