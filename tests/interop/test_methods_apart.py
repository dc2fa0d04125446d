"""What single methods promise about PEFT's files beside the grid of ``test_methods.py``."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import peft.tuners.boft.layer as boft_of_peft
import pytest
import torch
from lora_cases import CASES as LORA
from models_tiny import batch, labelled, logits, randomise, tiny
from oracle import (
    PEFTS_METHODS,
    file_of,
    loaded_by_peft,
    loaded_here,
    ours,
    peft_config_class,
    read_by_peft,
    same_logits,
    saved_by_peft,
    theirs,
    written_by_us,
)
from safetensors.torch import save_file
from test_methods import CONVOLUTIONS, PLAIN, SETTINGS
from torch import nn

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject
from peftcli.core.merge import merge
from peftcli.core.protocols import after_step, penalty
from peftcli.core.targets import wrap
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict
from peftcli.methods.lora import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's SHiRA, once a process
torch.sparse.check_sparse_tensor_invariants.disable()  # PEFT's FRoD leaves it open, of which torch warns


_NOT_GPT2 = {"adamss", "beft", "osf"}
"""Methods with which nobody adapts GPT-2."""


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boft_of_peft, "get_fbd_cuda", lambda: None)  # it would call one for every layer


@pytest.mark.parametrize("method", PEFTS_METHODS)
def test_every_setting_of_peft_is_one_here(method: str) -> None:
    config = METHODS[method].config_class()
    in_peft = dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[config.peft_type]])
    assert {field.name for field in in_peft} <= {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("method", sorted({name for name, kinds in PLAIN.items() if "gpt2" not in kinds} - _NOT_GPT2))
def test_gpt2_is_adapted_where_peft_refuses_it(method: str, tmp_path: Path) -> None:
    model, folder = written_by_us((method, "gpt2", SETTINGS.get(method, {})), tmp_path)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="support"):
        loaded_by_peft("gpt2", folder)
    same_logits("gpt2", loaded_here("gpt2", folder), model)


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((method, {"save_projection": False, "projection_prng_key": 21}) for method in ("vera", "randlora")),
        *((method, {"save_projection": False}) for method in ("tinylora", "pvera", "frod")),
        ("supertuning", {"save_precomputed_indices": False}),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_what_a_file_leaves_out_is_found_again_both_ways(
    method: str, settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    settings = {**SETTINGS.get(method, {}), **settings}
    model, folder = written_by_us((method, kind, settings), tmp_path / "ours")
    same_logits(kind, loaded_here(kind, folder), model)
    if kind in PLAIN[method]:
        same_logits(kind, read_by_peft(kind, folder), model)  # it says that it has to find it
        oracle = theirs(kind, method, **settings)
        same_logits(kind, loaded_here(kind, saved_by_peft(oracle, tmp_path / "theirs")), oracle)
        assert file_of(folder)[1].keys() == file_of(tmp_path / "theirs")[1].keys()


# LoRA


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize(
    "name", ["embedding", "embedding-scaled", "head", "head-tied", "embedding-tied", "both-ends-tied"]
)
def test_base_weights_in_pefts_file_replace_the_models(name: str, tmp_path: Path) -> None:
    kind, settings = LORA[name]
    saved_by_peft(theirs(kind, "lora", **settings), tmp_path)
    _, tensors = file_of(tmp_path)
    [*base_names] = [key for key in tensors if key.endswith("base_layer.weight")]
    assert base_names, "PEFT writes no base weights any more; this test and its special case can go"
    tensors = {key: value + 0.5 if key in base_names else value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    same_logits(kind, loaded_here(kind, tmp_path), loaded_by_peft(kind, tmp_path))


def test_of_overlapping_patterns_the_first_counts_for_peft_too(tmp_path: Path) -> None:
    """PEFT sorts the patterns when it writes them, and then cannot read its own file; we keep their order."""
    patterns = {"self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 6}
    model, folder = written_by_us(("lora", "llama", {"rank_pattern": patterns}), tmp_path)
    same_logits("llama", loaded_by_peft("llama", folder), model)


def test_keys_of_newer_writers_are_accepted_while_they_are_off(tmp_path: Path) -> None:
    saved_by_peft(theirs("llama", "lora"), tmp_path)
    path = tmp_path / "adapter_config.json"
    newer = {"some_new_switch": False, "some_new_list": None, "some_new_table": {}, "peft_version": "9.9.9"}
    path.write_text(json.dumps(json.loads(path.read_text()) | newer))
    loaded_here("llama", tmp_path)


def test_keys_of_a_newer_peft_that_are_on_are_told_and_those_known_to_matter_refused() -> None:
    values = {"peft_type": "LORA", "peft_version": "0.99.0.dev0", "some_new_switch": True}
    with pytest.warns(UserWarning, match="these are ignored. A newer PEFT may have written them: some_new_switch=True"):
        assert config_from_dict(values).r == 8
    off = {"megatron_config": True, "some_new_switch": False}
    for wrong in ({"peft_version": "0.21.2"}, {"peft_version": None}, off):
        with pytest.raises(AdapterError, match="=True is not supported"):
            config_from_dict({**values, **wrong})


def test_r_above_a_narrow_layers_side() -> None:
    """The gate of Qwen2-MoE's shared expert has one output."""
    model = nn.Sequential(nn.Linear(32, 1))
    assert inject(model, LoraConfig(r=16, target_modules=["0"])).trainable == 16 * (32 + 1)


