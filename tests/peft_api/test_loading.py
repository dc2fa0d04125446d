"""The keywords of PEFT's loading functions: what they do, and which are refused."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from models_tiny import batch, logits, randomise, tiny
from promises import base_settings
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import peftcli
from peftcli.adapters.load import apply_adapter, find_adapter
from peftcli.core.files import read_tensors, write_adapter, write_tensor_file
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS
from peftcli.models.base import LoadedModel
from peftcli.peft_api import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    PeftModel,
    get_peft_model,
    save_as_lora,
)


def _config(lib: ModuleType, **settings: Any) -> Any:
    return lib.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter's folder, and the base model's beside it."""
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, _config(peftcli, base_model_name_or_path=str(tmp_path / "base")))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_concerns_a_base_model_changes_nothing(saved: Path) -> None:
    expected = logits(PeftModel.from_pretrained(tiny("llama"), saved), batch("llama"))
    model = PeftModel.from_pretrained(
        tiny("llama"),
        saved,
        torch_dtype=torch.float16,
        device_map={"": "cpu"},
        max_memory={"cpu": "1GB"},
        offload_folder="off",
        low_cpu_mem_usage=True,
        ephemeral_gpu_offload=True,
        torch_device="cpu",
    )
    assert torch.equal(logits(model, batch("llama")), expected)
    result = model.load_adapter(saved, "other", torch_device="cpu", low_cpu_mem_usage=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    model.set_adapter("other")
    assert torch.equal(logits(model, batch("llama")), expected)


def test_an_unknown_option_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match="subfoler: unknown option; did you mean subfolder"):
        PeftModel.from_pretrained(tiny("llama"), saved, subfoler="x")
    model = PeftModel.from_pretrained(tiny("llama"), saved)
    with pytest.raises(AdapterError, match="load_in_2bit: unknown option"):
        model.load_adapter(saved, "other", load_in_2bit=True)
    assert list(model.peft_config) == ["default"]


def test_a_subfolder(saved: Path) -> None:
    loaded = PeftModel.from_pretrained(tiny("llama"), saved.parent, subfolder="adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=saved.parent, subfolder="adapter", dtype=torch.bfloat16
    )
    assert auto.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert adapter_state(loaded).keys() == adapter_state(auto).keys()


def test_another_config_in_place_of_the_adapters_own(saved: Path) -> None:
    config = _config(peftcli, lora_alpha=32)
    for model in (
        PeftModel.from_pretrained(tiny("llama"), saved, config=config),
        AutoPeftModelForCausalLM.from_pretrained(saved, config=config),
    ):
        assert model.peft_config["default"].lora_alpha == 32
        assert next(iter(adapter_layers(model).values())).scaling == 16


def test_a_base_model_of_a_library_that_is_not_allowed(saved: Path) -> None:
    config = (saved / "adapter_config.json").read_text()
    noted = '"auto_mapping": {"parent_library": "os", "base_model_class": "system"},'
    (saved / "adapter_config.json").write_text(config.replace('"CAUSAL_LM"', "null").replace("{", "{" + noted, 1))
    with pytest.raises(AdapterError, match="'os', which is not in the import allowlist"):
        AutoPeftModelForCausalLM.from_pretrained(saved)
    AutoPeftModelForCausalLM.from_pretrained(saved, import_allowlist=["os"])


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)


class New(nn.Module):
    _checkpoint_conversion_mapping: ClassVar[dict[str, str]] = {r"^body": "model.language"}

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"language": nn.Linear(4, 4)})


def test_an_adapter_for_another_task_than_the_class_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match=r"CAUSAL_LM is not the task of AutoPeft.*\nuse AutoPeftModelForC"):
        AutoPeftModelForFeatureExtraction.from_pretrained(saved)


def test_a_config_of_pefts_own_is_refused() -> None:
    for make in (get_peft_model, lambda model, config: peftcli.inject_adapter_in_model(config, model)):
        with pytest.raises(
            TypeError, match=r"peft_config: expected .* found peft.tuners.lora.*LoraConfig\nmake it with"
        ):
            make(tiny("llama"), _config(peft))
    with pytest.raises(TypeError, match=r"peft_config: expected .*, found builtins\.dict"):
        get_peft_model(tiny("llama"), _config(peftcli)).add_adapter("other", {"r": 2})


