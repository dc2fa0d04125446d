"""What ``transformers.Trainer`` writes of an adapted model, and reads again: the adapter's folder, as with PEFT."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from guidekit import token_rows, trainer_of
from huggingface_hub import ModelCard
from models_tiny import batch, ids, labelled, logits, randomise, tiny
from oracle import silence
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer

import peftcli
from peftcli.errors import AdapterError

CONFIGS: dict[str, Any] = {
    "lora": lambda: peftcli.LoraConfig(task_type="CAUSAL_LM", r=4),
    "prompt": lambda: peftcli.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def _model(method: str = "lora") -> Any:
    model = peftcli.get_peft_model(tiny("llama"), CONFIGS[method]())
    randomise(model)
    return model


def _trainer(model: nn.Module, folder: Path, **changes: Any) -> Trainer:
    steps = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "save_strategy": "steps", "eval_strategy": "steps"}
    options = {"per_device_train_batch_size": 4, "learning_rate": 0.5, "lr_scheduler_type": "constant", **steps}
    return trainer_of(model, folder, more={"eval_dataset": token_rows()}, **{**options, **changes})


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("method", CONFIGS)
def test_save_model_writes_an_adapter_that_peft_reads(method: str, tmp_path: Path) -> None:
    model = _model(method)
    _trainer(model, tmp_path / "run").save_model(str(tmp_path / "saved"))
    assert _names(tmp_path / "saved") == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_args.bin",
    }
    expected = logits(model.eval(), batch("llama"))
    with silence():
        theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "saved").eval()
    ours = peftcli.PeftModel.from_pretrained(tiny("llama"), tmp_path / "saved").eval()
    torch.testing.assert_close(logits(theirs, batch("llama")), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(ours, batch("llama")), expected)


def test_each_checkpoint_holds_the_adapter_of_its_step(tmp_path: Path) -> None:
    model = _model()
    trainer = _trainer(model, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss")
    with silence():
        trainer.train()
    saved = {step: tmp_path / f"checkpoint-{step}" for step in (2, 4)}
    for folder in saved.values():
        adapter = load_file(folder / "adapter_model.safetensors")
        state = load_file(folder / "model.safetensors")  # what Trainer reads: the adapter's weights only
        assert sum(value.numel() for value in state.values()) == sum(value.numel() for value in adapter.values())
    best = Path(str(trainer.state.best_model_checkpoint))
    now = logits(model.eval(), batch("llama"))
    for folder in saved.values():
        loaded = peftcli.PeftModel.from_pretrained(tiny("llama"), folder).eval()
        assert torch.equal(logits(loaded, batch("llama")), now) == (folder == best)


def test_several_adapters_and_a_model_of_ones_own_are_saved_too(tmp_path: Path) -> None:
    model = _model()
    model.add_adapter("other", CONFIGS["lora"]())
    _trainer(model, tmp_path / "run").save_model(str(tmp_path / "several"))
    assert (tmp_path / "several" / "other" / "adapter_model.safetensors").is_file()
    own = peftcli.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peftcli.LoraConfig(target_modules=["0"], r=2))
    trainer = _trainer(own, tmp_path / "run")
    trainer.save_model(str(tmp_path / "own"))
    assert "adapter_model.safetensors" in _names(tmp_path / "own")
    assert own.is_activation_checkpointing is False  # which Trainer asks before it trains on several devices


def test_the_best_of_another_adapter_than_default_is_loaded(tmp_path: Path) -> None:
    """Trainer names the checkpoint's folder, where ``default`` is, and the adapter that is active."""
    model = _model()
    model.add_adapter("other", peftcli.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["k_proj"]))
    model.set_adapter("other")
    trainer = _trainer(model, tmp_path)
    trainer.train()
    trainer.model.load_adapter(str(tmp_path / "checkpoint-2"), "other")
    saved = load_file(tmp_path / "checkpoint-2" / "other" / "adapter_model.safetensors")
    model.load_adapter(str(tmp_path / "checkpoint-2"), "other", subfolder="other")  # as one may say oneself
    found = peftcli.get_peft_model_state_dict(model, adapter_name="other")
    assert all(torch.equal(found[name], value) for name, value in saved.items())


def test_a_gathered_state_is_saved_in_the_place_of_the_models(tmp_path: Path) -> None:
    model, other = _model(), _model()
    state = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "gathered", state_dict=state)
    other.load_state_dict(state)
    other.save_pretrained(tmp_path / "held")
    file = "adapter_model.safetensors"
    assert (tmp_path / "gathered" / file).read_bytes() == (tmp_path / "held" / file).read_bytes()
    first = next(iter(state))
    with pytest.raises(AdapterError, match=f"state_dict: lacks {first}"):
        model.save_pretrained(tmp_path / "less", state_dict={name: state[name] for name in state if name != first})