def test_two_writes_of_equal_adapters_are_equal_bytes(tmp_path: Path) -> None:
    for folder, targets in (("a", ["v_proj", "q_proj"]), ("b", {"q_proj", "v_proj"})):
        written_by_us(("lora", "llama", {"target_modules": targets, "task_type": "CAUSAL_LM"}), tmp_path / folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_file_holds_what_readers_need(tmp_path: Path) -> None:
    settings = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base"}
    written, tensors = file_of(written_by_us(("lora", "llama", settings), tmp_path / "llama")[1])
    assert written == {
        **settings,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "peft_version": written["peft_version"],
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    assert list(written) == sorted(written)
    assert {value.dtype for value in tensors.values()} == {torch.float32}  # as they were trained
    assert file_of(written_by_us(("lora", "gpt2", {}), tmp_path / "gpt2")[1])[0]["fan_in_fan_out"] is True


# trainable tokens


def test_tied_ends_that_are_both_named_share_their_rows(tmp_path: Path) -> None:
    """PEFT puts one layer into the other, and cannot run the model."""
    settings = {"target_modules": ["embed_tokens", "lm_head"], "token_indices": [79, 58]}
    model, folder = written_by_us(("trainable_tokens", "llama_tied", settings), tmp_path)
    assert file_of(folder)[0]["target_modules"] == ["embed_tokens"]
    same_logits("llama_tied", loaded_by_peft("llama_tied", folder), model)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["decoder.embed_tokens"], ["lm_head"]])
def test_rows_of_pefts_for_one_of_what_shares_the_weight_stay_its_own(targets: list[str], tmp_path: Path) -> None:
    """Of T5, PEFT ties rows to those of the input embedding only. Merged, its model is another one; here it is not."""
    settings = {"target_modules": targets, "token_indices": [79, 58]}
    written = theirs("t5", "trainable_tokens", **settings)
    folder = saved_by_peft(written, tmp_path / "theirs")
    model, config, again = tiny("t5"), config_from_dict(read_config(folder)), tmp_path / "ours"
    load_adapter(model, config, folder)
    same_logits("t5", model, written)
    save_adapter(model, config, again)
    same_logits("t5", loaded_by_peft("t5", again), written)
    merge(model, config)
    same_logits("t5", model, written)


def test_rows_of_what_shares_the_weight_are_named_by_the_input_embedding(tmp_path: Path) -> None:
    """PEFT would not tie the others to an encoder's embedding."""
    settings = {"target_modules": ["encoder.embed_tokens"], "token_indices": [79, 58]}
    model, folder = written_by_us(("trainable_tokens", "t5", settings), tmp_path)
    same_logits("t5", loaded_by_peft("t5", folder), model)


# convolutions


def test_what_a_convolution_reads_is_rotated_as_in_pefts_merged_model(tmp_path: Path) -> None:
    """Unmerged, PEFT adds up what each of its windows has of a pixel where they overlap."""
    model, folder = written_by_us(("oft", "convnet", {**CONVOLUTIONS, "oft_block_size": 3}), tmp_path)
    same_logits("convnet", model, read_by_peft("convnet", folder).merge_and_unload())


@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize("settings", [{"r": 2}, {"r": 2, "use_effective_conv2d": True}, {"r": 30}])
def test_one_dimensional_convolutions_are_pefts(method: str, settings: dict[str, Any]) -> None:
    """On a layer of its own: in Whisper, PEFT fails, since its layers do not have the attributes of those below."""
    torch.manual_seed(0)
    base = nn.Conv1d(32, 48, 3, stride=2, padding=1).requires_grad_(False)
    layer: Any = wrap(base, "0", METHODS[method].config_class()(target_modules=["0"], **settings)).eval()
    their_config = peft_config_class(method)(target_modules=["0"], **settings)
    their_layer = peft.inject_adapter_in_model(their_config, nn.Sequential(copy.deepcopy(base))).eval()[0]
    randomise(layer)
    for name, parameter in layer.own_tensors().items():
        getattr(their_layer, name)["default"].data.copy_(parameter)
    assert len(list(their_layer.parameters())) == len(list(layer.parameters()))
    x = torch.randn(2, 32, 9)
    torch.testing.assert_close(layer(x), their_layer(x))
    merged = layer.folded(dict(base.named_parameters()))["weight"]
    torch.testing.assert_close(nn.functional.conv1d(x, merged, base.bias, 2, 1), layer(x))


