"""LoRA's starts: they are PEFT's, what we train from them PEFT loads as plain LoRA, and PEFT's own files we read."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trainkit
from models_tiny import batch, logits, randomise, tiny
from oracle import file_of, loaded_by_peft, saved_by_peft, theirs
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from peft.tuners.lora.corda import preprocess_corda as peft_preprocess_corda
from starting import STARTED, TARGETS, EightBits, Rows, layers_of, started
from torch import nn
from transformers import AutoModelForCausalLM

import peftcli
from peftcli.adapters.merge import merge_adapter
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject
from peftcli.errors import AdapterError, ModelError
from peftcli.methods import config_from_dict
from peftcli.peft_api.model import wrap

RSLORA = {"use_rslora": True, "lora_alpha": 5, "r": 4}
PATTERNS: dict[str, Any] = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 20}, "r": 4}
READ: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa-rslora": ("llama", {"init_lora_weights": "pissa", **RSLORA}),
    "pissa-patterns": ("llama", {"init_lora_weights": "pissa", **PATTERNS}),
    "pissa-conv1d": ("gpt2", {"init_lora_weights": "pissa", "lora_alpha": 20}),
    "pissa-encoder-decoder": ("t5", {"init_lora_weights": "pissa"}),
    "pissa-classifier": ("bert", {"init_lora_weights": "pissa", "modules_to_save": ["classifier"]}),
    "pissa-bias": ("opt", {"init_lora_weights": "pissa", "bias": "lora_only"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "olora-rslora": ("qwen2", {"init_lora_weights": "olora", **RSLORA}),
    "olora-all-linear": ("llama", {"init_lora_weights": "olora", "target_modules": "all-linear"}),
    "pissa-dora": ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "mica": ("gpt2", {"init_lora_weights": "mica"}),
    "eva": ("llama", {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.5)}),
}
"""Kinds of adapters that PEFT writes with the name of their start in the config."""


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.detach().abs().max())), rtol=1e-5)


def peft_layers(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> A and B of PEFT's model."""
    return {
        name.removeprefix("base_model.model."): (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }


def span(rows: torch.Tensor) -> torch.Tensor:
    """The projection onto what rows span."""
    q, _ = torch.linalg.qr(rows.detach().T)
    return q @ q.T


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, PEFT may warn of what it does itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrapped(base: nn.Module, **settings: Any) -> Any:
    """PEFT's model over ``base``."""
    with unheard():
        return peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()


@pytest.mark.grid(each="init")
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_starts_from_the_base_weight_are_pefts(init: str, kind: str) -> None:
    if (init, kind) == ("olora", "gpt2"):
        pytest.skip("PEFT is wrong there; see below")
    model, _ = started(kind, init, lora_alpha=6)
    oracle = wrapped(tiny(kind), init_lora_weights=init, r=4, lora_alpha=6, target_modules=TARGETS[kind])
    found = peft_layers(oracle)
    assert found.keys() == layers_of(model).keys()
    for name, layer in layers_of(model).items():
        close(layer.lora_A.weight, found[name][0])
        close(layer.lora_B.weight, found[name][1])
    close(logits(oracle, batch(kind)), logits(model, batch(kind)))


def test_mica_on_an_embedding_is_pefts() -> None:
    settings: dict[str, Any] = {"init_lora_weights": "mica", "r": 4, "target_modules": ["embed_tokens"]}
    model: Any = tiny("llama")
    inject(model, peftcli.LoraConfig(**settings))
    layer, oracle = model.model.embed_tokens, wrapped(tiny("llama"), **settings).base_model.model.model.embed_tokens
    assert not layer.lora_embedding_A.any()
    for name in ("lora_embedding_A", "lora_embedding_B"):
        close(getattr(layer, name), getattr(oracle, name)["default"])
    assert list(layer.own_tensors()) == ["lora_embedding_A"]


@pytest.mark.parametrize("writer", [peft, peftcli])
def test_mica_stays_mica_when_it_is_trained_on(writer: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"init_lora_weights": "mica", "r": 4, "target_modules": ["embed_tokens", "q_proj"]}
    with unheard():
        writer.get_peft_model(tiny("llama"), writer.LoraConfig(**settings)).save_pretrained(tmp_path)
    for reader in (peft, peftcli):
        model = reader.PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained
        assert not any("_B" in name for name in trained)
        assert reader is peft or model.peft_config["default"].file_dict()["init_lora_weights"] == "mica"


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("init", [*STARTED, "eva", "mica", "orthogonal"])
def test_what_we_train_peft_loads_as_plain_lora(init: str, kind: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**RSLORA, "rank_pattern": {TARGETS[kind][0]: 6}} if kind == "gpt2" else {}
    model, config = started(kind, init, **settings)
    randomise(model)
    save_adapter(model, config, tmp_path)
    close(logits(loaded_by_peft(kind, tmp_path), batch(kind)), logits(model, batch(kind)))
    assert file_of(tmp_path)[0]["init_lora_weights"] == ("mica" if init == "mica" else True)


@pytest.mark.parametrize("init", STARTED)
def test_dora_goes_with_it(init: str, tmp_path: Path) -> None:
    model, config = started("llama", init, use_dora=True)
    close(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))
    randomise(model)
    save_adapter(model, config, tmp_path)
    close(logits(loaded_by_peft("llama", tmp_path), batch("llama")), logits(model, batch("llama")))


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("name", READ)
def test_what_peft_writes_with_its_start_in_the_config_we_read(name: str, tmp_path: Path) -> None:
    kind, settings = READ[name]
    written = theirs(kind, "lora", **settings)
    saved_by_peft(written, tmp_path / "theirs")
    assert file_of(tmp_path / "theirs")[0]["init_lora_weights"] == settings["init_lora_weights"]
    model, config = tiny(kind), config_from_dict(read_config(tmp_path / "theirs"))
    load_adapter(model, config, tmp_path / "theirs")
    close(logits(model, batch(kind)), logits(written, batch(kind)))
    save_adapter(model, config, tmp_path / "ours")
    close(logits(loaded_by_peft(kind, tmp_path / "ours"), batch(kind)), logits(written, batch(kind)))
    again = tiny(kind)
    load_adapter(again, config_from_dict(read_config(tmp_path / "ours")), tmp_path / "ours")
    assert torch.equal(logits(again, batch(kind)), logits(model, batch(kind)))


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("init", STARTED)
@pytest.mark.parametrize("settings", [{}, {**RSLORA, "rank_pattern": {"q_proj": 2}}], ids=["plain", "rslora"])
def test_what_is_saved_as_pefts_docs_say_is_plain_lora(init: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base, config = started("llama", init, **settings)
    model = wrap(base, config, "default")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    close(logits(loaded_by_peft("llama", tmp_path / "start"), batch("llama")), logits(tiny("llama"), batch("llama")))
    randomise(model)
    model.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert file_of(tmp_path / "trained")[0]["r"] == 8
    close(logits(loaded_by_peft("llama", tmp_path / "trained"), batch("llama")), logits(model, batch("llama")))
    again = peftcli.PeftModel.from_pretrained(tiny("llama"), tmp_path / "trained")
    close(logits(again, batch("llama")), logits(model, batch("llama")))


def test_pefts_adapter_over_a_residual_base_is_saved_for_the_base_model_itself(tmp_path: Path) -> None:
    oracle = wrapped(tiny("llama"), init_lora_weights="pissa", r=4, modules_to_save=["lm_head"])
    oracle.peft_config["default"].init_lora_weights = True
    saved_by_peft(oracle, tmp_path / "start")
    model = peftcli.PeftModel.from_pretrained(oracle.unload(), tmp_path / "start", is_trainable=True)
    randomise(model)
    model.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=tmp_path / "start")
    close(logits(loaded_by_peft("llama", tmp_path / "trained"), batch("llama")), logits(model.eval(), batch("llama")))
    other = peftcli.get_peft_model(tiny("llama"), peftcli.IA3Config())
    with pytest.raises(AdapterError, match="works for LORA, not IA3"):
        other.save_pretrained(tmp_path / "other", path_initial_model_for_weight_conversion=tmp_path / "start")