def test_a_folder_of_the_users_home_is_written_where_it_is_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    model = PeftModel.from_pretrained(tiny("llama"), "~/adapter")
    model.save_pretrained("~/again")
    model.peft_config["default"].save_pretrained("~/config")
    with pytest.warns(peftcli.PeftWarning, match="is LoRA already"):
        save_as_lora("~/lora", model, rank=2)
    for name in ("~/again", "~/lora"):
        loaded = PeftModel.from_pretrained(tiny("llama"), name)
        torch.testing.assert_close(logits(loaded, batch("llama")), logits(model, batch("llama")))
    assert peftcli.PeftConfig.from_pretrained("~/config").r == 2
    assert not list(Path().iterdir())


@pytest.mark.parametrize("given", [True, False])
def test_names_are_mapped(tmp_path: Path, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    old = get_peft_model(Old(), peftcli.LoraConfig(target_modules=["body"], init_lora_weights=False))
    old.save_pretrained(tmp_path)
    options: dict[str, Any] = {"config": peftcli.LoraConfig(target_modules=["language"])}
    if given:
        monkeypatch.setattr(New, "_checkpoint_conversion_mapping", {})
        with pytest.raises(AdapterError, match="missing"):
            PeftModel.from_pretrained(New(), tmp_path, **options)
        options["key_mapping"] = {r"^body": "model.language"}
    new = PeftModel.from_pretrained(New(), tmp_path, **options)
    found, expected = adapter_state(new.get_base_model()), adapter_state(old.get_base_model())
    assert set(found) == {name.replace("body", "model.language") for name in expected}
    for name, value in expected.items():
        assert torch.equal(found[name.replace("body", "model.language")], value)


@pytest.mark.parametrize("targets", [["q_proj"], r".*language_model.*(q_proj|up_proj)"])
def test_names_that_modules_had_in_older_transformers_are_found(targets: Any, tmp_path: Path) -> None:
    kind = "gemma3_towers"
    model = get_peft_model(tiny(kind), peftcli.LoraConfig(r=2, target_modules=targets)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    expected = logits(model, batch(kind))
    older = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}
    tensors = {
        next(f"base_model.model.{then}{name.split(now)[1]}" for now, then in older.items() if now in name): value
        for name, value in read_tensors(tmp_path).items()
    }
    write_tensor_file(tmp_path / "adapter_model.safetensors", tensors)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    loaded.load_adapter(tmp_path, "default")  # in the place of the first
    plain = tiny(kind)
    apply_adapter(LoadedModel(plain), find_adapter(str(tmp_path)))
    for each in (loaded, plain, peft.PeftModel.from_pretrained(tiny(kind), tmp_path)):
        torch.testing.assert_close(logits(each, batch(kind)), expected)


def test_targets_that_had_other_names_in_older_transformers_are_found(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    settings = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)

    def base() -> Any:
        torch.manual_seed(0)
        return ViTForImageClassification(settings).eval()

    if "vit.layers.0.attention.q_proj" not in dict(base().named_modules()):
        pytest.skip("this transformers has the older names")
    config = peftcli.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    config.rank_pattern, config.alpha_pattern = {"q_proj": 4}, {"layers.1.attention.v_proj": 64}
    model = get_peft_model(base(), config).eval()
    randomise(model)
    config.target_modules = {"query", "value"}
    config.rank_pattern, config.alpha_pattern = {"query": 4}, {"layer.1.attention.attention.value": 64}
    older = {"vit.layers": "vit.encoder.layer", "q_proj": "attention.query", "v_proj": "attention.value"}
    tensors = adapter_state(model.get_base_model())
    for now, then in older.items():
        tensors = {name.replace(now, then): value for name, value in tensors.items()}
    write_adapter(tensors, config, tmp_path)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))
    assert loaded.peft_config["default"].target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("empty", [{"layer_replication": []}, {"trainable_token_indices": {}}])
