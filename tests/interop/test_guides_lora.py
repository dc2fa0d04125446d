"""PEFT's guide to LoRA: starts, options, optimizers, tokens, merging.

What it shows of other settings, of switching adapters and of rows is in test_methods.py and test_interop_operations.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import trainkit
from guidekit import close, logged, part, trainer_of
from models_tiny import batch, ids, labelled, logits, randomise, tiny
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    get_cosine_schedule_with_warmup,
)

Base = Callable[[str], str]
TARGETS = ["q_proj", "v_proj"]


def distance(model: Any, kind: str = "llama") -> float:
    """How far the logits are from those of the base model."""
    return (logits(model.eval(), batch(kind)) - logits(tiny(kind), batch(kind))).abs().max().item()


def learns(model: Any, steps: int = 6, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**labelled("llama")).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two trained adapters of the tiny Llama."""
    import peftcli

    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("sft", "dpo")}
    for seed, folder in enumerate(folders.values(), 1):
        model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(r=4, task_type="CAUSAL_LM"))
        randomise(model, seed)
        model.save_pretrained(folder)
    return folders


# --- initialization ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["gaussian", "pissa", "pissa_niter_4", "olora"])
def test_a_start_leaves_the_output_as_it_is(lib: ModuleType, start: str) -> None:
    torch.manual_seed(0)
    config = lib.LoraConfig(init_lora_weights=start, target_modules=TARGETS)
    model = lib.get_peft_model(tiny("llama"), config)
    assert distance(model) < 1e-3
    learns(model)


def test_a_start_that_changes_the_output(lib: ModuleType) -> None:
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(init_lora_weights=False, target_modules=TARGETS))
    assert distance(model) > 1e-2


def test_corda_starts_from_covariances(lib: ModuleType) -> None:
    model, dataset = tiny("llama"), [batch("llama", seed, rows=1) for seed in range(4)]

    @torch.no_grad()
    def run_model() -> None:
        model.eval()
        for inputs in dataset:
            model(**inputs)

    corda_config = part(lib, "tuners.lora.config").CordaConfig(corda_method="kpm")
    lora_config = lib.LoraConfig(init_lora_weights="corda", target_modules=TARGETS, r=4, corda_config=corda_config)
    part(lib, "tuners.lora.corda").preprocess_corda(model, lora_config, run_model=run_model)
    peft_model = lib.get_peft_model(model, lora_config)
    assert distance(peft_model) < 1e-2
    learns(peft_model)


def test_eva_starts_from_activations(lib: ModuleType) -> None:
    peft_config = lib.LoraConfig(
        init_lora_weights="eva", eva_config=lib.EvaConfig(rho=2.0), r=4, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    peft_model = lib.get_peft_model(tiny("llama"), peft_config, low_cpu_mem_usage=True)
    dataloader = [labelled("llama", seed) for seed in range(6)]
    lib.initialize_lora_eva_weights(peft_model, dataloader)
    ranks = [value.shape[0] for name, value in lib.get_peft_model_state_dict(peft_model).items() if "lora_A" in name]
    assert sum(ranks) <= 4 * 4
    assert max(ranks) <= 2 * 4
    assert not any(parameter.is_meta for parameter in peft_model.parameters())
    assert distance(peft_model) < 1e-4
    learns(peft_model)


# --- options ----------------------------------------------------------------------------------------------------------


def test_dora_with_its_runtime_options(lib: ModuleType, tmp_path: Path) -> None:
    offload = torch.cuda.is_available() or lib.__name__ != "peft"  # PEFT fails without a GPU
    config = lib.LoraConfig(
        use_dora=True, target_modules=TARGETS, runtime_config=lib.LoraRuntimeConfig(ephemeral_gpu_offload=offload)
    )
    model = lib.get_peft_model(tiny("llama"), config)
    assert distance(model) < 1e-3
    learns(model.train())
    expected = logits(model.eval(), batch("llama"))
    model.save_pretrained(tmp_path)
    assert "runtime_config" not in (tmp_path / "adapter_config.json").read_text()
    loaded = lib.PeftModel.from_pretrained(tiny("llama"), tmp_path, ephemeral_gpu_offload=offload)
    close(logits(loaded.eval(), batch("llama")), expected)
    close(logits(loaded.merge_and_unload(), batch("llama")), expected, 1e-3)


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.foo, self.barfoo = nn.Linear(4, 4), nn.Linear(4, 4)


class _Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.foo, self.foobar, self.module = nn.Linear(4, 4), nn.Linear(4, 4), _Inner()


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.foo, self.module = nn.Linear(4, 4), _Middle()


FOO, MIDDLE, INNER = "foo", "module.foo", "module.module.foo"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({"foo": 3}, {FOO: 3, MIDDLE: 3, INNER: 3}),
        ({"^foo": 3}, {FOO: 3}),
        ({"^module.foo": 3}, {MIDDLE: 3}),
        ({"module.foo": 3}, {MIDDLE: 3, INNER: 3}),
        ({"^foo": 3, "^module.module.foo": 2}, {FOO: 3, INNER: 2}),
    ],
)
def test_ranks_and_alphas_by_pattern(lib: ModuleType, pattern: dict[str, int], expected: dict[str, int]) -> None:
    config = lib.LoraConfig(r=1, target_modules=r".*foo.*", rank_pattern=pattern)
    model = lib.get_peft_model(_Outer(), config)
    ranks = {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]: value.shape[0]
        for name, value in lib.get_peft_model_state_dict(model).items()
        if "lora_A" in name
    }
    assert ranks == {
        name: expected.get(name, 1) for name in (FOO, MIDDLE, INNER, "module.foobar", "module.module.barfoo")
    }
    config = lib.LoraConfig(r=1, lora_alpha=1, target_modules=r".*foo.*", alpha_pattern=pattern)
    model = lib.get_peft_model(_Outer(), config)
    scaling = {
        name.removeprefix("base_model.model."): each.scaling
        if isinstance(each.scaling, float)
        else each.scaling["default"]
        for name, each in model.named_modules()
        if hasattr(each, "lora_A") and "scaling" in vars(each)
    }
    assert scaling == {name: expected.get(name, 1) for name in scaling}
    assert len(scaling) == 5


