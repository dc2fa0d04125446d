"""Packing: several examples share a row of a batch without seeing each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftcli.data.store import Example
from peftcli.tasks.text.chat import IGNORED


def join(examples: Sequence[Example]) -> Example:
    """Join examples to one row. ``position_ids`` restart at 0 in each, by which a model separates them.

    The first label of each does not count in the loss, since it would be predicted from the previous example.
    """
    arrays = {
        "input_ids": np.concatenate([each.arrays["input_ids"] for each in examples]),
        "labels": np.concatenate([[IGNORED, *each.arrays["labels"][1:]] for each in examples]),
        "position_ids": np.concatenate([np.arange(len(each.arrays["input_ids"])) for each in examples]),
    }
    return Example(arrays, sum(each.size for each in examples), sum(each.num_targets for each in examples))