def test_a_file_with_an_empty_setting_is_trained_on_and_saved(empty: dict[str, Any], tmp_path: Path) -> None:
    peft.get_peft_model(tiny("llama"), _config(peft, **empty)).save_pretrained(tmp_path / "theirs")
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path / "theirs", is_trainable=True).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "ours")
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_weights_are_float32_or_as_the_base_model(saved: Path, autocast: bool, dtype: torch.dtype) -> None:
    found = []
    for lib in (peftcli, peft):
        model = lib.get_peft_model(
            tiny("llama").to(dtype), _config(lib, modules_to_save=["norm"]), autocast_adapter_dtype=autocast
        )
        model.add_adapter("added", _config(lib), autocast_adapter_dtype=autocast)
        model.load_adapter(saved, "loaded", autocast_adapter_dtype=autocast)
        if autocast or lib is peftcli:  # PEFT's stays in float32
            model.load_adapter(saved, "again", autocast_adapter_dtype=not autocast)
            model.load_adapter(saved, "again", autocast_adapter_dtype=autocast)
        lora = {value.dtype for name, value in model.named_parameters() if "lora_" in name}
        loaded = lib.PeftModel.from_pretrained(tiny("llama").to(dtype), saved, autocast_adapter_dtype=autocast)
        lora |= {value.dtype for name, value in loaded.named_parameters() if "lora_" in name}
        found.append((lora, logits(loaded, batch("llama"))))
    assert found[0][0] == found[1][0] == {torch.float32 if autocast else dtype}
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2)


def test_weights_on_the_meta_device_until_they_are_loaded(saved: Path) -> None:
    model = get_peft_model(tiny("llama"), _config(peftcli, modules_to_save=["norm"]), low_cpu_mem_usage=True)
    model.add_adapter("other", _config(peftcli), low_cpu_mem_usage=True)
    layers = adapter_layers(model).values()
    assert {value.device.type for layer in layers for value in layer.own_tensors().values()} == {"meta"}
    before = dict(model.named_parameters())
    state = adapter_state(PeftModel.from_pretrained(tiny("llama"), saved).get_base_model())
    peftcli.set_peft_model_state_dict(model, state, "other", low_cpu_mem_usage=True)
    model.set_adapter("other")
    expected = logits(PeftModel.from_pretrained(tiny("llama"), saved), batch("llama"))
    assert torch.equal(logits(model.eval(), batch("llama")), expected)
    assert all(before[name] is value for name, value in model.named_parameters())
    assert model.get_nb_trainable_parameters()[0] == sum(value.numel() for value in state.values())


def test_weights_that_are_computed_are_there_at_once() -> None:
    model = get_peft_model(tiny("llama"), _config(peftcli, init_lora_weights="pissa"), low_cpu_mem_usage=True)
    assert not any(value.is_meta for value in model.parameters())


def test_a_mixed_model(saved: Path) -> None:
    model = get_peft_model(tiny("llama"), _config(peftcli), mixed=True, revision="main")
    assert type(model) is peftcli.PeftMixedModel
    assert model.peft_config["default"].revision == "main"
    model.add_adapter("other", peftcli.LoHaConfig(target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    model.delete_adapter(["default", "other"])
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))
    loaded = peftcli.PeftMixedModel.from_pretrained(tiny("llama"), saved)
    assert type(loaded) is peftcli.PeftMixedModel