# --- variants ---------------------------------------------------------------------------------------------------------


def test_monteclora_adds_its_penalty_to_the_loss(lib: ModuleType, tmp_path: Path) -> None:
    config = lib.LoraConfig(
        r=4,
        lora_alpha=32,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        monteclora_config=lib.MontecloraConfig(num_samples=4, sample_scaler=1e-2, kl_loss_weight=1e-2),
    )
    model = lib.get_peft_model(tiny("llama"), config).train()
    mixin = part(lib, "helpers").MontecloraTrainerMixin

    class MontecloraTrainer(mixin, Trainer):
        pass

    trainer: Any = trainer_of(model, tmp_path, kind=MontecloraTrainer, max_steps=2, save_strategy="no")
    loss = trainer.compute_loss(model, labelled("llama")).item()
    penalty = model._get_monteclora_loss().item()  # of the same draw
    assert penalty > 0
    assert loss == pytest.approx(tiny("llama")(**labelled("llama")).loss.item() + penalty, rel=1e-5)
    trainer.train()
    model.eval()
    assert trainer.compute_loss(model, labelled("llama")).item() == pytest.approx(
        model(**labelled("llama")).loss.item(), rel=1e-5
    )


def test_kasas_penalty_is_added_by_hand(lib: ModuleType) -> None:
    config = lib.LoraConfig(target_modules=TARGETS, r=4, kasa_config=lib.KasaConfig(beta=1e-4, gamma=1e-3))
    model = lib.get_peft_model(tiny("llama"), config)
    kasa_loss = model._get_kasa_loss()
    assert kasa_loss.item() > 0
    (model(**labelled("llama")).loss + kasa_loss).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert lib.get_peft_model(tiny("llama"), lib.LoraConfig())._get_kasa_loss() == 0.0


@pytest.mark.parametrize("init_type", ["batch_average", "batch_average_once", "random"])
def test_velora_learns_from_compressed_activations(lib: ModuleType, init_type: str) -> None:
    velora_config = lib.VeloraConfig(num_groups=8, scale=0.2, init_type=init_type)
    torch.manual_seed(0)
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(target_modules=TARGETS, velora_config=velora_config))
    close(logits(model.eval(), batch("llama")), logits(tiny("llama"), batch("llama")))
    learns(model.train())


# --- optimizers -------------------------------------------------------------------------------------------------------


def _train(model: Any, optimizer: Any, scheduler: Any, folder: Path) -> float:
    more = {"optimizers": (optimizer, scheduler)}
    trainer = trainer_of(model, folder, more=more, max_steps=4, save_strategy="no", logging_steps=1)
    trainer.train()
    return logged(trainer)[-1] - logged(trainer)[0]


