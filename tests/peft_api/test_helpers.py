"""PEFT's helpers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, labelled, logits, randomise, tiny
from torch import nn

import peftcli
from peftcli.errors import AdapterError
from peftcli.methods.lora.variants import dora
from peftcli.peft_api import helpers


def _adapted(method: str = "LoraConfig", **settings: Any) -> Any:
    torch.manual_seed(0)
    return peftcli.get_peft_model(tiny("llama"), getattr(peftcli, method)(**settings))


@pytest.mark.parametrize("method", ["LoraConfig", "AdaLoraConfig"])
def test_a_scale_of_half_is_half_the_update_also_when_merged(method: str) -> None:
    model = _adapted(method, **({"total_step": 9} if method == "AdaLoraConfig" else {"use_rslora": True}))
    randomise(model)
    model.eval()
    whole, inputs = logits(model, batch("llama")), batch("llama")
    with helpers.rescale_adapter_scale(model, 0), model.disable_adapter():
        base = logits(model, inputs)
    with helpers.rescale_adapter_scale(model, 0):
        torch.testing.assert_close(logits(model, inputs), base)
    with helpers.rescale_adapter_scale(model, 0.5):
        half = logits(model, inputs)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, inputs), half, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
    assert not torch.allclose(half, whole)
    torch.testing.assert_close(logits(model, inputs), whole)


def test_a_scale_needs_a_number_and_lora() -> None:
    with pytest.raises(TypeError, match="got <class 'str'>"), helpers.rescale_adapter_scale(_adapted(), "2"):  # type: ignore[arg-type]
        pass
    with (
        pytest.raises(AdapterError, match="only supported for models with `LoraLayer`s"),
        helpers.rescale_adapter_scale(_adapted("IA3Config"), 2),
    ):
        pass
    with (
        pytest.raises(AdapterError, match="no LoRA layers"),
        helpers.disable_input_dtype_casting(_adapted("IA3Config")),
    ):
        pass


def test_hooks_may_convert_the_weights_while_inputs_are_left_as_they_are() -> None:
    """As diffusers does it: weights in half precision, converted for the length of each layer's forward."""
    model = peftcli.get_peft_model(
        nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 2)),
        peftcli.LoraConfig(target_modules=["0"], modules_to_save=["1"]),
    )
    inputs = torch.randn(4, 10)
    expected = model(inputs)

    def convert(dtype: torch.dtype) -> Any:
        def hook(module: nn.Module, *values: Any) -> None:
            for value in module.parameters(recurse=False):
                value.data = value.data.to(dtype)

        return hook

    model.half()
    for module in model.modules():
        module.register_forward_pre_hook(convert(torch.float32))
        module.register_forward_hook(convert(torch.float16))
    with helpers.disable_input_dtype_casting(model):
        found = model(inputs)
    torch.testing.assert_close(found.float(), expected, atol=5e-3, rtol=5e-3)
    with helpers.disable_input_dtype_casting(model, active=False), pytest.raises(RuntimeError, match="same dtype"):
        model(inputs)


def test_norms_of_dora_are_kept_until_a_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _adapted(use_dora=True)
    randomise(model)
    model.eval()
    expected, computed = logits(model, batch("llama")), []
    adapted_weight = dora._adapted_weight
    monkeypatch.setattr(dora, "_adapted_weight", lambda layer: (computed.append(layer), adapted_weight(layer))[1])
    with helpers.DoraCaching():
        for _ in range(2):
            torch.testing.assert_close(logits(model, batch("llama")), expected)
        assert len(computed) == 4
        randomise(model, seed=2)
        changed = logits(model, batch("llama"))
    torch.testing.assert_close(changed, logits(model, batch("llama")))
    assert not torch.allclose(changed, expected)
    helpers.DoraCaching()(enabled=True)
    model.train()
    computed.clear()
    model(**batch("llama"))
    model(**batch("llama"))
    assert len(computed) == 8
    helpers.DoraCaching()(enabled=False)
    with torch.inference_mode(), helpers.DoraCaching():
        made = _adapted(use_dora=True).eval()
        torch.testing.assert_close(logits(made, batch("llama")), logits(tiny("llama"), batch("llama")))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_targets_of_kappatune_are_pefts(kind: str) -> None:
    model = tiny(kind)
    assert helpers.find_kappa_target_modules(model) == peft.find_kappa_target_modules(model, show_progress=False)
    here = helpers.KappaTuneSelector(model)
    there = peft.helpers.KappaTuneSelector(model, show_progress=False)
    for chosen in ({"num_modules": 3}, {"threshold": 100.0}, {}):
        assert here.get_best_targets(**chosen) == there.get_best_targets(**chosen)
        assert here.get_best_target_parameters(**chosen) == there.get_best_target_parameters(**chosen)


def test_an_adapter_folder_is_told_from_others(tmp_path: Path) -> None:
    _adapted().save_pretrained(tmp_path / "adapter")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text('{"foo": "bar"}')
    assert helpers.check_if_peft_model(tmp_path / "adapter")
    assert not helpers.check_if_peft_model(tmp_path / "broken")
    assert not helpers.check_if_peft_model(tmp_path)


def test_forward_and_generate_show_the_arguments_of_the_model_inside() -> None:
    model = _adapted()
    helpers.update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "generation_config" in inspect.signature(model.generate).parameters
    assert torch.isfinite(logits(model, batch("llama"))).all()
    with pytest.raises(AdapterError, match="forward, generate or all"):
        helpers.update_signature(model, "backward")


class _Trainer:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class _AddingTrainer(helpers.MontecloraTrainerMixin, _Trainer):
    pass


def test_the_mixin_adds_the_penalty_of_monteclora_to_a_trainers_loss() -> None:
    model = _adapted(target_modules=["q_proj"], monteclora_config=peftcli.MontecloraConfig(num_samples=2))
    model.train()
    losses = []
    for trainer in (_Trainer(), _AddingTrainer()):
        torch.manual_seed(0)
        losses.append(trainer.compute_loss(model, labelled("llama")))
    torch.testing.assert_close(losses[1] - losses[0], model._get_monteclora_loss(), atol=1e-6, rtol=1e-3)
    assert losses[1] != losses[0]
    torch.manual_seed(0)
    loss, outputs = _AddingTrainer().compute_loss(model, labelled("llama"), return_outputs=True)
    assert (loss, outputs.loss) == (losses[1], losses[0])
