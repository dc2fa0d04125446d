"""For any shapes, r and dtypes, every method that wraps layers: inject, save, load and merge agree, or it refuses."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import randomise
from promises import METHOD_SETTINGS
from test_core_properties import Model

from peftcli.core.config import TargetedConfig
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import disabled, inject, set_trainable, unload
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict

LAYERED = [
    name
    for name, row in METHODS.items()
    if issubclass(row.config_class(), TargetedConfig) and name not in ("trainable_tokens", "ln_tuning")
]
"""Methods that adapt linear layers."""
R_IS_ANOTHERS = ("adalora", "oft")
"""Methods for which another setting, which the tests give, decides r."""
ALWAYS_FIT = {"width": 8, "inner": 16}
"""Sizes that no method can refuse at r 4 and the settings of the tests: multiples of 8."""

repeatable = settings(max_examples=15, derandomize=True, database=None)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    fits = draw(st.booleans())
    return {
        "fits": fits,
        "width": ALWAYS_FIT["width"] if fits else draw(st.integers(1, 12)),
        "inner": ALWAYS_FIT["inner"] if fits else draw(st.integers(1, 12)),
        "depth": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "targets": ["up", "gate"]
        if fits
        else draw(st.lists(st.sampled_from(["up", "down", "gate", "embed"]), min_size=1, unique=True)),
        "r": 4 if fits else draw(st.integers(1, 16)),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        "seed": draw(st.integers(0, 100)),
    }


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("method", LAYERED)
@repeatable
@given(case=cases())
def test_any_shape_works_or_is_refused(method: str, case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    base = Model(7, case["width"], case["inner"], case["depth"], case["bias"]).to(case["dtype"]).eval()
    before = [(name, type(module)) for name, module in base.named_modules()]
    cls = METHODS[method].config_class()
    known = {field.name for field in fields(cls)}
    usual = copy.deepcopy(METHOD_SETTINGS.get(method, {}))
    values = {"r": case["r"]} if known >= {"r"} and method not in R_IS_ANOTHERS else {}
    model = copy.deepcopy(base)
    try:
        config = cls(**usual | values, target_modules=case["targets"])
        inject(model, config)
    except AdapterError:
        assert not case["fits"]
        assert [(name, type(module)) for name, module in model.named_modules()] == before
        return
    set_trainable(model, True)
    randomise(model)
    ids = torch.arange(7)[None]
    with torch.no_grad():
        plain, adapted = base(ids), model(ids)
        with disabled(model):
            assert torch.equal(model(ids), plain)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, config, Path(folder))
            loaded = copy.deepcopy(base)
            load_adapter(loaded, config_from_dict(read_config(Path(folder))), Path(folder))
        torch.testing.assert_close(loaded(ids), adapted)
        if config.merge_problem() is None:
            merge(model, config)
            assert list(model.state_dict()) == list(base.state_dict())
            if case["dtype"] != torch.bfloat16:  # whose rounding of the merged weight is as large as small updates
                torch.testing.assert_close(model(ids), adapted, atol=1e-4, rtol=1e-4)
        unload(loaded)
        assert not adapter_layers(loaded)
        assert torch.equal(loaded(ids), plain)
