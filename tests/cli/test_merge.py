from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from safetensors.torch import load_file, save_file
from trainkit import PROMPT_TUNING, base_folder, build, run_recipe, write_recipe
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from peftcli.core.files import load_adapter, save_adapter
from peftcli.core.inject import inject
from peftcli.errors import ModelError
from peftcli.methods import config_from_dict
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraLinear

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def make_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """A LoRA adapter of random weights, as training would write it."""
    auto = AutoModelForSeq2SeqLM if settings.get("task_type") == "SEQ_2_SEQ_LM" else AutoModelForCausalLM
    model = auto.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    config = LoraConfig(base_model_name_or_path=str(base), **settings)
    inject(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(model, config, folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.inference_mode():
        return model.eval()(**inputs).logits.float()


def adapted_logits(base: Path, adapter: Path, auto: Any = AutoModelForCausalLM) -> torch.Tensor:
    model = auto.from_pretrained(base, dtype=torch.float32)
    load_adapter(model, config_from_dict(json.loads((adapter / "adapter_config.json").read_text())), adapter)
    return logits(model)


@pytest.fixture
def merged(cli: Callable, tmp_path: Path) -> Callable[..., dict]:
    """``peftcli merge ... --json`` into ``tmp_path/merged``."""

    def merged(adapter: Path, *args: object) -> dict:
        ran = cli("merge", adapter, "--output", tmp_path / "merged", "--json", *args)
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    return merged


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "rslora and patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    ),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "bias lora_only": ("gpt2", {"bias": "lora_only"}),
    "bias all": ("gpt2", {"bias": "all"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied, neither": ("llama_tied", {}),
    "tied, embedding": ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, head": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied, both": ("llama_tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied, head in full": ("llama_tied", {"modules_to_save": ["lm_head"]}),
    "tied, embedding in full": ("llama_tied", {"modules_to_save": ["embed_tokens"]}),
    "gpt2, tied, embedding": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "t5": ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
}


@pytest.mark.grid
@pytest.mark.parametrize(
    ("streamed", "settings"),
    [(True, {"target_modules": ["lm_head", "q_proj"]}), (False, {"modules_to_save": ["lm_head"]})],
)
def test_all_that_shared_the_weight_of_a_head_are_written(
    merged: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, settings: dict[str, Any]
) -> None:
    base, auto = base_folder("bart"), AutoModelForSeq2SeqLM  # four modules with one weight
    adapter = make_adapter(tmp_path / "adapter", base, task_type="SEQ_2_SEQ_LM", **settings)
    if not streamed:
        monkeypatch.setattr("peftcli.adapters.merge._stream", lambda *args: None)
    assert merged(adapter)["untied"]
    model, report = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(logits(model), adapted_logits(base, adapter, auto), atol=1e-4, rtol=1e-4)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_what_base_and_adapter_compute(merged: Callable, tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    base, auto = base_folder(kind), AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    made = merged(adapter)
    expected = adapted_logits(base, adapter, auto)
    model, report = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (logits(model) - logits(auto.from_pretrained(base))).abs().max() > 0.01, "the adapter must matter"
    assert made["max_logit_difference"] < 1e-3
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings
    changed = any(word in str(settings) for word in ("embed_tokens", "lm_head", "wte"))
    assert made["untied"] == (tied and changed)
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings == (tied and not changed)


def test_what_is_written(merged: Callable, tmp_path: Path) -> None:
    base = base_folder()
    made = merged(make_adapter(tmp_path / "adapter", base))
    folder = tmp_path / "merged"
    assert made == {
        "output": str(folder),
        "base_model": str(base),
        "dtype": "float32",
        "shards": 1,
        "bytes": (folder / "model.safetensors").stat().st_size,
        "untied": False,
        "max_logit_difference": made["max_logit_difference"],
        "logit_spread": made["logit_spread"],
        "positions": 32,
        "same_tokens": 32,
    }
    assert {path.name for path in folder.iterdir()} == {path.name for path in base.iterdir()}
    assert load_file(folder / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert not any(b"peftcli" in path.read_bytes() for path in folder.iterdir()), "transformers needs no peftcli"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    described = [json.loads((each / "tokenizer_config.json").read_text()) for each in (folder, base)]
    assert described[0] == described[1], "and nothing of how it was loaded"
    mine, theirs = (AutoTokenizer.from_pretrained(each) for each in (folder, base))
    assert mine.chat_template == theirs.chat_template
    assert mine("a red fox")["input_ids"] == theirs("a red fox")["input_ids"]
    assert (folder / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_a_text_adapter_of_a_model_that_sees_keeps_what_prepares_pictures(merged: Callable, tmp_path: Path) -> None:
    base, written = tmp_path / "base", {"image_processor_type": "Gemma3ImageProcessor", "do_resize": False}
    build("gemma3_towers").save_pretrained(base)
    trainkit.tokenizer().save_pretrained(base)
    (base / "preprocessor_config.json").write_text(json.dumps(written))
    merged(make_adapter(tmp_path / "adapter", base, target_modules=r".*language_model.*q_proj"))
    assert json.loads((tmp_path / "merged/preprocessor_config.json").read_text()) == written


@pytest.mark.slow  # a process that imports everything; test_what_is_written finds no trace of peftcli
def test_plain_transformers_loads_it_without_peftcli(merged: Callable, tmp_path: Path) -> None:
    base = base_folder("llama_tied")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"])
    merged(adapter)
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch\n"
        "from safetensors.torch import load_file, save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('merged').eval()\n"
        "AutoTokenizer.from_pretrained('merged')\n"
        "with torch.inference_mode():\n"
        "    logits = model(**load_file('ids.safetensors')).logits\n"
        "save_file({'logits': logits}, 'logits.safetensors')\n"
        "assert not {'peftcli', 'peft'} & {name.partition('.')[0] for name in sys.modules}\n"
    )
    save_file({"input_ids": IDS}, tmp_path / "ids.safetensors")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=trainkit.subprocess_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(found, adapted_logits(base, adapter), atol=1e-4, rtol=1e-4)


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
def test_shards_stay_shards(merged: Callable, tmp_path: Path, kind: str) -> None:
    base = base_folder(kind, shard="40KB")
    count = len(list(base.glob("*.safetensors")))
    assert count > 2
    head = {"llama": "lm_head", "llama_tied": "embed_tokens", "gpt2": "wte"}[kind]
    inner = "c_attn" if kind == "gpt2" else "q_proj"
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=[head, inner], bias="all")
    assert merged(adapter)["shards"] == count
    folder = tmp_path / "merged"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    held = {key: shard.name for shard in folder.glob("*.safetensors") for key in load_file(shard)}
    assert index == held
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder)), adapted_logits(base, adapter), atol=1e-4, rtol=1e-4
    )


def test_a_layer_whose_bias_stands_in_another_shard(merged: Callable, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_folder("gpt2"), base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    index = {key: f"model-0000{1 + key.endswith('.bias')}-of-00002.safetensors" for key in tensors}
    for shard in set(index.values()):
        save_file({key: tensors[key] for key in tensors if index[key] == shard}, base / shard, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    adapter = make_adapter(tmp_path / "adapter", base, bias="lora_only", target_modules=["c_attn"])
    merged(adapter)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, adapted_logits(base, adapter), atol=1e-4, rtol=1e-4)


@pytest.mark.grid
@pytest.mark.parametrize("other", [0.0, 1.0])
def test_a_tied_head_that_is_stored_too(merged: Callable, tmp_path: Path, other: float) -> None:
    """It is tied when it is loaded, or left as it is where its weight is another one than the embedding's."""
    base = tmp_path / "base"
    shutil.copytree(base_folder("llama_tied"), base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + other
    index = {key: f"model-0000{1 + (key == 'lm_head.weight')}-of-00002.safetensors" for key in tensors}
    for shard in set(index.values()):
        save_file({key: tensors[key] for key in tensors if index[key] == shard}, base / shard, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["lm_head", "q_proj"])
    assert merged(adapter)["untied"]
    assert json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())["weight_map"] == index
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, adapted_logits(base, adapter), atol=1e-4, rtol=1e-4)


@pytest.mark.grid
@pytest.mark.parametrize("prefix", [True, False])
def test_gpt2_with_and_without_its_outer_prefix(merged: Callable, tmp_path: Path, prefix: bool) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_folder("gpt2"), base)
    path = base / "model.safetensors"
    bare = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    save_file({f"transformer.{key}" if prefix else key: value for key, value in bare.items()}, path, {"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["wte", "c_attn", "c_fc"])
    merged(adapter)
    written = load_file(tmp_path / "merged/model.safetensors")
    assert written.keys() == {*load_file(path), "lm_head.weight"}, "streamed: the names stay"
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, adapted_logits(base, adapter), atol=1e-4, rtol=1e-4)


def test_a_base_that_is_no_safetensors_checkpoint(merged: Callable, tmp_path: Path, monkeypatch: Any) -> None:
    """It is loaded whole."""
    monkeypatch.setattr("peftcli.adapters.merge._stream", lambda *_: None)
    base = base_folder("llama_tied")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"])
    assert merged(adapter)["untied"] is True
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, adapted_logits(base, adapter), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("command", ["verify", "merge"])
def test_weights_in_another_place_are_quantised_as_in_training(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def need_package(kind: str) -> None:
        raise ModelError(f"loaded as {kind}")

    monkeypatch.setattr("peftcli.models.quantization.need_package", need_package)
    adapter, output = make_adapter(tmp_path / "adapter", base_folder()), tmp_path / "merged"
    run = {"makes_up_for_quantization": True, "recipe": {"base_model": {"quantization": {"type": "nf4"}}}}
    (adapter / "run.json").write_text(json.dumps(run))
    moved = ("--base", base_folder())
    if command == "merge":
        options = ("--output", output, "--dtype", "float16", *moved)
        assert (
            f"--output {output} --dtype float16 --base {base_folder()} --dequantize"
            in cli(command, adapter, *options).err
        )
        assert "loaded as nf4" in cli(command, adapter, *options, "--dequantize").err
    else:
        assert "loaded as nf4" in cli(command, adapter, *moved, "--with", "peft").err


# --- number formats ---------------------------------------------------------------------------------------------------


def test_a_bf16_base_stays_bf16_and_is_rounded_once(merged: Callable, tmp_path: Path) -> None:
    base = base_folder("llama", torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    assert merged(adapter)["dtype"] == "bfloat16"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    exact = before[f"{name}.weight"].float() + 2.0 * (b @ a)
    assert torch.equal(after[f"{name}.weight"], exact.bfloat16())
    assert torch.equal(
        after["model.layers.0.self_attn.k_proj.weight"], before["model.layers.0.self_attn.k_proj.weight"]
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert loaded.dtype == torch.bfloat16


@pytest.mark.grid
@pytest.mark.parametrize(
    ("of_base", "wanted"),
    [(torch.bfloat16, "float32"), (torch.float32, "bfloat16"), (torch.float32, "float16"), (torch.float16, "float32")],
)
def test_another_dtype(merged: Callable, tmp_path: Path, of_base: torch.dtype, wanted: str) -> None:
    base = base_folder("llama", of_base)
    adapter = make_adapter(tmp_path / "adapter", base)
    assert merged(adapter, "--dtype", wanted)["dtype"] == wanted
    written = load_file(tmp_path / "merged/model.safetensors")
    assert {str(value.dtype) for value in written.values()} == {f"torch.{wanted}"}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == wanted
    if wanted == "float32":
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        torch.testing.assert_close(found, adapted_logits(base, adapter), atol=1e-4, rtol=1e-4)


def test_tensors_that_are_no_numbers_of_the_model_stay(merged: Callable, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_folder(), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.steps"] = torch.tensor([2**24 + 1])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merged(make_adapter(tmp_path / "adapter", base_folder()), "--dtype", "bfloat16", "--base", base)
    assert load_file(tmp_path / "merged/model.safetensors")["model.layers.0.steps"].tolist() == [2**24 + 1]


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", ["no change", "wrong scaling", "transposed"])
def test_a_wrong_merge_is_caught(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, dtype: str
) -> None:
    right = LoraLinear.delta
    wrong = {
        "no change": lambda self: 0 * right(self),
        "wrong scaling": lambda self: 2 * right(self),
        "transposed": lambda self: right(self).T if len({*right(self).shape}) == 1 else right(self),
    }[mistake]
    adapter = make_adapter(tmp_path / "adapter", base_folder())
    monkeypatch.setattr(LoraLinear, "delta", wrong)
    ran = cli("merge", adapter, "--output", tmp_path / "merged", "--dtype", dtype)
    assert ran.code == 4
    assert "outputs differ" in ran.err
    assert ran.out == ""
    assert not list(tmp_path.glob("*merged*")) + list(tmp_path.glob(".*")), "nothing is left"
    unchecked = cli("merge", adapter, "--output", tmp_path / "merged", "--dtype", dtype, "--no-verify")
    assert unchecked.code == 0
    assert "verified" not in unchecked.out


def test_a_merge_that_loses_the_update_of_small_logits_is_caught(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_folder("llama", torch.bfloat16)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    targets = {"target_modules": ["v_proj", "o_proj", "down_proj"], "modules_to_save": ["score"]}
    config = LoraConfig(base_model_name_or_path=str(base), r=4, task_type="SEQ_CLS", **targets)
    inject(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(model, config, tmp_path)
    assert cli("merge", tmp_path, "--output", tmp_path / "right").code == 0
    monkeypatch.setattr(LoraLinear, "delta", lambda self: torch.zeros_like(self.base_layer.weight))
    assert "outputs differ" in cli("merge", tmp_path, "--output", tmp_path / "wrong").err


def test_what_it_prints(cli: Callable, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_folder(shard="40KB"))
    ran = cli("merge", adapter, "--output", tmp_path / "merged")
    assert ran.code == 0
    size = r"by at most \S+, \S+ of their spread"
    said = (
        rf"verified after 32 random tokens: the logits differ {size}; the likeliest next token is the same everywhere"
    )
    assert re.match(f"{said}\n", ran.out)
    assert f"from_pretrained('{tmp_path}/merged')" in ran.out
    assert "shard 1 of" in ran.err
    assert "\x1b" not in ran.out + ran.err


# --- where the merged model stops -------------------------------------------------------------------------------------


def endless(folder: Path, generation: dict[str, Any] | None) -> Path:
    """A base model whose own EOS, 0, is not the end of turn of its chat template, which is 2."""
    shutil.copytree(base_folder(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 0}))
    path = folder / "generation_config.json"
    path.unlink() if generation is None else path.write_text(json.dumps(generation))
    tokenizer = trainkit.tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 0}, {"eos_token_id": [0, 2]}),
        ({"eos_token_id": [0, 7], "pad_token_id": 0}, {"eos_token_id": [0, 2, 7], "pad_token_id": 0}),
        ({"temperature": 0.6, "eos_token_id": 0}, {"temperature": 0.6, "eos_token_id": [0, 2]}),  # not of the strict
        ({}, {"eos_token_id": [0, 2]}),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": [2, 0]}),
    ],
)
def test_the_end_of_turn_is_among_what_plain_transformers_stops_at(
    merged: Callable, tmp_path: Path, generation: dict[str, Any], expected: dict[str, Any]
) -> None:
    merged(make_adapter(tmp_path / "adapter", endless(tmp_path / "base", generation)))
    assert json.loads((tmp_path / "merged/generation_config.json").read_text()) == expected


def test_a_base_without_a_generation_config_gets_one_only_if_it_must(merged: Callable, tmp_path: Path) -> None:
    merged(make_adapter(tmp_path / "adapter", endless(tmp_path / "base", None)))
    assert json.loads((tmp_path / "merged/generation_config.json").read_text())["eos_token_id"] == [0, 2]
    shutil.rmtree(tmp_path / "merged")
    plain = tmp_path / "plain"
    make_adapter(plain, tmp_path / "base")
    (plain / "run.json").write_text(json.dumps({"data": {"format": "text"}}))
    merged(plain)
    assert not (tmp_path / "merged/generation_config.json").exists(), "its own EOS ends plain texts"


def test_a_base_below_the_home_keeps_its_generation_config(
    merged: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = endless(tmp_path / "base", {"temperature": 0.6, "eos_token_id": [0, 2]})
    monkeypatch.setenv("HOME", str(tmp_path))
    merged(make_adapter(tmp_path / "adapter", base), "--base", "~/base")
    assert (tmp_path / "merged/generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_new_tokens_and_template_come_from_the_recipe(cli: Callable, merged: Callable, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(trainkit.CHATML.replace("<|im_end|>", "<done>"))
    base = f"base_model={{name: {base_folder('llama_tied')}, chat_template: {template}, new_tokens: [<done>, <spare>]}}"
    few = ("dataset.limit=1", "training.max_steps=40", "training.learning_rate=1e-2")
    adapter = run_recipe(write_recipe(tmp_path), base, *few).folder
    made = merged(adapter)
    assert made["untied"] is False
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == len(tokenizer) == 302
    question = trainkit.PAIRS[0][0]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    ran = cli("generate", adapter, "--prompt", question, "--max-new-tokens", 24, "--json")
    assert tokenizer.decode(ids) == json.loads(ran.out)["text"] + "<done>", "it stops there by itself"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(cli: Callable, tmp_path: Path) -> None:
    lora = make_adapter(tmp_path / "lora", base_folder())
    output = tmp_path / "merged"

    def refused(code: int, said: str, *args: object, to: Path = output) -> None:
        ran = cli("merge", *args, "--output", to)
        assert ran.code == code, ran.err
        assert said in ran.err
        assert "Traceback" not in ran.err
        assert not output.exists()

    prompt = run_recipe(write_recipe(tmp_path), PROMPT_TUNING, "training.max_steps=1").folder
    refused(4, "cannot be merged", prompt)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    refused(2, "not empty", lora, to=full)
    assert [path.name for path in full.iterdir()] == ["mine"]
    refused(2, "not empty", lora, to=full / "mine")
    refused(4, "target_modules", lora, "--base", base_folder("gpt2"))
    refused(4, "no model folder", lora, "--base", "./nowhere")
    refused(4, "adapter_config.json", tmp_path / "full")
    refused(2, "--dtype", lora, "--dtype", "int8")
    damaged = tmp_path / "damaged"
    shutil.copytree(base_folder(), damaged)
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    refused(4, "model.safetensors: damaged", lora, "--base", damaged)
    refused(7, "cannot write", lora, to=Path("/proc/peftcli"))


def test_an_empty_output_folder_will_do_and_the_base_stays(merged: Callable, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    before = trainkit.files_of(base_folder())
    merged(make_adapter(tmp_path / "adapter", base_folder()))
    assert (tmp_path / "merged/config.json").exists()
    assert trainkit.files_of(base_folder()) == before