def test_an_adapter_of_the_same_name_is_replaced_or_kept(saved: Path) -> None:
    base = tiny("llama")
    model = get_peft_model(base, peftcli.LoraConfig(r=4, target_modules=["v_proj"]))
    randomise(model)
    before = logits(model, batch("llama"))
    with (
        pytest.raises(AdapterError, match="matches 'nope'"),
        pytest.warns(peftcli.PeftWarning, match="'default' is replaced"),
    ):
        get_peft_model(base, peftcli.LoraConfig(target_modules=["nope"]))
    assert torch.equal(logits(model, batch("llama")), before)
    with pytest.warns(peftcli.PeftWarning, match="'default' is replaced"):
        found = PeftModel.from_pretrained(base, saved)
    expected = PeftModel.from_pretrained(tiny("llama"), saved)
    assert torch.equal(logits(found, batch("llama")), logits(expected, batch("llama")))
    assert found.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            peftcli.LoraConfig(target_modules=["lm_head"]),
            r"lm_head changes it there only: `ensure_weight_tying` is not",
        ),
        (peftcli.LoraConfig(modules_to_save=["embed_tokens", "lm_head"]), "each gets an adapter of its own: `ensure_"),
        (peftcli.LoKrConfig(target_modules=["lm_head"]), "no implementation exists to tie the adapters of LOKR"),
        (peftcli.LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True), None),
        (peftcli.LoraConfig(trainable_token_indices=[1]), None),
    ],
)
def test_an_adapter_that_unties_is_a_warning(config: Any, reason: str | None) -> None:
    if reason is None:
        get_peft_model(tiny("llama_tied"), config)
        return
    with pytest.warns(peftcli.PeftWarning, match=f"model.embed_tokens and lm_head share a weight, .*{reason}"):
        get_peft_model(tiny("llama_tied"), config)


def test_another_revision_is_said() -> None:
    with pytest.warns(UserWarning, match="revision: first in the config becomes second"):
        model = get_peft_model(tiny("llama"), _config(peftcli, revision="first"), revision="second")
    assert model.peft_config["default"].revision == "second"


def _offloaded(folder: Path) -> Any:
    """A model with a layer on the disk and the others in memory."""
    base = tiny("llama")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    places |= {"model.rotary_emb": "cpu", "model.layers.1": "disk"}
    return dispatch_model(base, places, main_device="cpu", offload_dir=str(folder / "off"), force_hooks=True)


def test_an_offloaded_base_model(saved: Path) -> None:
    expected = logits(PeftModel.from_pretrained(tiny("llama"), saved), batch("llama"))
    model = PeftModel.from_pretrained(_offloaded(saved), saved, device_map="auto", offload_folder="off")
    torch.testing.assert_close(logits(model, batch("llama")), expected)
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.self_attn\.q_proj is offloaded"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model, batch("llama")), expected)
    for needs in ({"use_dora": True}, {"modules_to_save": ["layers.1.mlp.up_proj"]}):
        with pytest.raises(AdapterError, match="is offloaded, and its weights are needed"):
            model.add_adapter("other", _config(peftcli, **needs))
    assert list(model.peft_config) == ["default"]
    whole = cpu_offload(tiny("llama"), torch.device("cpu"))
    with pytest.raises(AdapterError, match=r"model\.embed_tokens is offloaded, and its weights are needed"):
        get_peft_model(whole, _config(peftcli, trainable_token_indices=[3]))


@pytest.mark.parametrize("needs", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_a_base_model_on_several_devices_is_not_offloaded(needs: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), _config(peftcli, **needs)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    base: Any = dispatch_model(tiny("llama"), {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))


def test_a_model_with_an_adapter_is_offloaded_by_what_is_in_it(saved: Path) -> None:
    """Accelerate reads ``state_dict()``, which of the ``PeftModel`` lacks the base model."""
    model = PeftModel.from_pretrained(tiny("llama"), saved)
    expected = logits(model, batch("llama"))
    cpu_offload(model.base_model, torch.device("cpu"))
    assert model.get_base_model().model.norm.weight.is_meta
    torch.testing.assert_close(logits(model, batch("llama")), expected)


@pytest.mark.parametrize(
    ("method", "more"),
    [("frod", {}), ("hira", {}), ("miss", {"init_weights": "bat"}), ("osf", {}), ("psoft", {})],
)
def test_weights_in_the_dtype_of_a_base_model_in_half_precision_compute(method: str, more: dict[str, Any]) -> None:
    """What these methods hold or compute beside their weights is in float32."""
    config = METHODS[method].config_class()(**{**base_settings(method, "llama"), **more})
    model = peftcli.get_peft_model(tiny("llama").to(torch.bfloat16), config, autocast_adapter_dtype=False).eval()
    randomise(model.get_base_model())
    assert torch.isfinite(logits(model, batch("llama"))).all()
