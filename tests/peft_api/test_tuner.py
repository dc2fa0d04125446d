"""``model.base_model`` has the methods of PEFT's tuner, and ``PeftModel`` no state beside it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from transformers.pytorch_utils import Conv1D

import peftcli.peft_api
from peftcli.core.layer import AdapterLayer
from peftcli.errors import AdapterError
from peftcli.peft_api.model import PeftModel


@pytest.fixture(scope="module")
def two() -> PeftModel:
    """Two adapters, the first one active. Not to be changed by a test."""
    return _two(peftcli)


def _two(lib: Any) -> Any:
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "one")
    model.add_adapter("two", lib.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name in ("one", "two"):
        tensors = lib.get_peft_model_state_dict(model, adapter_name=name)
        generator = torch.Generator().manual_seed(len(tensors))
        drawn = {key: 0.3 * torch.randn(tensors[key].shape, generator=generator) for key in sorted(tensors)}
        lib.set_peft_model_state_dict(model, drawn, adapter_name=name)
    return model.eval()


@pytest.mark.parametrize(
    "call",
    [
        lambda tuner: tuner.set_adapter(["one", "two"]),
        lambda tuner: tuner.delete_adapter("two"),
        lambda tuner: tuner.merge_adapter(["two"]),
        lambda tuner: (tuner.merge_adapter(), tuner.unmerge_adapter()),
        lambda tuner: tuner.disable_adapter_layers(),
        lambda tuner: (tuner.disable_adapter_layers(), tuner.enable_adapter_layers()),
        lambda tuner: (tuner.disable_adapter_layers(), tuner.set_adapter("two")),
        lambda tuner: (tuner.disable_adapter_layers(), tuner.set_adapter("two"), tuner.enable_adapter_layers()),
        lambda tuner: tuner.set_requires_grad("two"),
    ],
)
def test_a_call_of_the_tuner_does_what_it_does_in_peft(two: PeftModel, call: Any) -> None:
    here, there = copy.deepcopy(two), _two(peft)
    for model in (here, there):
        call(model.base_model)
    torch.testing.assert_close(logits(here, batch("llama")), logits(there, batch("llama")), atol=1e-4, rtol=1e-4)
    assert here.active_adapters == here.base_model.active_adapters == there.base_model.active_adapters
    assert here.get_nb_trainable_parameters() == there.get_nb_trainable_parameters()
    assert here.peft_config is here.base_model.peft_config


@pytest.mark.parametrize("method", ["merge_and_unload", "unload"])
def test_the_tuner_gives_the_base_model_back(two: PeftModel, method: str) -> None:
    options = (
        {"adapter_names": ["two"], "progressbar": False, "safe_merge": True} if method == "merge_and_unload" else {}
    )
    here, there = (getattr(model.base_model, method)(**options) for model in (copy.deepcopy(two), _two(peft)))
    assert type(here) is type(there)
    torch.testing.assert_close(logits(here, batch("llama")), logits(there, batch("llama")), atol=1e-4, rtol=1e-4)


def test_disabled_adapters_are_not_merged_and_stay_disabled(two: PeftModel) -> None:
    model = copy.deepcopy(two)
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))
    with pytest.raises(AdapterError, match="adapters are disabled"):
        model.merge_adapter()
    model.enable_adapter_layers()
    assert torch.equal(logits(model, batch("llama")), logits(two, batch("llama")))


def test_a_model_that_loses_its_values_while_it_is_merged_is_unmerged(two: PeftModel) -> None:
    model = copy.deepcopy(two)
    model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert not model.get_model_status().merged_adapters


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_model_that_is_cast_while_it_is_merged_computes_when_it_is_unmerged(two: PeftModel, by_layer: bool) -> None:
    model = copy.deepcopy(two)
    layers = [layer for layer in model.modules() if isinstance(layer, AdapterLayer)]
    for each in layers if by_layer else [model]:
        each.merge() if by_layer else each.merge_adapter()
    model.bfloat16()
    for each in layers if by_layer else [model]:
        each.unmerge() if by_layer else each.unmerge_adapter()
    wanted = logits(copy.deepcopy(two).bfloat16(), batch("llama"))
    assert torch.equal(logits(model, batch("llama")), wanted)


def test_what_was_frozen_stays_so_when_adapters_are_enabled_again(two: PeftModel) -> None:
    model = copy.deepcopy(two)
    model.set_requires_grad("one", False)
    with model.disable_adapter():
        pass
    assert model.get_nb_trainable_parameters()[0] == 0


def test_each_layer_says_what_state_it_is_in_as_in_peft() -> None:
    seen: list[list[Any]] = []
    for lib in (peftcli.peft_api, peft):
        model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(target_modules=["q_proj", "v_proj"]))
        layers = [layer for layer in model.modules() if isinstance(layer, lib.tuners.tuners_utils.BaseTunerLayer)]
        seen.append([])
        for call in ("merge_adapter", "unmerge_adapter", "disable_adapter_layers", "enable_adapter_layers"):
            getattr(model, call)()
            seen[-1] += [(layer.merged, [*layer.merged_adapters], layer.disable_adapters) for layer in layers]
        layers[0].enable_adapters(False)
        seen[-1] += [layer.disable_adapters for layer in layers]
        with (
            pytest.warns(UserWarning, match="some adapter layers that are enabled and others"),
            model.disable_adapter(),
        ):
            seen[-1] += [layer.disable_adapters for layer in layers]
        seen[-1] += [layer.disable_adapters for layer in layers]
    assert seen[0] == seen[1]


def test_layers_that_were_switched_one_by_one_are_merged(two: PeftModel) -> None:
    here, there = copy.deepcopy(two), _two(peft)
    for model, lib in ((here, peftcli.peft_api), (there, peft)):
        for layer in model.modules():
            if isinstance(layer, lib.tuners.tuners_utils.BaseTunerLayer):
                layer.set_adapter(["one", "two"])
        model.merge_adapter()
    torch.testing.assert_close(logits(here, batch("llama")), logits(there, batch("llama")), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_each_layer_says_its_sizes_as_in_peft() -> None:
    sizes = []
    for lib in (peftcli.peft_api, peft):
        parts = {
            "linear": torch.nn.Linear(3, 4),
            "conv": torch.nn.Conv2d(5, 6, 1),
            "rows": torch.nn.Embedding(7, 8),
            "turned": Conv1D(9, 10),
            "heads": torch.nn.MultiheadAttention(12, 2),
        }
        model = lib.get_peft_model(torch.nn.ModuleDict(parts), lib.LoraConfig(r=2, target_modules=list(parts)))
        layers = [getattr(model.base_model.model, name) for name in parts]
        sizes.append([(layer.in_features, layer.out_features) for layer in layers])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("top", [False, True])
def test_the_saved_numbers_of_vblora_are_pefts(top: bool, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for lib in (peftcli.peft_api, peft):
        config = lib.VBLoRAConfig(target_modules=["q_proj"], num_vectors=9, vector_length=4, save_only_topk_weights=top)
        lib.get_peft_model(tiny("llama"), config).print_savable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_module_that_trains_in_full_gives_its_copies_as_in_peft() -> None:
    for lib in (peftcli.peft_api, peft):
        config = lib.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = lib.get_peft_model(tiny("llama"), config)
        model.add_adapter("other", lib.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        head, projection = model.lm_head, model.model.model.layers[0].self_attn.q_proj
        assert isinstance(head, lib.utils.AuxiliaryTrainingWrapper)
        assert not isinstance(projection, lib.utils.AuxiliaryTrainingWrapper)
        assert sorted(head.modules_to_save) == ["default", "other"]
        assert head.modules_to_save.default.weight.requires_grad
        assert not head.original_module.weight.requires_grad
        assert torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


def test_a_merged_adapter_is_not_deleted(two: PeftModel) -> None:
    model = copy.deepcopy(two)
    model.merge_adapter()
    with pytest.raises(ValueError, match=re.escape("Cannot delete adapter(s) ['one'] while they are merged")):
        model.delete_adapter("one")
    model.delete_adapter("two")
    assert list(model.peft_config) == model.base_model.merged_adapters == ["one"]


def test_a_merge_that_fails_leaves_what_was_merged(two: PeftModel) -> None:
    model = copy.deepcopy(two)
    model.add_adapter("soft", peftcli.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.merge_adapter(["one"])
    before = logits(model, batch("llama"))
    for names in (["soft"], ["nobody"]):
        for call in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=r"soft|nobody|merge"):
                call(adapter_names=names)
            assert model.base_model.merged_adapters == ["one"]
    assert torch.equal(logits(model, batch("llama")), before)


def test_the_targeted_modules_are_pefts() -> None:
    names = []
    for lib in (peftcli, peft):
        config = lib.LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"])
        model = lib.get_peft_model(tiny("llama"), config, "one")
        model.add_adapter("two", lib.LoraConfig(target_modules=["q_proj", "v_proj"]))
        names.append(model.targeted_module_names)
        config = lib.LoraConfig(target_modules=["v_proj"], target_parameters=["q_proj.weight"])
        model = lib.get_peft_model(tiny("llama"), config)
        names[-1] += [*model.targeted_parameter_names, *model.targeted_module_names]
    assert names[0] == names[1]


def test_the_config_of_any_model() -> None:
    for lib in (peftcli.peft_api, peft):
        config = lib.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3])
        tuner = lib.get_peft_model(tiny("llama"), config).base_model
        assert tuner.get_model_config(torch.nn.Linear(1, 1)) == {"model_type": "custom"}
        assert tuner.get_model_config(tuner.model)["model_type"] == "llama"
        assert tuner.prefix == "lora_"


def test_the_prefix_is_that_of_the_methods_own_weights() -> None:
    for lib in (peftcli.peft_api, peft):
        heads = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2)})
        assert lib.get_peft_model(heads, lib.LoraConfig(target_modules=["attention"])).prefix == "lora_"
        dora = lib.LoraConfig(target_modules=["q_proj"], use_dora=True)
        assert lib.get_peft_model(tiny("llama"), dora).prefix == "lora_"
        assert lib.get_peft_model(tiny("llama"), lib.VeraConfig(target_modules=["q_proj"])).prefix == "vera_lambda_"
        rows = lib.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])
        assert lib.get_peft_model(tiny("llama"), rows).prefix == "lora_"


def test_a_loaded_adalora_adapter_shares_out_its_budget_as_in_peft(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"init_r": 6, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 2}
    config = peftcli.AdaLoraConfig(**settings, task_type="CAUSAL_LM")
    peftcli.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    left = []
    for lib in (peftcli, peft):
        model = lib.PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
        for step in range(8):
            model(**labelled("llama")).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        left.append(model.peft_config["default"].rank_pattern)
    assert left[0] == {name.removesuffix(".default"): mask for name, mask in left[1].items()}
    assert any(not all(mask) for mask in left[0].values())


def test_an_adalora_adapter_keeps_the_directions_of_a_pattern() -> None:
    results = []
    pattern = {f"model.layers.{layer}.self_attn.q_proj.lora_E": [True, False, False, True] for layer in (0, 1)}
    for lib in (peftcli.peft_api, peft):
        config: Any = lib.AdaLoraConfig(init_r=4, target_r=2, total_step=300, target_modules=["q_proj"])
        model = lib.get_peft_model(tiny("llama"), config)
        generator = torch.Generator().manual_seed(0)
        tensors = lib.get_peft_model_state_dict(model)
        drawn = {key: torch.randn(tensors[key].shape, generator=generator) for key in sorted(tensors)}
        lib.set_peft_model_state_dict(model, drawn)
        model.resize_modules_by_rank_pattern(pattern, "default")
        left = {key: value.clone() for key, value in lib.get_peft_model_state_dict(model).items()}
        results.append((logits(model.eval(), batch("llama")), left))
    (here, ours), (there, theirs) = results
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, theirs)
    assert {len(value) for key, value in ours.items() if key.endswith("lora_E")} == {2}
