"""Examples become batches: joined to rows, and padded."""

from __future__ import annotations

import pytest
import torch
from chat_templates import make_tokenizer
from examplekit import example, plain

from peftcli.tasks import settings
from peftcli.tasks.causal_lm import CausalLM
from peftcli.tasks.text.token_ids import pad_labelled, pad_token_id


def test_padding_is_on_the_right() -> None:
    batch = pad_labelled(
        [example({"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}), example({"input_ids": [7], "labels": [7]})],
        pad_token_id=2,
    )
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [7, -100, -100]]  # EOS counts, the same id as padding does not
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_padding_of_packed_rows_is_an_example_of_its_own() -> None:
    batch = pad_labelled(
        [
            example({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]}),
            example({"input_ids": [9], "labels": [-100], "position_ids": [0]}),
        ],
        pad_token_id=2,
    )
    assert batch.keys() == {"input_ids", "labels", "position_ids"}, "a mask would hide the examples"
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, -100, 8], [-100, -100, -100, -100]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_labels_may_have_a_width_of_their_own() -> None:
    batch = pad_labelled(
        [example({"input_ids": [5, 6, 1], "labels": [8, 1]}), example({"input_ids": [7], "labels": [9, 9, 9, 1]})],
        pad_token_id=0,
    )
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 1, -100, -100], [9, 9, 9, 1]]


@pytest.mark.parametrize(
    ("pad", "eos", "expected"), [("<|endoftext|>", "</s>", "<|endoftext|>"), (None, "</s>", "</s>"), (None, None, None)]
)
def test_pad_token_id(pad: str | None, eos: str | None, expected: str | None) -> None:
    tokenizer = make_tokenizer(eos=eos)
    tokenizer.pad_token = pad
    assert pad_token_id(tokenizer) == (0 if expected is None else tokenizer.convert_tokens_to_ids(expected))


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