def test_pefts_pissa_on_a_bf16_base_differs_by_what_it_rounds_only(tmp_path: Path) -> None:
    saved_by_peft(theirs("llama", "lora", init_lora_weights="pissa"), tmp_path)
    exact, rounded = (tiny("llama").to(dtype) for dtype in (torch.float32, torch.bfloat16))
    for model in (exact, rounded):
        load_adapter(model, config_from_dict(read_config(tmp_path)), tmp_path)
    expected = logits(exact, batch("llama"))
    assert (logits(rounded, batch("llama")).float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.grid
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pefts_file_is_merged_shard_by_shard(init: str, tmp_path: Path) -> None:
    base = trainkit.base_folder("llama", shard="20KB")
    oracle = wrapped(AutoModelForCausalLM.from_pretrained(base), init_lora_weights=init, task_type="CAUSAL_LM")
    randomise(oracle)
    saved_by_peft(oracle, tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")  # compares logits with the unmerged model's
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    close(logits(merged.eval(), batch("llama")), logits(oracle.eval(), batch("llama")))


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_eva_gives_pefts_directions_and_sizes(kind: str) -> None:
    rows, settings = Rows(kind, rows=4, length=24, count=6).batches, {"r": 4, "target_modules": TARGETS[kind]}
    config = peftcli.LoraConfig(init_lora_weights="eva", **settings)
    model = peftcli.get_peft_model(tiny(kind), config)
    peftcli.initialize_lora_eva_weights(model, rows)
    oracle = wrapped(tiny(kind), init_lora_weights="eva", **settings)
    with unheard():
        peft.initialize_lora_eva_weights(oracle, rows, show_progress_bar=False)
    found, layers = peft_layers(oracle), layers_of(model.get_base_model())
    assert {name: layer.r for name, layer in layers.items()} == {name: len(a) for name, (a, _) in found.items()}
    for name, layer in layers.items():
        assert layer.scaling == oracle.base_model.model.get_submodule(name).scaling["default"]
        torch.testing.assert_close(span(layer.lora_A.weight), span(found[name][0]), atol=1e-3, rtol=0)
    assert config.rank_pattern == oracle.peft_config["default"].rank_pattern
    assert config.alpha_pattern == oracle.peft_config["default"].alpha_pattern


@pytest.mark.grid
@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_corda_gives_pefts_start(kind: str, method: Any) -> None:
    settings = {"init_lora_weights": "corda", "r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind]}
    examples = [batch(kind, seed, rows=1, length=10 + seed) for seed in range(6)]  # PEFT reads one at a time
    base, theirs_config = tiny(kind), peft.LoraConfig(corda_config=PeftCordaConfig(corda_method=method), **settings)
    with unheard():
        peft_preprocess_corda(base, theirs_config, run_model=lambda: [base(**each) for each in examples])
        oracle = peft.get_peft_model(base, theirs_config)
    config = peftcli.LoraConfig(corda_config=peftcli.CordaConfig(corda_method=method), **settings)
    ours = tiny(kind)
    peftcli.preprocess_corda(ours, config, lambda: [ours(**each) for each in examples])
    model = peftcli.get_peft_model(ours, config)
    for name, layer in layers_of(ours).items():
        for found, expected in zip((layer.lora_A.weight, layer.lora_B.weight), peft_layers(oracle)[name], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(model, batch(kind)), logits(tiny(kind), batch(kind)))


@pytest.mark.grid
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_ga_takes_pefts_directions(kind: str, direction: Any) -> None:
    settings = {"init_lora_weights": "lora_ga", "r": 8, "target_modules": TARGETS[kind]}  # 4 r are all there are
    rows = Rows(kind)
    base, theirs_config = tiny(kind), peft.LoraConfig(lora_ga_config=peft.LoraGAConfig(direction=direction), **settings)
    with unheard():
        peft.preprocess_loraga(base, theirs_config, lambda: [base(**each).loss.backward() for each in rows])
        oracle = peft.get_peft_model(base, theirs_config)
    config = peftcli.LoraConfig(lora_ga_config=peftcli.LoraGAConfig(direction=direction), **settings)
    ours = tiny(kind)
    peftcli.preprocess_loraga(ours, config, lambda: [ours(**each).loss.backward() for each in rows])
    model = peftcli.get_peft_model(ours, config)
    for name, layer in layers_of(ours).items():
        a, b = peft_layers(oracle)[name]
        torch.testing.assert_close(span(layer.lora_A.weight), span(a), atol=1e-3, rtol=0)
        torch.testing.assert_close(span(layer.lora_B.weight.T), span(b.T), atol=1e-3, rtol=0)
    assert torch.equal(logits(model, batch(kind)), logits(tiny(kind), batch(kind)))


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_what_was_learnt_is_kept_in_a_file_and_read_from_it(init: str, tmp_path: Path) -> None:
    file, runs = tmp_path / "new" / "learnt.safetensors", []

    def started(kind: str = "llama", run: bool = True, file: Path = file, other: Any = None) -> dict[str, torch.Tensor]:
        model, rows = tiny(kind), Rows(kind)
        config = peftcli.LoraConfig(init_lora_weights=init, r=2, target_modules=TARGETS[kind])

        def learn() -> None:
            runs.append(kind)
            for each in rows:
                loss = (other or model)(**each).loss
                if init == "lora_ga":
                    loss.backward()

        torch.manual_seed(0)
        if init == "lora_ga":
            peftcli.preprocess_loraga(model, config, learn, cache_file=file)
        else:
            config.corda_config = peftcli.CordaConfig(cache_file=str(file))
            peftcli.preprocess_corda(model, config, learn if run else None, hooked_model=other)
        return peftcli.get_peft_model_state_dict(peftcli.get_peft_model(model, config))

    first, second = started(), started(run=False)
    assert runs == ["llama"]
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)
    if init == "corda":
        again = started(file=tmp_path / "another", other=tiny("llama"))
        torch.testing.assert_close(again, first)
        with pytest.raises(AdapterError, match="run_model: is needed"):
            started(run=False, file=tmp_path / "missing")
    with pytest.raises(AdapterError, match="was made for other modules"):
        started("gpt2")
    torch.save(first, file)
    with pytest.raises(AdapterError, match=r"learnt\.safetensors"):
        started()


def test_pefts_functions_refuse_a_config_of_another_start() -> None:
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig())
    with pytest.raises(AdapterError, match="must be 'eva', not True"):
        peftcli.initialize_lora_eva_weights(model, Rows("llama"))
    with pytest.raises(AdapterError, match="must be 'corda'"):
        peftcli.preprocess_corda(tiny("llama"), peftcli.LoraConfig(), lambda: None)
    with pytest.raises(AdapterError, match="needs either"):
        peftcli.initialize_lora_eva_weights(model)
    with pytest.raises(AdapterError, match="not LORA"):
        peftcli.get_eva_state_dict(
            peftcli.get_peft_model(tiny("llama"), peftcli.PromptTuningConfig(task_type="CAUSAL_LM")), Rows("llama")
        )


def test_evas_directions_can_be_kept_and_used_again() -> None:
    settings: dict[str, Any] = {"init_lora_weights": "eva", "r": 4, "target_modules": TARGETS["llama"]}
    first, second = (peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(**settings)) for _ in range(2))
    kept = peftcli.get_eva_state_dict(first, Rows("llama"))
    assert all(name.startswith("base_model.model.model.layers.") for name in kept)
    batches = [("of no use to the model", each) for each in Rows("llama")]
    peftcli.initialize_lora_eva_weights(first, batches, forward_fn=lambda model, inputs: model(**inputs[1]))
    peftcli.initialize_lora_eva_weights(second, eva_state_dict=kept)
    for one, other in zip(*(layers_of(model.get_base_model()).values() for model in (first, second)), strict=True):
        assert torch.equal(one.lora_A.weight, other.lora_A.weight)


