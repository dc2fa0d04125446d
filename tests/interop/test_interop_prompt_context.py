"""CPT and cartridges: PEFT as oracle of the file, the forward pass, the loss, its gradients and the counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import ids, labelled, tiny
from oracle import file_of, loaded_by_peft, loaded_here, ours, same_logits, saved_by_peft, theirs

from peftcli import peft_api
from peftcli.core.files import save_adapter
from peftcli.core.weights import adapter_state

N = 9
CPT: dict[str, Any] = {
    "cpt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13],
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 5, 6, 7, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.5,
    "opt_projection_epsilon": 20.0,
    "opt_projection_format_epsilon": 10.0,
    "task_type": "CAUSAL_LM",
}
CARTRIDGE: dict[str, Any] = {"num_virtual_tokens": N, "num_frozen_tokens": 2, "task_type": "CAUSAL_LM"}
TYPES = torch.tensor([[1, 2, 2, 2, 3, 3, 4, 4, 0], [1, 2, 3, 3, 3, 3, 4, 4, 4]])
both = pytest.mark.parametrize(
    ("method", "settings"), [("cpt", CPT), ("cartridge", CARTRIDGE)], ids=["cpt", "cartridge"]
)

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # PEFT's


def _trained(model: torch.nn.Module) -> torch.nn.Parameter:
    [parameter] = [value for value in model.parameters() if value.requires_grad]
    return parameter


def _same_weights(kind: str, method: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """PEFT's model and ours, with the same adapter."""
    oracle, (model, _) = theirs(kind, method, **settings), ours(kind, method, **settings)
    with torch.no_grad():
        _trained(model).copy_(_trained(oracle))
        if method == "cartridge":
            frozen = next(value for name, value in model.named_parameters() if name.endswith("frozen_embedding"))
            frozen.copy_(oracle.prompt_encoder["default"].frozen_embedding)
    return oracle, model


@both
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_gradients_and_counts_are_pefts(kind: str, method: str, settings: dict[str, Any]) -> None:
    oracle, model = _same_weights(kind, method, settings)
    same_logits(kind, model, oracle)
    inputs = labelled(kind) | ({"input_type_mask": TYPES} if method == "cpt" else {})
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][1, 7:] = -100
    for each in (oracle, model):
        loss = each.train()(**{name: value.clone() for name, value in inputs.items()}).loss  # PEFT writes into them
        loss.backward()
        each.loss = loss.detach()
    torch.testing.assert_close(model.loss, oracle.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_trained(model).grad, _trained(oracle).grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(_trained(model), _trained(oracle))  # CPT's is cut to its bound
    trainable, total = oracle.get_nb_trainable_parameters()
    assert trainable == _trained(model).numel()
    assert total == sum(value.numel() for value in model.parameters())


@both
def test_files_go_both_ways(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, config = ours("llama", method, **settings)
    save_adapter(model, config, tmp_path / "ours")
    same_logits("llama", loaded_by_peft("llama", tmp_path / "ours"), model)
    oracle = theirs("llama", method, **settings)
    saved_by_peft(oracle, tmp_path / "theirs")
    same_logits("llama", loaded_here("llama", tmp_path / "theirs"), oracle)
    here, there = (file_of(tmp_path / folder)[1] for folder in ("ours", "theirs"))
    assert {name: value.shape for name, value in here.items()} == {name: value.shape for name, value in there.items()}


def test_code_for_pefts_cpt_runs_with_another_import() -> None:
    losses = []
    for library in (peft, peft_api):
        config = (peft.CPTConfig if library is peft else peft_api.PeftConfig.from_peft_type)(
            **CPT, **({} if library is peft else {"peft_type": "CPT"})
        )
        model: Any = library.get_peft_model(tiny("llama"), config)
        losses.append(model(**labelled("llama"), input_type_mask=TYPES.clone()).loss)
    torch.testing.assert_close(*losses)


def test_pefts_default_type_mask_makes_no_label_count() -> None:
    oracle = theirs("llama", "cpt", task_type="CAUSAL_LM")
    assert torch.isnan(oracle(**labelled("llama")).loss)
    assert torch.isfinite(ours("llama", "cpt", task_type="CAUSAL_LM")[0](**labelled("llama")).loss)


def test_a_cartridge_starts_and_is_composed_as_pefts(tmp_path: Path) -> None:
    tokens = ids(1, 12)
    for library, folder in ((peft, "theirs"), (peft_api, "ours")):
        config = (peft.CartridgeConfig if library is peft else peft_api.PeftConfig.from_peft_type)(
            **CARTRIDGE, **({} if library is peft else {"peft_type": "CARTRIDGE"})
        )
        model: Any = library.get_peft_model(tiny("llama"), config).eval()
        with torch.no_grad(), model.disable_adapter():
            output = model(input_ids=tokens, use_cache=True)
        cache = output["cache"] if "cache" in output else output["past_key_values"]
        values = library.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        assert torch.equal(values, library.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=N))
        saved_by_peft(model, tmp_path / folder)
        library.compose_cartridge_adapters([tmp_path / folder] * 2, output_path=tmp_path / folder / "two")
    for part in ("", "two"):
        same_logits(
            "llama", loaded_here("llama", tmp_path / "ours" / part), loaded_by_peft("llama", tmp_path / "theirs" / part)
        )
        torch.testing.assert_close(*(file_of(tmp_path / folder / part)[1] for folder in ("ours", "theirs")))
    assert len(adapter_state(loaded_here("llama", tmp_path / "theirs/two"))["prompt_embeddings"]) == 2 * N
