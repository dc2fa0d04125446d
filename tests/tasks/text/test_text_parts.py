"""Which rows of a micro-batch a CPU computes together."""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from taskkit import CASES, UNPAIRED
from trainkit import run_recipe

from peftcli.data.store import Example
from peftcli.tasks.base import Batch
from peftcli.tasks.text.fast.parts import _PART_COST, parts_of, parts_of_like_length
from peftcli.train import batches, loop

DPO = CASES["preference"]
KTO = replace(DPO, task={"type": "preference", "loss": "kto"}, rows=lambda: UNPAIRED)


def example(ids: np.ndarray) -> Example:
    return Example({"input_ids": ids}, len(ids), 1)


@given(sizes=st.lists(st.integers(1, 50)), limit=st.integers(1, 100))
def test_parts_are_as_large_as_they_may_be(sizes: list[int], limit: int) -> None:
    rows = [[example(np.full(size, at))] for at, size in enumerate(sizes)]
    parts = [sizes[part] for part in parts_of(rows, limit)]
    assert [size for part in parts for size in part] == sizes
    assert all(len(part) == 1 or sum(part) <= limit for part in parts if part)
    assert all(sum(part) + after[0] > limit for part, after in pairwise(parts))


@pytest.mark.parametrize(
    ("shared", "own", "count"),
    [
        (500, 20, 1),  # 660 tokens, of which 500 would be computed eight times
        (20, 200, 3),  # 1,620 tokens, and 40 more for two parts more
        (200, 200, 1),  # 1,800 tokens, and 200 more for each part more
    ],
)
def test_a_long_beginning_that_rows_share_is_not_computed_often(shared: int, own: int, count: int) -> None:
    rows = [[example(np.array([*range(shared), *range(1000 * at, 1000 * at + own)]))] for at in range(1, 9)]
    assert len(parts_of(rows, 640)) == count


@given(sizes=st.lists(st.integers(1, 200), max_size=12).map(sorted))
def test_padded_parts_are_of_like_length(sizes: list[int]) -> None:
    parts = [sizes[part] for part in parts_of_like_length(sizes)]
    assert [size for part in parts for size in part] == sizes

    def cost(parts: list[list[int]]) -> int:
        return sum(len(part) * max(part) + _PART_COST for part in parts)

    cuts = itertools.product([False, True], repeat=max(0, len(sizes) - 1))
    ends = ([0, *(at for at, cut in enumerate(each, 1) if cut), len(sizes)] for each in cuts)
    assert not sizes or cost(parts) == min(cost([sizes[a:b] for a, b in pairwise(each)]) for each in ends)


@pytest.mark.grid
@pytest.mark.parametrize("name", ["seq2seq_lm", "sequence_classification"])
def test_a_padded_model_learns_the_same_in_parts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder-decoder, and a classifier that is made to compute padding."""
    monkeypatch.setattr("peftcli.train.forward.unpad", lambda model, config, probe: False)
    recipe, losses, shares = CASES[name].write(tmp_path), list[list[float]](), list[float]()
    settings = ("training.max_steps=3", "training.per_device_train_batch_size=4", "training.bf16=false")
    for cost in (0, 10**9):
        monkeypatch.setattr("peftcli.tasks.text.fast.parts._PART_COST", cost)
        done = run_recipe(recipe, *settings, f"training.output_dir={tmp_path / str(cost)}")
        losses.append(done.losses)
        shares.append(done.run["data"]["efficiency"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert shares[0] == 1 > shares[1]


@pytest.mark.parametrize(
    ("case", "settings", "parts"),
    [
        (DPO, [], 4),
        (KTO, [], 1),
        (CASES["feature_extraction"], [], 1),
        (CASES["causal_lm"], [], 4),
        (CASES["causal_lm"], ["method.velora_config={}"], 1),
        (CASES["causal_lm"], ["method={type: lily, r: 2}"], 1),
    ],
    ids=["dpo", "kto", "embeddings", "a language model", "velora", "lily"],
)
def test_what_compares_rows_stays_whole(
    case: Any, settings: list[str], parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss = list[Batch](), loop.Gradients.loss

    def noted(gradients: loop.Gradients, batch: Batch) -> torch.Tensor:
        calls.append(batch)
        return loss(gradients, batch)

    monkeypatch.setattr(loop.Gradients, "loss", noted)
    monkeypatch.setattr("peftcli.tasks.text.fast.parts._COST", 100)
    monkeypatch.setattr("peftcli.tasks.text.fast.parts._PART_COST", 0)
    monkeypatch.setattr(batches, "PART", 1)
    run_recipe(case.write(tmp_path), "training.max_steps=1", "training.per_device_train_batch_size=4", *settings)
    assert len(calls) == parts