def test_evas_directions_of_a_base_model_have_its_names_and_leave_it_as_it_was() -> None:
    config = peftcli.LoraConfig(init_lora_weights="eva", r=4, target_modules=TARGETS["llama"])
    kept = peftcli.get_eva_state_dict(peftcli.get_peft_model(tiny("llama"), copy.deepcopy(config)), Rows("llama"))
    parallel = nn.ModuleDict({"module": tiny("llama")})  # as DistributedDataParallel has it
    parallel.forward = parallel["module"].forward  # type: ignore[method-assign]
    names = [name for name, parameter in parallel.named_parameters() if parameter.requires_grad]
    found = peftcli.get_eva_state_dict(parallel, Rows("llama"), config)
    assert names == [name for name, parameter in parallel.named_parameters() if parameter.requires_grad]
    model = peftcli.get_peft_model(parallel["module"], config, low_cpu_mem_usage=True)
    renamed = {name.replace("module.", "base_model.model.", 1): value for name, value in found.items()}
    assert renamed.keys() == kept.keys()
    assert all(torch.equal(renamed[name], kept[name]) for name in kept)
    peftcli.initialize_lora_eva_weights(model, eva_state_dict=renamed)
    with pytest.raises(AdapterError, match="peft_config"):
        peftcli.get_eva_state_dict(tiny("llama"), Rows("llama"))


