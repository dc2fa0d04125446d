"""Training on quantised base models, and what becomes of such adapters; with the packages themselves."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import promises
import pytest
import torch
import trainkit
from models_tiny import batch, labelled, logits, randomise, tiny
from opened import load_model
from oracle import silence
from safetensors import safe_open
from trainkit import run_recipe
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from peftcli import peft_api
from peftcli.adapters import merge as merging
from peftcli.adapters.generate import load_generator
from peftcli.adapters.proof.verify import verify_adapter
from peftcli.core.files import load_adapter, read_config
from peftcli.core.inject import inject, set_trainable
from peftcli.core.layer import adapter_layers, base_module
from peftcli.core.linear import dense_weight
from peftcli.core.merge import merge
from peftcli.core.quantised import is_quantised, keep_layout, num_weights
from peftcli.core.weights import named_tensors
from peftcli.errors import AdapterError, Interrupted, ModelError, UsageError
from peftcli.methods import METHODS, config_from_dict
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.fused import FUSED
from peftcli.schema import BaseModel, Quantization
from peftcli.train.events import Event, Stepped

pytestmark = pytest.mark.slow

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("bitsandbytes", {"type": "nf4"}),
    "nf4-double": ("bitsandbytes", {"type": "nf4", "double_quant": True}),
    "nf4-bfloat16": ("bitsandbytes", {"type": "nf4", "compute_dtype": "bfloat16"}),
    "fp4": ("bitsandbytes", {"type": "fp4"}),
    "int8": ("bitsandbytes", {"type": "int8"}),
    "int8_weight_only": ("torchao", {"type": "int8_weight_only"}),
    "int4_weight_only": ("torchao", {"type": "int4_weight_only", "group_size": 16}),
}
OF_PEFT = ("nf4", "nf4-double", "int8", "int8_weight_only")
"""Those that PEFT is compared on."""
IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
STEPS = ("training.max_steps=25", "training.learning_rate=3e-2")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return with_package(request.param)


def with_package(kind: str) -> str:
    pytest.importorskip(KINDS[kind][0])
    return kind


def quantised(kind: str, folder: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
    base = BaseModel(name=str(folder or trainkit.base_folder()), quantization=Quantization(**KINDS[kind][1]))
    return load_model(base, "AutoModelForCausalLM", dtype).eval()


def override(kind: str) -> str:
    return f"base_model.quantization={json.dumps(KINDS[kind][1])}"


@torch.no_grad()
def answers(model: torch.nn.Module) -> torch.Tensor:
    keep_layout(model)  # bitsandbytes cannot reorder layers as narrow as these
    return model.eval()(input_ids=IDS).logits.float()


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-4) -> bool:
    return bool((found - expected).abs().max() < share * expected.std())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], trainkit.Trained]:
    """A run on a base model of a kind; each is trained once."""
    done: dict[str, trainkit.Trained] = {}

    def trained(kind: str) -> trainkit.Trained:
        if kind not in done:
            recipe = trainkit.write_recipe(tmp_path_factory.mktemp(kind))
            done[kind] = run_recipe(recipe, *STEPS, override(kind))
        return done[kind]

    return trained


def adapted(kind: str, folder: Path) -> Any:
    """The quantised base model with the adapter of a folder."""
    model = quantised(kind)
    load_adapter(model, config_from_dict(read_config(folder)), folder)
    return model


# --- loading ----------------------------------------------------------------------------------------------------------


def test_linear_layers_are_quantised_and_nothing_else(kind: str) -> None:
    model, dense = quantised(kind), AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    packed = {name for name, module in model.named_modules() if is_quantised(module)}
    assert packed == {
        name for name, module in dense.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    for name in ("model.embed_tokens", "lm_head", "model.norm"):
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)
    assert num_weights(model) == sum(parameter.numel() for parameter in dense.parameters())


def test_the_dense_weight_is_what_the_layer_computes_with(kind: str) -> None:
    layer = quantised(kind).model.layers[0].mlp.down_proj.train()
    with torch.no_grad():
        computed = layer(torch.eye(layer.in_features)).T
    tolerance = 1e-2 if kind == "nf4-bfloat16" else 1e-5
    assert (dense_weight(layer) - computed).abs().max() < tolerance * computed.abs().max()


def test_a_model_without_such_layers_is_refused() -> None:
    with_package("int8_weight_only")  # torchao does not know GPT-2's Conv1D
    base = BaseModel(name=str(trainkit.base_folder("gpt2")), quantization=Quantization(type="int8_weight_only"))
    with pytest.raises(ModelError, match="int8_weight_only finds no linear layer"):
        load_model(base, "AutoModelForCausalLM", torch.float32)


def test_experts_stay_as_they_are_and_a_run_says_so(tmp_path: Path) -> None:
    kind = with_package("nf4")
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    trainkit.tokenizer().save_pretrained(tmp_path / "base")
    recipe = trainkit.write_recipe(tmp_path, tmp_path / "base")
    warnings = run_recipe(recipe, "training.max_steps=1", override(kind)).warnings
    assert any(re.search(r"9\d% of the weights .*: \w+ takes linear layers, not experts", each) for each in warnings)


def test_a_base_model_in_bfloat16_has_a_float32_adapter(kind: str) -> None:
    model = quantised(kind, dtype=torch.bfloat16)
    inject(model, LoraConfig(target_modules="all-linear"))
    assert {parameter.dtype for _, _, parameter in named_tensors(model).values()} == {torch.float32}
    output = model(input_ids=IDS, labels=IDS)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for _, _, parameter in named_tensors(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_as_one_function_has_the_gradients_of_plain_layers(kind: str, dtype: torch.dtype) -> None:
    model = quantised(kind, dtype=dtype)
    inject(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    keep_layout(model)
    model.train()

    def gradients() -> torch.Tensor:
        with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            model(input_ids=IDS, labels=IDS).loss.backward()
        found = torch.cat([parameter.grad.flatten() for _, _, parameter in named_tensors(model).values()])
        model.zero_grad()
        return found

    fast = gradients()
    FUSED.enabled = False
    try:
        plain = gradients()
    finally:
        FUSED.enabled = True
    rounds = dtype == torch.bfloat16 or kind in ("int8", "nf4-bfloat16")  # of inputs too
    assert (fast - plain).norm() < (0.05 if rounds else 1e-5) * plain.norm()


def test_a_base_model_that_cuts_gradients_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    rounded = TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())
    model = AutoModelForCausalLM.from_pretrained(trainkit.base_folder(), quantization_config=rounded)
    with pytest.raises(AdapterError, match=r"Linear \(Int8Tensor\) passes no gradients"):
        inject(model, LoraConfig())


def test_four_bit_layers_keep_their_order() -> None:
    with_package("nf4")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = quantised("nf4", shaped_for_cpus())
    layer = model.model.layers[0].mlp.up_proj
    before = dense_weight(layer)
    assert all(vars(module).get("support_avx512bf16_for_cpu") is not None for module in [layer])
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    inject(model, LoraConfig(target_modules=["up_proj"]))
    assert not layer.support_avx512bf16_for_cpu
    assert not layer.weight.quant_state.packing_format_for_cpu
    assert (dense_weight(layer) - before).abs().max() < 0.01 * before.abs().max()


def shaped_for_cpus() -> Path:
    """A base model whose layers have sizes that bitsandbytes reorders."""
    folder = trainkit.scratch() / "wide"
    if not folder.exists():
        model: Any = tiny("llama")
        for layer in model.model.layers:
            layer.mlp.up_proj = torch.nn.Linear(64, 64, bias=False)
        model.config.hidden_size = model.config.intermediate_size = 64
        type(model)(model.config).save_pretrained(folder)
    return folder


# --- training ---------------------------------------------------------------------------------------------------------


def test_it_trains(kind: str, trained: Callable[[str], trainkit.Trained]) -> None:
    done = trained(kind)
    assert done.losses[-1] < done.losses[0] - 0.3
    recorded = done.run["base_model"]["quantization"]
    assert {name: recorded[name] for name in KINDS[kind][1]} == KINDS[kind][1]
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(trainkit.base_folder())
    with safe_open(done.folder / "adapter_model.safetensors", "pt") as file:
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
    plain = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(trainkit.base_folder()).parameters())
    assert done.run["parameters"]["all"] == plain + done.run["parameters"]["trainable"]


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8_weight_only"])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(
    kind: str, trained: Callable[[str], trainkit.Trained], tmp_path: Path
) -> None:
    whole, recipe = trained(with_package(kind)), trainkit.write_recipe(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole.folder.parent / name).read_bytes()

    def stop(event: Event) -> None:
        if isinstance(event, Stepped) and event.result.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run_recipe(recipe, *STEPS, override(kind), on_event=stop)
    assert run_recipe(recipe, *STEPS, override(kind)).weights == whole.weights


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4_weight_only"])
def test_gradient_checkpointing_changes_nothing(
    kind: str, trained: Callable[[str], trainkit.Trained], tmp_path: Path
) -> None:
    recipe = trainkit.write_recipe(tmp_path)
    losses = run_recipe(recipe, *STEPS, override(with_package(kind)), "training.gradient_checkpointing=true").losses
    assert losses == pytest.approx(trained(kind).losses, abs=1e-5)


@pytest.mark.parametrize("kind", OF_PEFT)
def test_peft_computes_the_same(kind: str, trained: Callable[[str], trainkit.Trained]) -> None:
    import peft

    folder = trained(with_package(kind)).folder
    expected = answers(adapted(kind, folder))
    with silence():
        oracle = peft.PeftModel.from_pretrained(quantised(kind), folder)
    assert close(answers(oracle), expected)
    assert not close(answers(quantised(kind)), expected, 0.1)


@pytest.mark.parametrize("kind", OF_PEFT)
def test_verify_compares_readers_over_the_same_weights(kind: str, trained: Callable[[str], trainkit.Trained]) -> None:
    folder = str(trained(with_package(kind)).folder)
    readers = verify_adapter(folder, readers=["peft", "transformers"])["readers"]
    assert readers["peft"] < 1e-4
    assert readers["transformers"] < 0.1  # which quantises the adapter too, with torchao


def test_peft_counts_the_same() -> None:
    import peft

    with_package("nf4")
    model = quantised("nf4")
    theirs = peft.get_peft_model(quantised("nf4"), peft.LoraConfig(target_modules=["q_proj"]))
    ours = peft_api.get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("clear", [True, False])
def test_preparing_gives_memory_back_unless_told_not_to(clear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append(True))
    peft_api.prepare_model_for_kbit_training(tiny("llama").bfloat16(), auto_clear_cache=clear)
    assert bool(cleared) == clear


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_four_bits(method: str, tmp_path: Path) -> None:
    with_package("nf4-double")
    tiny("llama").save_pretrained(tmp_path)
    task = {"task_ids": torch.tensor([1, 0])} if method == "multitask_prompt_tuning" else {}
    model, config = promises.adapted("llama", method, base=quantised("nf4-double", tmp_path))
    expected = logits(model, batch("llama") | task)
    model(**labelled("llama"), **task).loss.backward()
    gradients = [value.grad for _, _, value in named_tensors(model).values() if value.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if config.merge_problem() is None:
        merge(model, config, dequantise=True)
        assert close(logits(model, batch("llama")), expected)


@pytest.mark.parametrize("method", [*METHODS, "dora"])
def test_every_method_on_torchao_in_inference_mode(method: str, tmp_path: Path) -> None:
    with_package("int8_weight_only")
    tiny("llama").save_pretrained(tmp_path)
    task = {"task_ids": torch.tensor([1, 0])} if method == "multitask_prompt_tuning" else {}
    model = quantised("int8_weight_only", tmp_path)
    if method == "dora":
        inject(model, LoraConfig(use_dora=True))
    else:
        promises.adapted("llama", method, base=model)
    with torch.inference_mode():
        assert logits(model, batch("llama") | task).isfinite().all()


@pytest.mark.parametrize("model", ["t5", "gpt2"])
def test_other_shapes_of_model(model: str, tmp_path: Path) -> None:
    with_package("nf4")
    rows = trainkit.PROMPTS if model == "t5" else trainkit.MESSAGES
    recipe = trainkit.write_recipe(tmp_path, trainkit.base_folder(model, chat=model != "t5"), rows)
    if model == "t5":
        recipe.write_text(recipe.read_text().replace("causal_lm", "seq2seq_lm"))
    done = run_recipe(recipe, *STEPS, override("nf4"))
    assert done.losses[-1] < done.losses[0]
    for number, options in enumerate(({}, {"dequantize": True})):
        merging.merge_adapter(str(done.folder), tmp_path / f"merged{number}", **options)  # compares the logits


def test_a_bias_keeps_its_dtype_whatever_the_layer_computes_in(tmp_path: Path) -> None:
    with_package("nf4-bfloat16")
    tiny("qwen2").save_pretrained(tmp_path)
    model = quantised("nf4-bfloat16", tmp_path)
    inject(model, LoraConfig(target_modules=["q_proj", "v_proj"], bias="lora_only"))
    set_trainable(model, True)
    randomise(model)
    model(**labelled("qwen2")).loss.backward()
    biases = {name: value for name, (_, _, value) in named_tensors(model).items() if name.endswith("bias")}
    assert biases
    for bias in biases.values():
        assert bias.dtype == torch.float32
        assert bias.grad is not None
        assert bias.grad.abs().sum() > 0


# --- a base model that is stored quantised ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model in 4 bits on disk, with its tokenizer."""
    with_package("nf4")
    folder = tmp_path_factory.mktemp("stored")
    quantised("nf4").save_pretrained(folder)
    trainkit.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained_on_stored(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> trainkit.Trained:
    return run_recipe(trainkit.write_recipe(tmp_path_factory.mktemp("run"), stored), *STEPS)


def test_it_is_recognised(trained_on_stored: trainkit.Trained, trained: Callable[[str], trainkit.Trained]) -> None:
    assert trained_on_stored.run["base_model"]["quantization"] == {"type": "nf4", "stored": True}
    assert trained_on_stored.losses == pytest.approx(trained("nf4").losses, abs=1e-5)


def test_interop_3_10_merging_into_it_is_refused_with_the_commands_that_work(
    trained_on_stored: trainkit.Trained, tmp_path: Path
) -> None:
    adapter, output = str(trained_on_stored.folder), tmp_path / "merged"
    with pytest.raises(AdapterError, match="is stored quantised") as caught:
        merging.merge_adapter(adapter, output)
    command = f"peftcli merge {adapter} --output {output}"
    assert f"{command} --base MODEL" in str(caught.value.hint)
    assert f"{command} --dequantize" in str(caught.value.hint)
    assert not output.exists()


def test_it_is_merged_into_the_model_that_it_was_made_of(trained_on_stored: trainkit.Trained, tmp_path: Path) -> None:
    adapter, output = trained_on_stored.folder, tmp_path / "merged"
    merging.merge_adapter(str(adapter), output, base=str(trainkit.base_folder()))
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    expected = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    load_adapter(expected, config_from_dict(read_config(adapter)), adapter)
    assert close(answers(AutoModelForCausalLM.from_pretrained(output)), answers(expected))


def test_it_is_merged_into_its_own_weights_made_dense(
    trained_on_stored: trainkit.Trained, stored: Path, tmp_path: Path
) -> None:
    adapter, output = trained_on_stored.folder, tmp_path / "merged"
    done = merging.merge_adapter(str(adapter), output, dequantize=True)
    assert done["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(output)
    assert not hasattr(model.config, "quantization_config")
    expected = AutoModelForCausalLM.from_pretrained(stored)
    load_adapter(expected, config_from_dict(read_config(adapter)), adapter)
    assert close(answers(model), answers(expected))


# --- merging and generating -------------------------------------------------------------------------------------------


def test_an_adapter_goes_into_the_full_precision_model_by_default(
    kind: str, trained: Callable[[str], trainkit.Trained], tmp_path: Path
) -> None:
    folder, output, told = trained(kind).folder, tmp_path / "merged", list[str]()
    done = merging.merge_adapter(str(folder), output, tell=told.append)
    assert f"it was trained on {KINDS[kind][1]['type']} weights; these are the full-precision ones" in told
    assert done["max_logit_difference"] < 1e-3
    expected = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    load_adapter(expected, config_from_dict(read_config(folder)), folder)
    assert close(answers(AutoModelForCausalLM.from_pretrained(output)), answers(expected))


def test_or_into_what_it_was_trained_on(kind: str, trained: Callable[[str], trainkit.Trained], tmp_path: Path) -> None:
    folder, output = trained(kind).folder, tmp_path / "merged"
    merging.merge_adapter(str(folder), output, dequantize=True)
    exact = 0.1 if kind in ("int8", "nf4-bfloat16") else 1e-4  # int8 rounds inputs in evaluation, bfloat16 everything
    assert close(answers(AutoModelForCausalLM.from_pretrained(output)), answers(adapted(kind, folder)), exact)


def test_what_makes_up_for_quantisation_goes_into_those_weights_only(tmp_path: Path) -> None:
    recipe = trainkit.write_recipe(tmp_path)
    method = "method={type: lora, r: 4, target_modules: all-linear, init_lora_weights: loftq}"
    folder = run_recipe(recipe, "training.max_steps=2", override(with_package("nf4")), method).folder
    with pytest.raises(AdapterError, match="corrects the error of the quantised weights") as caught:
        merging.merge_adapter(str(folder), tmp_path / "merged")
    assert str(caught.value.hint).endswith(f"peftcli merge {folder} --output {tmp_path}/merged --dequantize")
    moved = shutil.copytree(trainkit.base_folder(), tmp_path / "moved")
    merging.merge_adapter(str(folder), tmp_path / "merged", base=str(moved), dequantize=True)


def test_what_is_dense_is_not_made_dense(tmp_path: Path) -> None:
    done = run_recipe(trainkit.write_recipe(tmp_path), "training.max_steps=1")
    with pytest.raises(UsageError, match="is not quantised"):
        merging.merge_adapter(str(done.folder), tmp_path / "merged", dequantize=True)


def test_interop_3_10_in_memory_it_is_refused_or_made_dense(kind: str) -> None:
    model: Any = peft_api.get_peft_model(quantised(kind), LoraConfig(target_modules="all-linear"))
    randomise(model)
    expected = answers(model)
    with pytest.raises(AdapterError, match="is quantised"):
        model.merge_and_unload()
    assert torch.equal(answers(model), expected)
    merged = model.merge_and_unload(dequantize=True)
    assert not merged.is_quantized
    assert not hasattr(merged.config, "quantization_config")
    assert not adapter_layers(merged)
    exact = 0.1 if kind in ("int8", "nf4-bfloat16") else 1e-4
    assert close(answers(merged), expected, exact)


def test_gpt2s_layers_become_what_they_were(tmp_path: Path) -> None:
    with_package("nf4")
    tiny("gpt2").save_pretrained(tmp_path / "base")
    model = quantised("nf4", tmp_path / "base")
    config = LoraConfig(target_modules=["c_attn", "c_fc"])
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    assert {type(base_module(layer)).__name__ for layer in adapter_layers(model).values()} == {"Linear4bit"}
    expected = logits(model, batch("gpt2"))
    merge(model, config, dequantise=True)
    assert close(logits(model, batch("gpt2")), expected)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"


def test_answers_come_from_the_model_as_it_was_trained_on(trained: Callable[[str], trainkit.Trained]) -> None:
    folder = str(trained(with_package("nf4")).folder)

    def packed(**options: Any) -> set[str]:
        model = load_generator(folder, **options).model
        return {base_module(layer).weight.dtype for layer in adapter_layers(model).values()}

    assert packed() == {torch.uint8}
    assert packed(quantization="none") == {torch.float32}
    assert packed(quantization="int8") == {torch.int8}
    assert packed(base=str(trainkit.base_folder())) == {torch.float32}
    assert load_generator(folder).generate(["What follows sun 1?"], _settings())[0].tokens > 0


def _settings() -> Any:
    from peftcli.tasks.text.generation import GenerationSettings

    return GenerationSettings(max_new_tokens=4)
