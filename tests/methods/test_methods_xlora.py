"""X-LoRA: which adapter computes, what the classifier reads, and what cannot be mixed."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import PAD, batch, ids, labelled, logits, randomise, tiny
from oracle import ours
from promises import experts

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import disabled, inject, set_trainable, unload
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods import config_from_dict
from peftcli.methods.updates import UpdateUnknown, find_updates
from peftcli.methods.xlora import XLoraConfig
from peftcli.methods.xlora.layers import find_mixture
from peftcli.peft_api import LoraConfig, PeftModel, get_peft_model
from peftcli.tasks.text.fast.losses import output_head
from peftcli.tasks.text.language_model import target_losses
from peftcli.tasks.text.token_ids import next_tokens


def _mixed(kind: str = "llama", **settings: Any) -> tuple[Any, XLoraConfig, Any]:
    """The model, its config and the mixture."""
    model, config = tiny(kind), XLoraConfig(**{"adapters": experts(kind), **settings})
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model.eval(), config, find_mixture(model)


@pytest.mark.parametrize("settings", [{}, {"top_k_lora": 1, "enable_softmax": False}, {"layerwise_scalings": True}])
def test_a_classifier_that_is_sure_of_one_adapter_gives_what_that_one_gives(settings: dict[str, Any]) -> None:
    model, _, mixture = _mixed(**settings)
    for number, folder in enumerate(map(Path, experts("llama").values())):
        with torch.no_grad():
            mixture.layers[-1].weight.zero_()
            bias = 1.0 if settings.get("top_k_lora") else 1e4
            mixture.layers[-1].bias.view(-1, 2).copy_(bias * torch.eye(2)[number])
        alone = tiny("llama")
        load_adapter(alone, config_from_dict(read_config(folder)), folder)
        torch.testing.assert_close(logits(model, batch("llama")), logits(alone, batch("llama")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"top_k_lora": 1}, "set enable_softmax: false"), ({"enable_softmax": False}, "needs top_k_lora")],
)
def test_a_softmax_of_the_top_k_that_does_nothing_of_its_own_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.warns(PeftWarning, match=f"enable_softmax_topk .*{message}"):
        XLoraConfig(adapters=experts("llama"), enable_softmax_topk=True, **settings)


@torch.no_grad()
def test_generate_is_a_greedy_loop_and_padding_changes_no_row() -> None:
    model, _, _ = _mixed()
    tokens, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    tokens[1, :3], mask[1, :3] = PAD, 0
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    found = model.generate(input_ids=tokens, attention_mask=mask, **settings)
    for row, start in ((0, 0), (1, 3)):
        expected = tokens[row : row + 1, start:]
        for _ in range(6):
            step = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits[:, -1]
            expected = torch.cat([expected, step.argmax(-1, keepdim=True)], 1)
        assert torch.equal(found[row : row + 1, start:], expected)
    with pytest.raises(AdapterError, match="use_cache=False"):
        model.generate(input_ids=tokens, attention_mask=mask, use_cache=True, **settings)


def test_the_base_model_reads_for_the_classifier_unless_told_otherwise() -> None:
    model, _, mixture = _mixed()
    hidden = tiny("llama")(**batch("llama"), output_hidden_states=True).hidden_states[-1]
    logits(model, batch("llama"))
    torch.testing.assert_close(mixture.get_latest_scalings(), mixture(hidden))
    mixture.set_scaling_pass_value(None)
    logits(model, batch("llama"))
    assert not torch.allclose(mixture.get_latest_scalings(), mixture(hidden))


def test_trained_adapters_are_in_the_file(tmp_path: Path) -> None:
    model, config, _ = _mixed(use_trainable_adapters=True)
    model.train()(**labelled("llama")).loss.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    save_adapter(model.eval(), config, tmp_path)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))
    frozen, _, _ = _mixed()
    assert {name.split(".")[1] for name in adapter_state(frozen)} == {"internal_xlora_classifier"}
    assert len(adapter_state(model)) > len(adapter_state(frozen))


def test_losses_are_those_of_its_logits_though_the_head_was_looked_for_while_it_was_off() -> None:
    model, _, _ = _mixed()
    given = {"input_ids": ids(1, 12)}
    targets = next_tokens(given["input_ids"])
    with disabled(model):
        assert output_head(model, given) is not None
    found, _ = target_losses(model, given, targets)
    expected = torch.nn.functional.cross_entropy(model(**given).logits[0, :-1], targets[0, :-1], reduction="none")
    torch.testing.assert_close(found.flatten(), expected)


def test_a_model_is_copied_after_a_step_of_training() -> None:
    model, _, mixture = _mixed()
    mixture.enable_scalings_logging()
    model.train()(**labelled("llama")).loss.backward()
    twin = copy.deepcopy(model).eval()
    assert torch.equal(logits(twin, batch("llama")), logits(model.eval(), batch("llama")))
    assert mixture.get_scalings_log()[0].requires_grad


def test_pefts_methods_are_the_models(tmp_path: Path) -> None:
    model: Any = get_peft_model(tiny("llama"), XLoraConfig(adapters=experts("llama"), task_type="CAUSAL_LM")).eval()
    model.enable_scalings_logging()
    for length in (4, 6, 4):
        logits(model, {"input_ids": ids(2, length)})
    model.disable_scalings_logging()
    logits(model, {"input_ids": ids(2, 4)})
    assert [tuple(each.shape) for each in model.get_scalings_log()] == [(2, length, 4, 2) for length in (4, 6, 4)]
    assert {length: places for length, (places, _) in model.get_bucketed_scalings_log().items()} == {4: [0, 2], 6: [1]}
    model.clear_scalings_log()
    assert not model.get_scalings_log()
    before = logits(model, batch("llama"))
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == model.internal_xlora_classifier.config.global_scaling_weight == 0.0
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))
    model.set_global_scaling_weight(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), batch("llama")), before)


def test_a_mixture_whose_adapters_have_moved_is_loaded_with_their_new_places(tmp_path: Path) -> None:
    adapters = {number: str(tmp_path / number) for number in experts("llama")}
    for number, folder in experts("llama").items():
        shutil.copytree(folder, adapters[number])
    model = get_peft_model(tiny("llama"), XLoraConfig(adapters=adapters, hidden_size=32)).eval()
    model.save_pretrained(tmp_path / "mixture")
    moved = {number: shutil.move(folder, f"{folder} moved") for number, folder in adapters.items()}
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "mixture", adapters=moved)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))
    model = get_peft_model(tiny("llama"), LoraConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="adapters: works for XLORA, not LORA"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path, adapters=moved)


def test_its_update_is_not_one_of_the_weights() -> None:
    model, config, _ = _mixed()
    with pytest.raises(UpdateUnknown, match="XLORA"):
        find_updates(config, adapter_state(model))


def test_a_part_of_the_model_alone_is_refused_and_unloading_gives_the_cache_back() -> None:
    model, _, _ = _mixed()
    assert model.generation_config.use_cache is False
    logits(model, batch("llama"))
    with pytest.raises(AdapterError, match="whole model"):
        model.model(**batch("llama"))
    assert not model.config.use_cache
    unload(model)
    assert model.config.use_cache
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ia3", {}, "bad is IA3; X-LoRA mixes LORA"),
        ("lora", {"alora_invocation_tokens": [5]}, "bad has alora_invocation_tokens; X-LoRA mixes plain LoRA"),
        ("lora", {"use_dora": True}, "DoRA"),
        (
            "lora",
            {"modules_to_save": ["lm_head"]},
            "bad holds base_model.model.lm_head.weight; X-LoRA mixes plain LoRA",
        ),
    ],
)
def test_what_is_no_plain_lora_is_not_mixed(
    method: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_adapter(*ours("llama", method, **settings), tmp_path)
    with pytest.raises(AdapterError, match=message):
        _mixed(adapters={"bad": str(tmp_path)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapters": {}}, "adapters: names no LoRA adapter"),
        ({"top_k_lora": 3}, r"top_k_lora: must be in \[1, 2\], not 3"),
        ({"hidden_size": 4096}, "hidden_size: is 4096, the base model's is 32"),
        ({"adapters": {"a": "no-such-folder"}}, "no adapter_config.json here"),
        (
            {"adapters": experts("gpt2")},
            "an adapter adapts transformer.h.0.attn.c_attn, which the base model does not have",
        ),
    ],
)
def test_settings_that_cannot_be_right(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        _mixed(**settings)
