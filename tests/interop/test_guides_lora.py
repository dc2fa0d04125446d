"""PEFT's guide to LoRA, section by section: starts, options, optimizers, tokens, merging, several adapters."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import trainkit
from models_tiny import batch, ids, labelled, logits, randomise, tiny
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

Base = Callable[[str], str]
TARGETS = ["q_proj", "v_proj"]


def close(found: torch.Tensor, expected: torch.Tensor, within: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=within, rtol=within)


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

    config_module = importlib.import_module(f"{lib.__name__}.tuners.lora.config")
    corda = importlib.import_module(f"{lib.__name__}.tuners.lora.corda")
    lora_config = lib.LoraConfig(
        init_lora_weights="corda",
        target_modules=TARGETS,
        r=4,
        corda_config=config_module.CordaConfig(corda_method="kpm"),
    )
    corda.preprocess_corda(model, lora_config, run_model=run_model)
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


def test_rank_stabilised_scaling(lib: ModuleType) -> None:
    found = []
    for options in ({"use_rslora": True, "lora_alpha": 8}, {"lora_alpha": 8 * math.sqrt(16)}):
        model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(r=16, target_modules=TARGETS, **options))
        randomise(model)
        found.append(logits(model.eval(), batch("llama")))
    close(*found)


# --- options ----------------------------------------------------------------------------------------------------------


def test_an_activated_adapter_leaves_what_comes_before(lib: ModuleType) -> None:
    invocation = [7, 8]
    config = lib.LoraConfig(
        task_type="CAUSAL_LM", alora_invocation_tokens=invocation, r=32, target_modules=TARGETS, init_lora_weights=False
    )
    model = lib.get_peft_model(tiny("llama"), config).eval()
    inputs = {"input_ids": torch.tensor([[11, 12, 13, *invocation, 21, 22, 23]])}
    found, plain = logits(model, inputs), logits(tiny("llama"), inputs)
    close(found[:, :3], plain[:, :3])
    assert (found[:, 4:] - plain[:, 4:]).abs().amax(-1).min() > 1e-3
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)alora|merge"):
        model.merge_and_unload()


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


def test_all_linear_layers_but_the_head(lib: ModuleType) -> None:
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(target_modules="all-linear"))
    leaves = {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_replicated_layers_share_their_weights(lib: ModuleType, tmp_path: Path) -> None:
    base_model = tiny("llama")
    size = sum(parameter.numel() for parameter in base_model.parameters())
    config = lib.LoraConfig(layer_replication=[[0, 2], [0, 2], [1, 2]], target_modules=TARGETS, task_type="CAUSAL_LM")
    model = lib.get_peft_model(base_model, config)
    layers = model.get_base_model().model.layers
    assert len(layers) == 5
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert layers[1].mlp.up_proj.weight is layers[4].mlp.up_proj.weight
    trained, total = model.get_nb_trainable_parameters()
    assert total - trained == size
    randomise(model)
    expected = logits(model.eval(), batch("llama"))
    model.save_pretrained(tmp_path)
    loaded = lib.PeftModel.from_pretrained(tiny("llama"), tmp_path)
    close(logits(loaded.eval(), batch("llama")), expected)


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


def test_parameters_of_experts_are_targets(lib: ModuleType, tmp_path: Path) -> None:
    config = lib.LoraConfig(
        target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2
    )
    model = lib.get_peft_model(tiny("mixtral"), config)
    randomise(model)
    model.eval()
    assert (logits(model, batch("mixtral")) - logits(tiny("mixtral"), batch("mixtral"))).abs().max() > 1e-3
    shapes = {tuple(value.shape) for name, value in lib.get_peft_model_state_dict(model).items() if "lora_A" in name}
    assert {shape[0] for shape in shapes} == {4 * 2}  # r of each of four experts
    expected = logits(model, batch("mixtral"))
    model.save_pretrained(tmp_path)
    loaded = lib.PeftModel.from_pretrained(tiny("mixtral"), tmp_path)
    close(logits(loaded.eval(), batch("mixtral")), expected)


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
    mixin = importlib.import_module(f"{lib.__name__}.helpers").MontecloraTrainerMixin

    class MontecloraTrainer(mixin, Trainer):
        pass

    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    rows = [{"input_ids": one, "labels": one} for one in ids(8, 6)]
    trainer = MontecloraTrainer(model=model, args=arguments, train_dataset=rows)
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
    arguments = TrainingArguments(
        str(folder), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1
    )
    rows = [{"input_ids": one, "labels": one} for one in ids(8, 6)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, scheduler))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[-1] - losses[0]


@pytest.mark.slow
def test_lora_fa_trains_b_alone(lib: ModuleType, tmp_path: Path) -> None:
    optimizers = importlib.import_module(f"{lib.__name__}.optimizers")
    config = lib.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = lib.get_peft_model(tiny("llama"), config)
    before = {name: value.clone() for name, value in lib.get_peft_model_state_dict(model).items()}
    optimizer = optimizers.create_lorafa_optimizer(model=model, r=16, lora_alpha=32, lr=7e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=10)
    assert _train(model, optimizer, scheduler, tmp_path) < 0
    for name, value in lib.get_peft_model_state_dict(model).items():
        assert torch.equal(value, before[name]) == ("lora_A" in name)


def test_lora_plus_has_two_rates(lib: ModuleType, tmp_path: Path) -> None:
    optimizers = importlib.import_module(f"{lib.__name__}.optimizers")
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


def test_adapters_are_switched_and_taken_out(lib: ModuleType, adapters: dict[str, str]) -> None:
    model = lib.PeftModel.from_pretrained(tiny("llama"), adapters["sft"]).eval()
    first = logits(model, batch("llama"))
    model.load_adapter(adapters["dpo"], adapter_name="dpo")
    close(logits(model, batch("llama")), first)
    model.set_adapter("dpo")
    second = logits(model, batch("llama"))
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    model.delete_adapter("dpo")
    assert list(model.peft_config) == ["default"]
    close(logits(model, batch("llama")), first)
    close(logits(model.unload(), batch("llama")), logits(tiny("llama"), batch("llama")))


# --- adapters by row --------------------------------------------------------------------------------------------------


def test_rows_of_a_batch_have_their_own_adapters(lib: ModuleType, adapters: dict[str, str]) -> None:
    peft_model = lib.PeftModel.from_pretrained(tiny("llama"), adapters["sft"], adapter_name="adapter_fr")
    peft_model.load_adapter(adapters["dpo"], adapter_name="adapter_de")
    peft_model.eval()
    rows = ids(6, 5)
    adapter_names = ["__base__", "adapter_fr", "adapter_de", "adapter_de", "__base__", "adapter_fr"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    output = peft_model.generate(input_ids=rows, adapter_names=adapter_names, **options)
    for number, name in enumerate(adapter_names):
        if name == "__base__":
            alone = tiny("llama").generate(input_ids=rows[number : number + 1], **options)
        else:
            peft_model.set_adapter(name)
            alone = peft_model.generate(input_ids=rows[number : number + 1], **options)
        assert torch.equal(output[number], alone[0]), number

    with torch.no_grad(), peft_model.disable_adapter():  # takes precedence
        found = peft_model(input_ids=rows, adapter_names=adapter_names).logits
    close(found, logits(tiny("llama"), {"input_ids": rows}))
    with pytest.raises(ValueError, match=r"(?i)train|eval"):
        peft_model.train()(input_ids=rows, adapter_names=adapter_names)
    peft_model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        peft_model(input_ids=rows, adapter_names=adapter_names)


def test_rows_have_their_own_heads(lib: ModuleType) -> None:
    model = lib.get_peft_model(tiny("bert"), lib.LoraConfig(task_type="SEQ_CLS"), adapter_name="one")
    model.add_adapter("two", lib.LoraConfig(task_type="SEQ_CLS"))
    for seed, name in enumerate(("one", "two"), 1):
        model.set_adapter(name)
        randomise(model, seed)
    model.eval()
    inputs = batch("bert")
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=["one", "two"]).logits
    for number, name in enumerate(("one", "two")):
        model.set_adapter(name)
        close(mixed[number], logits(model, inputs)[number])
