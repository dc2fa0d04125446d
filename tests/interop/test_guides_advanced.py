"""PEFT's guides to merging, injection, mixed methods, hot-swapping, conversion and torch.compile.

What they show of helpers and of single functions is in tests/peft_api.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from guidekit import close, logged, part, trainer_of
from models_tiny import batch, ids, labelled, logits, randomise, tiny
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

Base = Callable[[str], str]
Folders = dict[str, str]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Base) -> Folders:
    """Folders of trained adapters of the tiny Llama: four of LoRA, one of LoHa."""
    import peftcli

    configs = {
        "norobots": peftcli.LoraConfig(r=4, task_type="CAUSAL_LM"),
        "sql": peftcli.LoraConfig(r=4, task_type="CAUSAL_LM"),
        "adcopy": peftcli.LoraConfig(r=4, task_type="CAUSAL_LM"),
        "larger": peftcli.LoraConfig(r=8, lora_alpha=4, task_type="CAUSAL_LM"),
        "loha": peftcli.LoHaConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"),
    }
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in configs}
    for seed, (name, config) in enumerate(configs.items(), 1):
        model = peftcli.get_peft_model(AutoModelForCausalLM.from_pretrained(base("llama")), config)
        randomise(model, seed)
        model.save_pretrained(folders[name])
    return folders


# --- model merging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("combination", "weights"), [("ties", [2.0, 1.0, 1.0]), ("dare_ties", [2.0, 0.3, 0.7])])
def test_three_adapters_become_one(
    lib: ModuleType, combination: str, weights: list[float], base: Base, adapters: Folders
) -> None:
    config = lib.PeftConfig.from_pretrained(adapters["norobots"])
    model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, device_map="cpu").eval()
    model = lib.PeftModel.from_pretrained(model, adapters["norobots"], adapter_name="norobots")
    _ = model.load_adapter(adapters["sql"], adapter_name="sql")
    _ = model.load_adapter(adapters["adcopy"], adapter_name="adcopy")
    alone = logits(model, batch("llama"))
    names = ["norobots", "adcopy", "sql"]
    torch.manual_seed(0)
    model.add_weighted_adapter(names, weights, "merge", combination_type=combination, density=0.2)
    model.set_adapter("merge")
    assert not torch.allclose(logits(model, batch("llama")), alone, atol=1e-3)
    merged = lib.get_peft_model_state_dict(model, adapter_name="merge")
    if combination == "ties":
        given = [load_file(Path(adapters[name]) / "adapter_model.safetensors") for name in names]
        ties = part(lib, "utils.merge_utils").ties
        scaled = torch.tensor([math.sqrt(weight * 8 / 4) for weight in weights])
        for name, value in merged.items():
            close(value, ties([tensors[name] for tensors in given], scaled, density=0.2))
    share = torch.cat([value.flatten() for value in merged.values()]).ne(0).float().mean()
    assert 0.2 < share < 0.6
    outputs = model.generate(
        input_ids=ids(1, 6),
        max_new_tokens=5,
        do_sample=True,
        top_p=0.95,
        temperature=0.2,
        repetition_penalty=1.2,
        eos_token_id=None,
    )
    assert outputs.shape == (1, 11)


# --- injection --------------------------------------------------------------------------------------------------------


class DummyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.linear = nn.Linear(10, 10)
        self.lm_head = nn.Linear(10, 10)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.linear(self.embedding(input_ids)))


def _dummy() -> DummyModel:
    torch.manual_seed(0)
    return DummyModel()


INPUTS = torch.LongTensor([[0, 1, 2, 3, 4, 5, 6, 7]])


def test_an_adapter_in_a_plain_model(lib: ModuleType) -> None:
    lora_config = lib.LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, bias="none", target_modules=["linear"])
    plain = _dummy()(INPUTS)
    model = lib.inject_adapter_in_model(lora_config, _dummy())
    assert type(model) is DummyModel
    close(model(INPUTS), plain)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    randomise(model)
    expected = model.eval()(INPUTS)
    peft_state_dict = lib.get_peft_model_state_dict(model)
    assert {name: tuple(value.shape) for name, value in peft_state_dict.items()} == {
        "linear.lora_A.weight": (64, 10),
        "linear.lora_B.weight": (10, 64),
    }
    assert len(model.state_dict()) == 7

    for low_cpu_mem_usage in (False, True):
        model = lib.inject_adapter_in_model(lora_config, _dummy(), low_cpu_mem_usage=low_cpu_mem_usage)
        empty = [p.is_meta for name, p in model.named_parameters() if "lora_" in name]
        assert empty == [low_cpu_mem_usage] * 2
        outcome = lib.set_peft_model_state_dict(model, peft_state_dict, low_cpu_mem_usage=low_cpu_mem_usage)
        assert outcome.unexpected_keys == []
        assert not any(p.is_meta for p in model.parameters())
        close(model.eval()(INPUTS), expected)


# --- mixed methods ----------------------------------------------------------------------------------------------------


def test_adapters_of_several_methods_compute_together(lib: ModuleType, adapters: Folders) -> None:
    def alone(name: str) -> torch.Tensor:
        model = lib.PeftModel.from_pretrained(tiny("llama"), adapters[name]).eval()
        return logits(model, batch("llama"))

    peft_model = lib.PeftMixedModel.from_pretrained(tiny("llama"), adapters["norobots"])
    close(logits(peft_model.eval(), batch("llama")), alone("norobots"))
    peft_model.load_adapter(adapters["loha"], adapter_name="other")
    close(logits(peft_model.eval(), batch("llama")), alone("norobots"))  # one is active
    peft_model.set_adapter(["default", "other"])
    both = logits(peft_model.eval(), batch("llama"))
    peft_model.set_adapter("other")
    close(logits(peft_model.eval(), batch("llama")), alone("loha"))
    for name in ("norobots", "loha"):
        assert not torch.allclose(both, alone(name), atol=1e-3)
    peft_model.set_adapter(["default", "other"])
    close(logits(peft_model.merge_and_unload(), batch("llama")), both, 1e-3)


# --- hot-swapping -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler
def test_a_compiled_model_takes_an_adapter_of_another_rank(lib: ModuleType, adapters: Folders) -> None:
    hotswap = part(lib, "utils.hotswap")
    inputs = ids(2, 6)
    fresh = lib.PeftModel.from_pretrained(tiny("llama"), adapters["larger"])
    with torch.inference_mode():
        expected = fresh(inputs).logits
    model = lib.PeftModel.from_pretrained(tiny("llama"), adapters["norobots"])
    with torch.inference_mode():
        first = model(inputs).logits
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    model = torch.compile(model)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        close(model(inputs).logits, first)
        hotswap.hotswap_adapter(model, adapters["larger"], adapter_name="default", torch_device="cpu")
        close(model(inputs).logits, expected)


# --- conversion to LoRA -----------------------------------------------------------------------------------------------


def test_lora_becomes_lora_of_a_smaller_rank(lib: ModuleType, adapters: Folders, tmp_path: Path) -> None:
    model = lib.PeftModel.from_pretrained(tiny("llama"), adapters["larger"])
    with pytest.warns(UserWarning, match="already"):
        lib.save_as_lora(tmp_path, model, rank=2)
    shapes = {
        value.shape[0] for name, value in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in name
    }
    assert shapes == {2}


# --- torch.compile ----------------------------------------------------------------------------------------------------

COMPILED: dict[str, Callable[[Any], Any]] = {
    "adalora": lambda lib: lib.AdaLoraConfig(task_type="CAUSAL_LM", total_step=5),
    "boft": lambda lib: lib.BOFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    "dora": lambda lib: lib.LoraConfig(task_type="CAUSAL_LM", use_dora=True),
    "ia3": lambda lib: lib.IA3Config(task_type="CAUSAL_LM"),
    "ln tuning": lambda lib: lib.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "loha": lambda lib: lib.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    "lora": lambda lib: lib.LoraConfig(task_type="CAUSAL_LM"),
    "modules_to_save": lambda lib: lib.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    "oft": lambda lib: lib.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    "vera": lambda lib: lib.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], r=8),
}


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("method", COMPILED)
def test_a_compiled_model_trains_and_computes_as_one_that_is_not(lib: ModuleType, method: str) -> None:
    found = []
    for compiles in (False, True):
        model = lib.get_peft_model(tiny("llama"), COMPILED[method](lib))
        randomise(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.2)
        plain = model
        if compiles:
            model = torch.compile(model, backend="eager")
        optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            model(**labelled("llama")).loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            output = model(**batch("llama")).logits
        tokens = model.generate(input_ids=ids(1, 4), max_new_tokens=3, do_sample=False, eos_token_id=None)
        found.append((output, tokens))
    close(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_it_is_traced_and_the_trace_checked(lib: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model = lib.get_peft_model(model, lib.LoraConfig(target_modules=["0"], init_lora_weights=False)).eval()
    traced = torch.jit.trace(model, torch.ones(2, 8), strict=False)
    close(traced(torch.full((3, 8), 2.0)), model(torch.full((3, 8), 2.0)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
def test_trainer_compiles_it_with_a_compiler(lib: ModuleType, tmp_path: Path) -> None:
    losses = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(task_type="CAUSAL_LM"))
        options = {"torch_compile": compiles, "max_steps": 3, "logging_steps": 1, "save_strategy": "no"}
        trainer = trainer_of(model, tmp_path / str(compiles), **options)
        trainer.train()
        losses.append(logged(trainer))
        trainer.save_model(str(tmp_path / "saved"))
        assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_merged_and_combined_adapters_are_compiled(lib: ModuleType, adapters: Folders) -> None:
    model = lib.PeftModel.from_pretrained(tiny("llama"), adapters["norobots"], adapter_name="one")
    model.load_adapter(adapters["sql"], adapter_name="two")
    expected = logits(model.eval(), batch("llama"))
    model.merge_adapter()
    close(logits(torch.compile(model, backend="eager"), batch("llama")), expected, 1e-3)
    model.unmerge_adapter()
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    expected = logits(model, batch("llama"))
    torch._dynamo.reset()
    close(logits(torch.compile(model, backend="eager"), batch("llama")), expected)