# BOFT, (IA)^3


class _ButterflyExtension:
    """In Python, what PEFT's CUDA extension does: blocks (m, n, k, k) to m block-diagonal matrices."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"boft_n_butterfly_factor": 2}),
        ("llama", {"boft_n_butterfly_factor": 3, "boft_block_size": 8}),
        ("opt", {"boft_n_butterfly_factor": 4, "boft_block_size": 0, "boft_block_num": 8, "target_modules": ["fc2"]}),
        ("convnet", {"boft_n_butterfly_factor": 2, "target_modules": ["layer.1.convolution"]}),
    ],
)
def test_butterfly_factors_are_pefts(
    kind: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft_of_peft, "get_fbd_cuda", _ButterflyExtension)
    model, folder = written_by_us(("boft", kind, settings), tmp_path / "ours")
    same_logits(kind, loaded_by_peft(kind, folder), model)
    written = theirs(kind, "boft", **settings)
    same_logits(kind, loaded_here(kind, saved_by_peft(written, tmp_path / "theirs")), written)


def test_a_file_of_pefts_that_says_several_factors_and_holds_one_is_read(tmp_path: Path) -> None:
    """PEFT writes it where its extension is missing."""
    written = theirs("llama", "boft", boft_n_butterfly_factor=3)
    config, tensors = file_of(saved_by_peft(written, tmp_path))
    assert config["boft_n_butterfly_factor"] == 3
    assert {len(value) for name, value in tensors.items() if name.endswith("boft_R")} == {1}
    same_logits("llama", loaded_here("llama", tmp_path), written)


@pytest.mark.parametrize(("kind", "target"), [("llama", "q_proj"), ("bert", "dense")])
def test_an_ia3_of_which_only_targets_are_given_is_written_so_that_peft_reads_it(
    kind: str, target: str, tmp_path: Path
) -> None:
    """PEFT cannot read its own."""
    model, folder = written_by_us(("ia3", kind, {"target_modules": [target]}), tmp_path)
    same_logits(kind, loaded_by_peft(kind, folder), model)


def test_a_feedforward_module_of_ia3_is_named_in_whole_parts() -> None:
    """PEFT takes ``wo`` for one where ``o`` is."""
    model, _ = ours("t5", "ia3", target_modules=["o", "wo"], feedforward_modules=["o"])
    assert model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo").ia3_l.shape == (32, 1)
    assert model.get_submodule("encoder.block.0.layer.0.SelfAttention.o").ia3_l.shape == (1, 32)


# AdaLoRA


def _train(model: Any, inputs: dict[str, torch.Tensor], steps: int, penalty: Any, allocate: Any) -> list[float]:
    """The losses of so many steps."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.05)
    losses = []
    for step in range(1, steps + 1):
        loss = model(**inputs).loss
        loss = loss if penalty is None else loss + penalty(model)
        loss.backward()
        optimizer.step()
        allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adalora_trains_and_shares_out_its_budget_as_peft_does(kind: str, tmp_path: Path) -> None:
    schedule = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 2, "total_step": 9}
    # without the task PEFT leaves the penalty out
    model, config = ours(kind, "adalora", task_type="CAUSAL_LM", target_modules="all-linear", **schedule)
    save_adapter(model, config, tmp_path / "start")
    oracle = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "start", is_trainable=True)
    inputs = labelled(kind)
    losses = _train(
        model, inputs, 9, lambda model: penalty(model, config), lambda step: after_step(model, config, step, 9)
    )
    assert losses == pytest.approx(_train(oracle, inputs, 9, None, oracle.base_model.update_and_allocate), rel=1e-4)
    save_adapter(model, config, tmp_path / "ours")
    written, tensors = file_of(tmp_path / "ours")
    expected, theirs_ = file_of(saved_by_peft(oracle, tmp_path / "theirs"))
    assert written["rank_pattern"] == expected["rank_pattern"]
    kept = [sum(mask) for mask in written["rank_pattern"].values()]
    assert sum(kept) == 2 * len(kept)
    assert len(set(kept)) > 1
    for name, value in tensors.items():
        torch.testing.assert_close(value, theirs_[name], atol=2e-4, rtol=1e-3)
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):  # PEFT takes its own for LoRA's
        again = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "ours").eval()
    same_logits(kind, again, model)
    same_logits(kind, loaded_here(kind, tmp_path / "ours"), model)
    same_logits(kind, loaded_here(kind, tmp_path / "theirs"), oracle)