def test_loftq_reads_the_full_weights_where_the_model_came_from(tmp_path: Path) -> None:
    full = tiny("llama")
    full.save_pretrained(tmp_path)
    quantised = tiny("llama")
    for layer in quantised.model.layers:
        layer.self_attn.q_proj = EightBits(layer.self_attn.q_proj)
    with pytest.raises(AdapterError, match="loftq starts from the weights before quantisation"):  # not as plain LoRA
        peftcli.get_peft_model(quantised, peftcli.LoraConfig(init_lora_weights="loftq", target_modules=["q_proj"]))
    model = peftcli.get_peft_model(quantised, peftcli.LoraConfig(r=8, target_modules=["q_proj"]))
    before = (logits(model, batch("llama")) - logits(full, batch("llama"))).norm()
    peftcli.replace_lora_weights_loftq(model, tmp_path, callback=lambda whole, name: whole is model)
    assert (logits(model, batch("llama")) - logits(full, batch("llama"))).norm() < 0.8 * before
    with pytest.raises(ModelError, match="no model folder"):
        peftcli.replace_lora_weights_loftq(model, tmp_path / "nowhere")


def _with_lora_ga() -> Any:
    base, config = tiny("llama"), peft.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    with unheard():
        peft.preprocess_loraga(base, config, lambda: [base(**each).loss.backward() for each in Rows("llama")])
        return peft.get_peft_model(base, config)


