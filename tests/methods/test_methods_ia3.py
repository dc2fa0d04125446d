"""(IA)^3 scales what its settings say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods.ia3 import IA3Config

BASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (2, 6)),
    "conv1d": (Conv1D(4, 6), (2, 6)),
    "convolution-1d": (nn.Conv1d(6, 4, 3, stride=2), (2, 6, 9)),
    "convolution-2d": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 5)),
    "convolution-3d": (nn.Conv3d(6, 4, (1, 2, 2)), (2, 6, 3, 3, 3)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, dilation=2), (2, 6, 7, 7)),
}


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_outputs_or_inputs_are_scaled_and_so_is_the_merged_weight(name: str, feedforward: bool) -> None:
    base, shape = BASES[name]
    config = IA3Config(target_modules=["x"], feedforward_modules=["x"] if feedforward else [])
    layer: Any = wrap(base, "x", config)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), base(x))
        factors = layer.ia3_l.normal_().flatten()
        scaled = [-1] + [1] * (len(shape) - 2)
        expected = base(x * factors.view(scaled)) if feedforward else base(x) * factors.view(scaled)
        torch.testing.assert_close(layer(x), expected)
        merged = {key: value.clone() for key, value in layer.merged_tensors(dict(base.named_parameters())).items()}
        torch.testing.assert_close(torch.func.functional_call(base, merged, (x,)), expected)


def _feedforward(kind: str, **settings: Any) -> tuple[set[str], IA3Config]:
    config = IA3Config(**settings)
    layers = adapter_layers(inject_into(kind, config))
    return {name for name, layer in layers.items() if layer.feedforward}, config


def inject_into(kind: str, config: IA3Config) -> nn.Module:
    model = tiny(kind)
    inject(model, config)
    return model


def test_the_family_says_which_inputs_are_scaled() -> None:
    found, config = _feedforward("llama")
    assert found == {f"model.layers.{index}.mlp.down_proj" for index in (0, 1)}
    assert config.feedforward_modules == {"down_proj"}
    assert _feedforward("llama", target_modules=["q_proj"])[0] == set()


def test_inputs_to_scale_are_named_by_a_pattern_too() -> None:
    found, config = _feedforward("llama", target_modules=r".*\.(q|down)_proj", feedforward_modules=r".*\.1\..*")
    assert found == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert config.feedforward_modules == {"1.mlp.down_proj", "1.self_attn.q_proj"}


@pytest.mark.parametrize("entries", [["down_porj"], r".*\.down_porj"])
def test_a_misspelt_feedforward_module_is_an_error(entries: Any) -> None:
    with pytest.raises(AdapterError, match="no module of LlamaForCausalLM matches"):
        inject_into("llama", IA3Config(target_modules=r".*_proj", feedforward_modules=entries))
    with pytest.raises(AdapterError, match="is not in target_modules"):
        inject_into("llama", IA3Config(target_modules=["q_proj"], feedforward_modules=["down_proj"]))


def test_a_file_may_name_feedforward_modules_that_the_model_lacks() -> None:
    """PEFT's of Mixtral do: its default has been no module since the experts became parameters."""
    config = IA3Config(target_modules=["k_proj", "w2"], feedforward_modules=["w2"], inference_mode=True)
    layers = adapter_layers(inject_into("mixtral", config))
    assert [*layers] == [f"model.layers.{index}.self_attn.k_proj" for index in (0, 1)]
