"""An adapter as other programs read it: the same model, or an error."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftcli.adapters.export.lora import plain_lora
from peftcli.adapters.export.programs import PROGRAMS, readings, traits
from peftcli.adapters.export.replay import Replayed, missing, require_same
from peftcli.adapters.export.write import export_adapter as export_and_ask
from peftcli.adapters.load import find_adapter
from peftcli.core.files import load_adapter, save_adapter
from peftcli.core.inject import inject
from peftcli.errors import AdapterError, ModelError, UsageError
from peftcli.methods import METHODS, config_from_dict
from peftcli.models.gguf_families import as_stored, gguf_family
from peftcli.models.open import open_base

export_adapter = functools.partial(export_and_ask, ask=False)
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def make_adapter(folder: Path, kind: str = "llama", **settings: Any) -> Path:
    """An adapter of random weights on a tiny model, as training would write it."""
    base = trainkit.base_folder(kind)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = {"peft_type": "LORA", "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    config = config_from_dict({**given, "base_model_name_or_path": str(base)})
    inject(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, config, folder)
    return folder


def logits(adapter: Path) -> torch.Tensor:
    source = find_adapter(str(adapter))
    model = AutoModelForCausalLM.from_pretrained(source.base.name, dtype=torch.float32).eval()
    load_adapter(model, source.config, adapter)
    with torch.inference_mode():
        return model(IDS).logits


PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}}
CASES: dict[str, dict[str, Any]] = {
    "rslora and patterns": {"r": 4, "lora_alpha": 7, "use_rslora": True, **PATTERNS},
    "pissa": {"r": 4, "init_lora_weights": "pissa"},
    "loha": {"peft_type": "LOHA", "r": 2},
    "conv1d": {"kind": "gpt2", "r": 4, "target_modules": ["c_attn", "mlp.c_proj"]},
}


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("case", CASES)
def test_a_plain_lora_is_the_same_model(tmp_path: Path, case: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", **CASES[case])
    written = export_adapter(str(adapter), tmp_path / "plain", form="lora")
    assert (written["r"], written["error"] < 1e-5) == (8, True)
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert not config.keys() & {"use_rslora", "rank_pattern", "alpha_pattern", "use_dora"}
    tensors = load_file(tmp_path / "plain/adapter_model.safetensors")
    assert {len(value) for name, value in tensors.items() if "lora_A" in name} == {8}
    expected = logits(adapter)
    torch.testing.assert_close(logits(tmp_path / "plain"), expected, atol=2e-5, rtol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(written["base_model"], dtype=torch.float32)
    with torch.inference_mode():
        theirs = PeftModel.from_pretrained(base, tmp_path / "plain").eval()(IDS).logits
    torch.testing.assert_close(theirs, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_a_plain_lora_or_refused(tmp_path: Path, name: str) -> None:
    try:
        adapter = make_adapter(tmp_path / "adapter", peft_type=METHODS[name].peft_type)
    except AdapterError as error:
        pytest.skip(f"these settings are not for it: {error}")
    try:
        export_adapter(str(adapter), tmp_path / "plain", form="lora")
    except AdapterError:
        with pytest.raises(AdapterError):
            export_adapter(str(adapter), tmp_path / "merged", form="merged")
        return
    torch.testing.assert_close(logits(tmp_path / "plain"), logits(adapter), atol=1e-4, rtol=1e-3)


def test_what_an_r_loses_is_said_and_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", r=16)
    with pytest.raises(AdapterError, match=r"of r 4 can: \d+\.\d% of it would be lost.*\n?.*merged"):
        export_adapter(str(adapter), tmp_path / "plain", form="lora", r=4)
    assert not (tmp_path / "plain").exists()
    source = find_adapter(str(adapter))
    made = plain_lora(source, open_base(source.base), r=4, max_error=1.0)
    lost = [
        (pair[0] - pair[1]).square().sum()
        for path, update in made.updates.items()
        for pair in [(_delta(source, path), update.left @ update.right)]
    ]
    whole = [_delta(source, path).square().sum() for path in made.updates]
    assert made.error == pytest.approx(float((sum(lost) / sum(whole)) ** 0.5), rel=1e-4)


def _delta(source: Any, path: str) -> torch.Tensor:
    tensors = load_file(source.folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
    return source.config.lora_alpha / source.config.r * b @ a


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is no part of a LoRA's update"),
        ({"trainable_token_indices": [3]}, "is no part of a LoRA's update"),
        ({"target_modules": ["embed_tokens"]}, "no linear layer but Embedding"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "target_modules": None}, "virtual tokens"),
        ({"bias": "lora_only", "kind": "gpt2", "target_modules": ["c_attn"]}, "is no part of a LoRA's update"),
    ],
)
def test_what_is_no_lora_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    given = {key: value for key, value in settings.items() if value is not None}
    if settings.get("peft_type") == "PROMPT_TUNING":
        base = trainkit.base_folder("llama")
        config = config_from_dict({**given, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)})
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        inject(model, config)
        save_adapter(model, config, tmp_path / "adapter")
    else:
        make_adapter(tmp_path / "adapter", **given)
    with pytest.raises(AdapterError, match=said):
        export_adapter(str(tmp_path / "adapter"), tmp_path / "plain", form="lora")


def test_mlx_has_the_matrices_the_other_way_round(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", r=8, lora_alpha=16)
    export_adapter(str(adapter), tmp_path / "mlx", program="mlx")
    theirs, ours = load_file(tmp_path / "mlx/adapters.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, value in ours.items():
        path, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        scale = 2.0 if side == "lora_B" else 1.0
        assert torch.equal(theirs[f"{path}.{side.lower()}"], scale * value.T)
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj"]


def test_a_gguf_file_holds_the_merged_model(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    adapter = make_adapter(tmp_path / "adapter", r=4)
    export_adapter(str(adapter), tmp_path / "out", form="merged-gguf", numbers="f32")
    export_adapter(str(adapter), tmp_path / "merged", form="merged")
    stored = load_file(tmp_path / "merged/model.safetensors")
    config = find_adapter(str(adapter)).base
    opened = open_base(config)
    file = gguf.GGUFReader(tmp_path / "out/model-f32.gguf")
    there = {each.name: torch.from_numpy(each.data.copy()) for each in file.tensors}
    assert torch.equal(there["blk.1.ffn_down.weight"], stored["model.layers.1.mlp.down_proj.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    family = gguf_family(opened.config.model_type)
    assert torch.equal(there["blk.0.attn_q.weight"], as_stored(family, opened.config, name, stored[name]))
    assert not torch.equal(there["blk.0.attn_q.weight"], stored[name]), "llama.cpp rotates neighbours"


def test_a_family_without_a_place_in_gguf_is_refused() -> None:
    with pytest.raises(ModelError, match=r"bloom is no family that peftcli writes as \.gguf"):
        gguf_family("bloom")


def test_a_modelfile_writes_what_the_chat_template_writes(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", r=4)
    export_adapter(str(adapter), tmp_path / "out", program="ollama")
    lines = (tmp_path / "out/Modelfile").read_text()
    assert lines.startswith("FROM ./model-f16.gguf\nTEMPLATE")
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "{{ .Content }}" in lines


@pytest.mark.parametrize(
    ("settings", "wrong", "no"),
    [
        ({}, {"ollama"}, {"mlx", "transformers"}),
        ({"use_rslora": True}, {"sglang", "llama.cpp", "ollama"}, {"mlx", "transformers"}),
        ({"rank_pattern": {"q_proj": 4}}, {"vllm", "ollama"}, {"sglang", "mlx", "transformers"}),
        ({"lora_alpha": 1.5}, set(), {"ollama", "mlx", "transformers"}),
        ({"use_dora": True}, set(), set(PROGRAMS)),
    ],
)
def test_readers_follow_the_table(settings: dict[str, Any], wrong: set[str], no: set[str]) -> None:
    config = config_from_dict({"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings})
    rows = readings("a", config, (), chat=True)
    assert {row["program"] for row in rows if row["reads"] == "wrongly"} == wrong
    assert {row["program"] for row in rows if row["reads"] == "no"} == no
    assert all(row["mend"] for row in rows if row["reads"] != "yes")


def test_every_setting_of_lora_that_changes_the_model_is_a_trait() -> None:
    config = config_from_dict({"peft_type": "LORA", "target_modules": ["q_proj"], "bias": "all", "lora_bias": True})
    assert traits(config, ["base_model.model.lm_head.base_layer.weight"]) == ["lora_bias", "bias", "base weights"]


def test_a_difference_is_one_where_it_is_no_tie(tmp_path: Path) -> None:
    good = Replayed("llama.cpp", "1", prompts=25, same_prompts=24, answers=6, same_answers=6, first=0.001, normalised=1)
    require_same(good, tmp_path)
    for worse in ({"same_prompts": 23}, {"same_answers": 5}, {"first": 0.5}):
        with pytest.raises(AdapterError, match=r"llama\.cpp 1: the tokens of 2\d of 25 prompts and \d of 6 answers"):
            require_same(dataclasses.replace(good, **worse), tmp_path)
    require_same(dataclasses.replace(good, same_answers=2, first=0.2), tmp_path, "q8_0")
    with pytest.raises(AdapterError, match=r"first tokens are off by 0\.5"):
        require_same(dataclasses.replace(good, first=0.5), tmp_path, "q8_0")
    require_same(dataclasses.replace(good, same_answers=2), tmp_path, exact=False)
    assert missing("vllm") == "peftcli does not run vllm"


def test_a_program_or_a_form_is_needed(cli_error: Callable[..., str], tmp_path: Path) -> None:
    assert "give a program with --for" in cli_error("any", tmp_path / "x")
    assert "is not one of vllm" in cli_error("any", tmp_path / "x", program="word")


@pytest.fixture
def cli_error() -> Callable[..., str]:
    def message(*args: Any, **more: Any) -> str:
        with pytest.raises(UsageError) as found:
            export_adapter(*args, **more)
        return str(found.value)

    return message
