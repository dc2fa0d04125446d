"""Examples in rows: how they are joined."""

from __future__ import annotations

from examplekit import example, plain

from peftcli.tasks import settings
from peftcli.tasks.causal_lm import CausalLM

TASK = CausalLM(settings.CausalLMSettings(), None, base=None)


def test_join_starts_positions_anew_and_drops_the_first_target_of_each() -> None:
    row = TASK.join(
        [
            example({"input_ids": [5, 6, 2], "labels": [5, -100, 2]}, 1),
            example({"input_ids": [7], "labels": [7]}, 0),
            example({"input_ids": [8, 9], "labels": [8, 9]}, 1),
        ]
    )
    assert plain(row) == {
        "input_ids": [5, 6, 2, 7, 8, 9],
        "labels": [-100, -100, 2, -100, -100, 9],
        "position_ids": [0, 1, 2, 0, 0, 1],
    }
    assert (row.size, row.num_targets) == (6, 2)


def test_join_leaves_its_examples_as_they_are() -> None:
    one = example({"input_ids": [5, 6], "labels": [5, 6]})
    TASK.join([one])
    assert plain(one) == {"input_ids": [5, 6], "labels": [5, 6]}