# SHiRA, RandLora, PVeRA, Lily, FRoD, TinyLoRA


def test_a_mask_of_ones_own_is_read_from_pefts_file(tmp_path: Path) -> None:
    settings = peft.ShiraConfig(r=2, target_modules=["q_proj"])
    settings.mask_fn = lambda layer, r, **_: (torch.arange(32 * 32).view(32, 32) % 8 == 3).to(layer.weight)
    settings.mask_type = "every eighth"
    oracle = peft.get_peft_model(tiny("llama"), settings)
    nn.init.normal_(oracle.base_model.model.model.layers[0].self_attn.q_proj.shira_weight["default"])
    saved_by_peft(oracle, tmp_path)
    assert read_config(tmp_path)["mask_type"] == "every eighth"
    same_logits("llama", loaded_here("llama", tmp_path), oracle)


def test_randloras_bases_stand_once_in_a_file_where_their_copies_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's has them once more for each layer. It warns that they are missing, and does not use them."""
    monkeypatch.setattr("peftcli.methods.randlora.layers._MOST_COPIED", 1000)
    model, folder = written_by_us(("randlora", "llama", SETTINGS["randlora"]), tmp_path / "ours")
    assert sum(name.endswith("randlora_B") for name in file_of(folder)[1]) == 1
    with warnings.catch_warnings(action="ignore"):
        same_logits("llama", read_by_peft("llama", folder), model)
    loaded_here("llama", saved_by_peft(theirs("llama", "randlora", **SETTINGS["randlora"]), tmp_path / "theirs"))


def test_pveras_seed_of_what_is_drawn_is_kept_for_peft(tmp_path: Path) -> None:
    oracle = theirs("llama", "pvera", r=8, generator_seed=3)
    config = config_from_dict(read_config(saved_by_peft(oracle, tmp_path / "a")))
    model = tiny("llama")
    load_adapter(model, config, tmp_path / "a", trainable=True)
    save_adapter(model, config, tmp_path / "b")
    assert file_of(tmp_path / "b")[0]["generator_seed"] == 3
    same_logits("llama", loaded_by_peft("llama", tmp_path / "b"), oracle)


def test_lily_shares_with_all_linear_too() -> None:
    """PEFT's does not."""
    model, _ = ours("llama", "lily", **SETTINGS["lily"], target_modules="all-linear", stride_A=2)
    assert len({id(value) for name, value in model.named_parameters() if "lily_B" in name}) == 7


def test_frods_basis_in_the_file_is_the_one_that_counts(tmp_path: Path) -> None:
    """The same adapter in a basis whose first vector points the other way, as another machine may find it."""
    _, folder = written_by_us(("frod", "llama", {"target_modules": ["q_proj"]}), tmp_path)
    before, model = loaded_here("llama", folder), loaded_here("llama", folder)
    layers = [layer for layer in model.modules() if hasattr(layer, "frod_V") and layer.base_layer is not None]
    with torch.no_grad():
        layers[0].frod_V[:, 0] *= -1
        rows, columns = layers[0].frod_s.indices
        for layer in layers:
            layer.frod_lambda_s_values[(rows == 0) ^ (columns == 0)] *= -1
    save_adapter(model, config_from_dict(read_config(folder)), folder)
    same_logits("llama", loaded_here("llama", folder), before)


def test_a_scaled_embedding_is_merged_by_tinylora_as_it_computes(tmp_path: Path) -> None:
    """PEFT's forgets on merging that it scales."""
    settings = {"r": 3, "target_modules": ["embed_tokens"]}
    model, folder = written_by_us(("tinylora", "gemma3", settings), tmp_path)
    oracle, ids = read_by_peft("gemma3", folder), batch("gemma3")["input_ids"]
    same_logits("gemma3", oracle, model)
    with torch.no_grad():
        right = oracle.get_input_embeddings()(ids)
    merge(model, config_from_dict(read_config(folder)))
    torch.testing.assert_close(model.get_input_embeddings()(ids), right)


# what stands in a model more than once


def test_convolutions_of_whisper_are_adapted_and_merged() -> None:
    """PEFT's layers do not have the stride that Whisper reads."""
    model, config = ours("whisper", "lora", target_modules=["conv1", "conv2"])
    expected = logits(model, batch("whisper"))
    merge(model, config)
    torch.testing.assert_close(logits(model, batch("whisper")), expected, atol=1e-4, rtol=1e-4)