def test_what_trainer_takes_it_for_changes_nothing_else(tmp_path: Path) -> None:
    """Not its type, what it forwards to the base model, copies, pickles, or what FSDP makes of it."""
    model = _model().eval()
    expected = logits(model, batch("llama"))
    assert isinstance(model, PreTrainedModel)
    assert type(model) is peftcli.PeftModelForCausalLM
    assert repr(model).startswith("PeftModelForCausalLM(")
    assert model.get_input_embeddings() is model.get_base_model().get_input_embeddings()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is peftcli.PeftModelForCausalLM
        assert torch.equal(logits(twin, batch("llama")), expected)

    class Sharded:
        pass

    model.__class__ = type("ShardedModel", (Sharded, model.__class__), {})
    assert isinstance(model, Sharded)
    assert not issubclass(type(model), PreTrainedModel)
    assert torch.equal(logits(model, batch("llama")), expected)
    compiled = torch.compile(_model(), backend="eager")
    assert compiled(**labelled("llama")).loss.isfinite()
    _trainer(compiled, tmp_path / "run").save_model(str(tmp_path / "compiled"))
    assert json.loads((tmp_path / "compiled" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.slow
def test_a_quantised_model_with_an_adapter_trains_where_its_weights_let_gradients_through(tmp_path: Path) -> None:
    """Trainer asks both questions."""
    for trainable in (True, False):
        model = _model()
        model.get_base_model().is_quantized = True
        model.get_base_model().hf_quantizer = SimpleNamespace(is_trainable=trainable, is_qat_trainable=False)
        if trainable:
            _trainer(model, tmp_path).train()
        else:
            with pytest.raises(ValueError, match="quantized"):
                _trainer(model, tmp_path)


def test_a_readme_of_ones_own_keeps_its_text_and_what_it_says(tmp_path: Path) -> None:
    model = _model()
    model.get_base_model().add_model_tags(["tiny"])
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My model\n\nTrained with love.\n")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "# My model\n\nTrained with love."
    assert card.data.license == "mit"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["mine", "lora", "peftcli", "tiny", "transformers"]
    before = (tmp_path / "README.md").read_bytes()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == before


def test_the_card_has_the_tags_that_peft_writes(tmp_path: Path) -> None:
    base = tiny("llama")
    base.add_model_tags(["tiny"])
    base.config._name_or_path = "acme/tiny"
    base.name_or_path = "acme/tiny"
    (tmp_path / "theirs").mkdir()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    theirs.create_or_update_model_card(tmp_path / "theirs")
    peftcli.get_peft_model(base, CONFIGS["lora"]()).save_pretrained(tmp_path / "ours")
    wanted, found = (set(ModelCard.load(tmp_path / name / "README.md").data.tags) for name in ("theirs", "ours"))
    assert found == wanted | {"peftcli"}


def test_our_own_card_is_renewed_and_one_that_cannot_be_read_stays(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path)
    peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(task_type="CAUSAL_LM", r=3)).save_pretrained(tmp_path)
    assert "| method.r | 3 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("---\na: [\n---\nMine.\n")
    with pytest.warns(UserWarning, match="the model card stays as it is: .*front matter"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "---\na: [\n---\nMine.\n"


@pytest.mark.parametrize("options", [{"slected_adapters": ["default"]}, {"max_shard_size": "1GB"}])
def test_an_option_that_is_not_known_is_named_and_loses_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"ignores {next(iter(options))}"):
        _model().save_pretrained(tmp_path / "adapter", **options)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_no_pickle_is_written(tmp_path: Path) -> None:
    model = _model()
    for options in ((False,), ()):
        named = {} if options else {"safe_serialization": False}
        with pytest.raises(AdapterError, match="safe_serialization: False would write a pickle"):
            model.save_pretrained(tmp_path / "adapter", *options, **named)
    assert not (tmp_path / "adapter").exists()
    model.save_pretrained(
        tmp_path / "adapter", True, ["default"], "auto", False
    )  # in PEFT's order: not the main process
    assert not (tmp_path / "adapter").exists()


@pytest.mark.slow
def test_a_compiled_model_is_one_graph() -> None:
    torch._dynamo.reset()  # other tests compiled the same code
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(r=2, task_type="CAUSAL_LM")).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch("llama")).logits, model(**batch("llama")).logits)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_labels_are_smoothed_as_with_peft(kind: str, tmp_path: Path) -> None:
    """Trainer shifts the labels of models whose class it knows, by its name."""
    losses = []
    for library in (peft, peftcli):
        torch.manual_seed(0)
        task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
        model = library.get_peft_model(tiny(kind), library.LoraConfig(task_type=task, r=4))
        assert repr(model).startswith(f"{type(model).__name__}(")
        trainer = _trainer(model, tmp_path / library.__name__, label_smoothing_factor=0.1, save_strategy="no")
        inputs = {"input_ids": ids(2, 6), "labels": ids(2, 6, seed=1)}
        if kind == "t5":
            inputs["decoder_input_ids"] = ids(2, 6, seed=2)
        losses.append(float(trainer.compute_loss(model.eval(), inputs).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