@pytest.mark.slow
def test_lora_fa_trains_b_alone(lib: ModuleType, tmp_path: Path) -> None:
    optimizers = part(lib, "optimizers")
    config = lib.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = lib.get_peft_model(tiny("llama"), config)
    before = {name: value.clone() for name, value in lib.get_peft_model_state_dict(model).items()}
    optimizer = optimizers.create_lorafa_optimizer(model=model, r=16, lora_alpha=32, lr=7e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=10)
    assert _train(model, optimizer, scheduler, tmp_path) < 0
    for name, value in lib.get_peft_model_state_dict(model).items():
        assert torch.equal(value, before[name]) == ("lora_A" in name)


def test_lora_plus_has_two_rates(lib: ModuleType, tmp_path: Path) -> None:
    optimizers = part(lib, "optimizers")
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"))
    optimizer = optimizers.create_loraplus_optimizer(
        model=model, optimizer_cls=torch.optim.Adam, lr=5e-4, loraplus_lr_ratio=16
    )
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    for name, value in model.named_parameters():
        if value.requires_grad:
            assert rates[id(value)] == pytest.approx(5e-4 * (16 if "lora_B" in name else 1))
    assert _train(model, optimizer, None, tmp_path) < 0


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda rows: rows, lambda rows: {"embed_tokens": rows}])
def test_new_tokens_train_beside_lora(lib: ModuleType, form: Any, tmp_path: Path) -> None:
    folder = str(trainkit.base_folder())
    base_model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special_tokens = ["<|start_think|>", "<|stop_think|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
    torch.manual_seed(0)
    base_model.resize_token_embeddings(
        max(len(tokenizer), base_model.model.embed_tokens.num_embeddings), mean_resizing=False
    )
    rows = tokenizer.convert_tokens_to_ids(special_tokens)
    old = base_model.model.embed_tokens.weight.detach().clone()
    lora_config = lib.LoraConfig(target_modules="all-linear", trainable_token_indices=form(rows))
    peft_model = lib.get_peft_model(base_model, lora_config)
    inputs = torch.tensor([[5, rows[0], 6, rows[1], 7]])
    optimizer = torch.optim.SGD(peft_model.parameters(), lr=1.0)
    peft_model(input_ids=inputs, labels=inputs).loss.backward()
    optimizer.step()
    merged_rows = peft_model.get_input_embeddings()(torch.arange(len(old)))
    changed = (merged_rows - old).abs().amax(-1) > 0
    assert changed.nonzero().flatten().tolist() == sorted(rows)
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    delta = [value for name, value in saved.items() if "token" in name and "lora" not in name]
    assert [tuple(value.shape) for value in delta] == [(2, 32)]


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merged_for_good_or_for_a_while(lib: ModuleType, adapters: dict[str, str]) -> None:
    base_model = tiny("llama")
    model = lib.PeftModel.from_pretrained(base_model, adapters["sft"])
    expected = logits(model.eval(), batch("llama"))
    model.merge_and_unload()  # the base model that was given holds the update
    close(logits(base_model, batch("llama")), expected, 1e-3)

    model = lib.PeftModel.from_pretrained(tiny("llama"), adapters["sft"]).eval()
    model.merge_adapter()
    close(logits(model, batch("llama")), expected, 1e-3)
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    close(logits(model, batch("llama")), expected)
    close(logits(model.unload(), batch("llama")), logits(tiny("llama"), batch("llama")), 1e-3)


def test_two_adapters_become_one(lib: ModuleType, base: Base, adapters: dict[str, str]) -> None:
    base_model = AutoModelForCausalLM.from_pretrained(base("llama"), dtype=torch.float16, device_map="cpu")
    model = lib.PeftModel.from_pretrained(base_model, adapters["sft"], adapter_name="sft")
    model.load_adapter(adapters["dpo"], adapter_name="dpo")
    model.add_weighted_adapter(
        adapters=["sft", "dpo"], weights=[0.7, 0.3], adapter_name="sft-dpo", combination_type="linear"
    )
    model.set_adapter("sft-dpo")
    assert model.active_adapter == "sft-dpo"
    a = {name: load_file(Path(folder) / "adapter_model.safetensors") for name, folder in adapters.items()}
    merged = lib.get_peft_model_state_dict(model, adapter_name="sft-dpo")
    for name, value in merged.items():
        expected = math.sqrt(0.7 * 8 / 4) * a["sft"][name] + math.sqrt(0.3 * 8 / 4) * a["dpo"][name]
        close(value.float(), expected, 1e-3)
    with torch.no_grad():
        generate_ids = model.float().generate(input_ids=ids(1, 5), max_length=12, eos_token_id=None)
    assert generate_ids.shape == (1, 12)