@pytest.mark.parametrize(
    ("kind", "write", "problem"),
    [
        (
            "llama",  # it draws anew what the file's weights were trained beside
            lambda: theirs("llama", "lora", init_lora_weights="pissa_niter_4"),
            "does not hold what pissa_niter_4 started from",
        ),
        ("llama", _with_lora_ga, "does not hold what lora_ga started from"),
        (
            "gpt2",  # it decomposes the transposed weight
            lambda: wrapped(tiny("gpt2"), target_modules=["attn.c_proj"], init_lora_weights="olora", r=4),
            "from its transpose",
        ),
    ],
    ids=["pissa_niter_4", "lora_ga", "olora on Conv1D"],
)
def test_files_of_pefts_that_it_reads_beside_the_wrong_base_are_refused(
    kind: str, write: Any, problem: str, tmp_path: Path
) -> None:
    saved_by_peft(write(), tmp_path)
    with pytest.raises(AdapterError, match=problem):
        load_adapter(tiny(kind), config_from_dict(read_config(tmp_path)), tmp_path)


def test_olora_on_conv1d_leaves_the_logits_as_they_are() -> None:
    model, _ = started("gpt2", "olora", target_modules=["attn.c_proj"])
    assert torch.equal(logits(model, batch("gpt2")), logits(tiny("gpt2"), batch("gpt2")))


@pytest.mark.parametrize("tuned", [{}, {"loraplus_lr_embedding": 1e-5, "loraplus_weight_decay": 0.1}])
def test_loraplus_groups_are_pefts(tuned: dict[str, float]) -> None:
    from peft.optimizers import create_loraplus_optimizer

    settings: dict[str, Any] = {"target_modules": ["q_proj", "fc1", "embed_tokens"], "bias": "lora_only"}
    oracle = wrapped(tiny("opt"), **settings)
    model = peftcli.get_peft_model(tiny("opt"), peftcli.LoraConfig(**settings))
    rates: dict[str, Any] = {"lr": 1e-3, "loraplus_lr_ratio": 8, "eps": 1e-6, **tuned}

    def described(whole: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float, float]]:
        names = {id(value): name.replace(".default", "") for name, value in whole.named_parameters()}
        return {
            names[id(value)]: (group["lr"], group["weight_decay"], group["eps"])
            for group in optimizer.param_groups
            for value in group["params"]
        }

    found = described(model, peftcli.create_loraplus_optimizer(model, torch.optim.AdamW, **rates))
    expected = described(oracle, create_loraplus_optimizer(oracle, torch.optim.AdamW, **rates))
    sizes = [
        [len(group["params"]) for group in create(whole, torch.optim.AdamW, **rates).param_groups]
        for create, whole in (
            (peftcli.create_loraplus_optimizer, peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig())),
            (create_loraplus_optimizer, wrapped(tiny("llama"))),
        )
    ]
    assert sizes[0] == sizes[1] == [4, 0, 4, 0]
    vectors = {name: value for name, value in found.items() if name.endswith("bias")}
    assert len(vectors) == 4
    assert {name: value for name, value in found.items() if name not in vectors} == {
        name: value for name, value in expected.items() if not name.endswith("bias")
    }
    assert set(vectors.values()) == {(8e-3, 0.0, 1e-6)}
