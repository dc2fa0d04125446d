"""PEFT's quicktour, run once with PEFT and once with our names in its place."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from guidekit import logged, trainer_of
from models_tiny import PAD, batch, eval_mode, ids, labelled, logits, randomise, tiny
from oracle import silence
from safetensors.torch import load_file, save_file
from torch import nn
from trainkit import reset_accelerate
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Seq2SeqTrainer,
    Trainer,
    TrainingArguments,
)

import peftcli
from peftcli.errors import AdapterError

Base = Callable[[str], str]
AUTO = {"llama": AutoModelForCausalLM, "llama_tied": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
TASKS_OF_CLASSES = {
    "CausalLM": "CAUSAL_LM",
    "Seq2SeqLM": "SEQ_2_SEQ_LM",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
    "FeatureExtraction": "FEATURE_EXTRACTION",
}
TASK = {"llama": "CAUSAL_LM", "llama_tied": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


def _start(lib: ModuleType, kind: str, base: str, **settings: Any) -> Any:
    """The quicktour's first steps."""
    config = lib.LoraConfig(
        task_type=lib.TaskType[TASK[kind]], inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1, **settings
    )
    return lib.get_peft_model(AUTO[kind].from_pretrained(base), config)


def _printed(capsys: pytest.CaptureFixture[str], model: Any) -> str:
    capsys.readouterr()
    model.print_trainable_parameters()
    return capsys.readouterr().out


@pytest.mark.grid(each="settings")
@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("settings", [{}, {"target_modules": "all-linear", "r": 3}, {"num_virtual_tokens": 5}])
def test_the_same_line_is_printed(
    kind: str, settings: dict[str, Any], base: Base, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for lib in (peft, peftcli):
        virtual = "num_virtual_tokens" in settings
        extra = {"num_transformer_submodules": 1} if virtual else {}  # PEFT's 2 counts rows that nothing trains
        config_class = lib.PromptTuningConfig if virtual else lib.LoraConfig
        model = lib.get_peft_model(
            AUTO[kind].from_pretrained(base(kind)), config_class(task_type=TASK[kind], **settings, **extra)
        )
        lines.append(_printed(capsys, model))
    assert lines[0] == lines[1]
    assert lines[0].startswith("trainable params: ")


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("kind", AUTO)
def test_save_load_generate_merge(lib: ModuleType, kind: str, base: Base, tmp_path: Path) -> None:
    model = _start(lib, kind, base(kind))
    randomise(model)
    model.eval()
    expected = logits(model, batch(kind))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }

    auto = lib.AutoPeftModelForSeq2SeqLM if kind == "t5" else lib.AutoPeftModelForCausalLM
    for loaded in (
        lib.PeftModel.from_pretrained(AUTO[kind].from_pretrained(base(kind)), tmp_path),
        auto.from_pretrained(tmp_path),
    ):
        torch.testing.assert_close(logits(loaded.eval(), batch(kind)), expected, atol=1e-5, rtol=1e-5)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())

    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, batch(kind)), logits(tiny(kind), batch(kind)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(loaded, batch(kind)), expected, atol=1e-5, rtol=1e-5)

    text = loaded.generate(input_ids=ids(2, 6), max_new_tokens=5, do_sample=False, eos_token_id=None)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch(kind)), expected, atol=1e-3, rtol=1e-3)
    again = merged.generate(input_ids=ids(2, 6), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(again, text)
    merged.save_pretrained(tmp_path / "merged")
    plain = AUTO[kind].from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain, batch(kind)), expected, atol=1e-3, rtol=1e-3)


def test_a_merged_tied_model_is_saved_and_loaded_with_the_right_logits(base: Base, tmp_path: Path) -> None:
    """PEFT adds both deltas to the one weight."""
    model = _start(peftcli, "llama_tied", base("llama_tied"), target_modules=["embed_tokens", "lm_head"])
    randomise(model)
    expected = logits(model.eval(), batch("llama"))
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain, batch("llama")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_auto_class_finds_the_base_models_own_class(kind: str, base: Base, tmp_path: Path) -> None:
    model = _start(peftcli, kind, base(kind))
    randomise(model)
    model.eval().save_pretrained(tmp_path)
    loaded = peftcli.AutoPeftModel.from_pretrained(tmp_path)
    assert type(loaded.get_base_model()) is type(tiny(kind))
    assert torch.equal(logits(loaded.eval(), batch(kind)), logits(model, batch(kind)))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    loaded = peftcli.AutoPeftModel.from_pretrained(tmp_path)
    assert type(loaded.get_base_model()) is type(tiny(kind))


def test_an_adapter_without_a_base_model_is_one_clear_error(base: Base, tmp_path: Path) -> None:
    model = _start(peftcli, "llama", base("llama"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="names no base model"):
        peftcli.AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_a_base_model_that_is_a_pickle_is_not_read(base: Base, tmp_path: Path) -> None:
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    _start(peftcli, "llama", base("llama")).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(folder)}))
    tiny("llama").config.save_pretrained(folder)
    torch.save(tiny("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        peftcli.AutoPeftModelForCausalLM.from_pretrained(adapter)


def test_what_is_saved_trains_on(lib: ModuleType, base: Base, tmp_path: Path) -> None:
    model = _start(lib, "llama", base("llama"))
    model.save_pretrained(tmp_path)
    loaded = lib.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base("llama")), tmp_path, is_trainable=True
    )
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    loaded(**labelled("llama")).loss.backward()
    trained = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("kind", ["PeftModel", *(f"PeftModelFor{task}" for task in TASKS_OF_CLASSES)])
def test_the_classes_put_the_adapter_in_as_get_peft_model_does(kind: str, tmp_path: Path) -> None:
    models = []
    for make in (getattr(peftcli, kind), peftcli.get_peft_model):
        torch.manual_seed(0)
        config = peftcli.LoraConfig(r=4, target_modules=["q_proj"], task_type=TASKS_OF_CLASSES.get(kind[12:]))
        models.append(make(tiny("llama"), config, adapter_name="own"))
    assert [type(model) is getattr(peftcli, kind) for model in models] == [True, True]
    trained = [{name for name, value in model.named_parameters() if value.requires_grad} for model in models]
    assert trained[0] == trained[1]
    assert len(trained[0]) == 4
    for model, folder in zip(models, ("class", "function"), strict=True):
        model.save_pretrained(tmp_path / folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert len({(tmp_path / folder / "own" / file).read_bytes() for folder in ("class", "function")}) == 1


def test_a_wrapped_model_is_copied_with_its_adapter(base: Base) -> None:
    model = _start(peftcli, "llama", base("llama"))
    twin = copy.deepcopy(model)
    randomise(twin)
    assert not torch.equal(logits(twin.eval(), batch("llama")), logits(model.eval(), batch("llama")))
    assert list(twin.state_dict()) == list(model.state_dict())


def test_load_adapter_fills_the_weights_that_are_there(base: Base, tmp_path: Path) -> None:
    saved, model = (_start(peftcli, "llama", base("llama")) for _ in range(2))
    randomise(saved)
    saved.save_pretrained(tmp_path)
    before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.load_adapter(tmp_path, "default", is_trainable=True)
    after = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(after[name] is parameter for name, parameter in before.items())  # an optimizer holds them
    assert torch.equal(logits(model.eval(), batch("llama")), logits(saved.eval(), batch("llama")))
    model.load_adapter(tmp_path)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_load_adapter_takes_one_of_another_config(base: Base, tmp_path: Path) -> None:
    saved = _start(peftcli, "llama", base("llama"), target_modules=["up_proj"])
    model = _start(peftcli, "llama", base("llama"))
    randomise(saved)
    saved.save_pretrained(tmp_path)
    model.load_adapter(tmp_path)
    assert torch.equal(logits(model.eval(), batch("llama")), logits(saved.eval(), batch("llama")))
    assert model.active_peft_config.target_modules == {"up_proj"}


@pytest.mark.parametrize("targets", [["up_proj"], ["q_proj", "v_proj"]])
def test_load_adapter_keeps_the_old_one_when_the_new_does_not_fit(
    targets: list[str], base: Base, tmp_path: Path
) -> None:
    model = _start(peftcli, "llama", base("llama"))
    randomise(model)
    expected = logits(model.eval(), batch("llama"))
    _start(peftcli, "llama", base("llama"), target_modules=targets).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file, {"format": "pt"})
    with pytest.raises(AdapterError, match="missing: "):
        model.load_adapter(tmp_path)
    with pytest.raises(AdapterError, match="missing: "):
        model.load_adapter(tmp_path, "other")
    assert torch.equal(logits(model, batch("llama")), expected)
    assert model.active_peft_config.target_modules == {"q_proj", "v_proj"}
    assert model.get_nb_trainable_parameters()[0] > 0


# under plain Accelerate


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_accelerate_trains_it_as_it_trains_pefts(kind: str, base: Base, tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    for lib in (peft, peftcli):
        reset_accelerate()  # another test may have left its precision
        accelerator = Accelerator(cpu=True)
        model = _twin(lib, kind, base(kind), {})
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=5e-3)
        data = torch.utils.data.DataLoader(_rows(kind), batch_size=4, collate_fn=_stack)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        found = losses.setdefault(lib.__name__, [])
        for _ in range(2):
            for inputs in data:
                loss = model(**inputs).loss
                found.append(loss.item())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.unwrap_model(model).save_pretrained(tmp_path / lib.__name__)
    assert losses["peftcli"] == pytest.approx(losses["peft"], abs=1e-5)
    assert losses["peftcli"][-1] < losses["peftcli"][0]
    here, there = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peftcli", "peft"))
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-3)


# under transformers.Trainer


def _rows(kind: str, count: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    given, wanted = ids(count, 8, seed=seed), ids(count, 8, seed=seed + 100)
    labels = wanted if kind == "t5" else given
    return [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": label}
        for one, label in zip(given, labels, strict=True)
    ]


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _twin(lib: ModuleType, kind: str, base: str, settings: dict[str, Any]) -> Any:
    """An adapted model whose weights are the same with either library."""
    virtual = "num_virtual_tokens" in settings
    config_class = lib.PromptTuningConfig if virtual else lib.LoraConfig
    extra = {"num_transformer_submodules": 1} if virtual else {}
    model = lib.get_peft_model(
        AUTO[kind].from_pretrained(base), config_class(task_type=TASK[kind], **settings, **extra)
    )
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.2)
    return model


OPTIONS: dict[str, Any] = {
    "num_train_epochs": 2,
    "learning_rate": 2e-2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "weight_decay": 0.01,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "logging_steps": 1,
}


def _metrics(prediction: Any) -> dict[str, float]:
    found = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    width = prediction.label_ids.shape[1]
    return {"accuracy": float((found[:, -width:].argmax(-1) == prediction.label_ids).mean())}


def _trainer(model: Any, kind: str, folder: Path, metrics: Any = _metrics, **changes: Any) -> Trainer:
    more = {"eval_dataset": _rows(kind, 8, seed=50), "data_collator": _stack, "compute_metrics": metrics}
    trainer = Seq2SeqTrainer if kind == "t5" else Trainer
    return trainer_of(model, folder, _rows(kind), more, trainer, **{**OPTIONS, **changes})


TOO_FAST = {"learning_rate": 0.5, "lr_scheduler_type": "constant"}
"""So large a step that the loss gets worse after the first epoch."""
METHODS = {"lora": {"r": 4}, "prompt": {"num_virtual_tokens": 4}}


@pytest.fixture(params=METHODS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return METHODS[request.param]


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_trainer_gives_pefts_losses(kind: str, settings: dict[str, Any], base: Base, tmp_path: Path) -> None:
    series: dict[str, list[float]] = {}
    for lib in (peft, peftcli):
        options = {"gradient_accumulation_steps": 2, "save_strategy": "no", "load_best_model_at_end": False}
        trainer = _trainer(_twin(lib, kind, base(kind), settings), kind, tmp_path, **options)
        with warnings.catch_warnings():
            if lib is peft:
                warnings.simplefilter("ignore")
            trainer.train()
        keys = ("loss", "grad_norm", "eval_loss", "eval_accuracy")
        series[lib.__name__] = [value for key in keys for value in logged(trainer, key)]
    assert series["peftcli"] == pytest.approx(series["peft"], abs=1e-5, rel=1e-5)
    assert len(series["peftcli"]) == 2 + 2 + 2 + 2


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_trainer_saves_adapters_only_and_restores_the_best(
    kind: str, settings: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    with silence():
        model = _twin(peftcli, kind, base(kind), settings)
        trainer = _trainer(model, kind, tmp_path, num_train_epochs=3, **TOO_FAST)
        trainer.train()
    losses = logged(trainer, "eval_loss")
    assert len(losses) == 3
    assert len(logged(trainer, "eval_accuracy")) == 3
    best = 1 + min(range(3), key=losses.__getitem__)
    assert losses[best - 1] < max(losses)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * best}")
    saved = {step: load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4, 6)}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for tensors in saved.values():
        assert set(tensors) == trained
    now = dict(model.named_parameters())
    for name, value in saved[2 * best].items():
        assert torch.equal(now[name].detach(), value)
    worst = 1 + max(range(3), key=losses.__getitem__)
    assert any(not torch.equal(now[name].detach(), value) for name, value in saved[2 * worst].items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best - 1], abs=1e-6)
    model.save_pretrained(tmp_path / "final")
    with silence():
        oracle = peft.PeftModel.from_pretrained(AUTO[kind].from_pretrained(base(kind)), tmp_path / "final").eval()
    with eval_mode(model):
        torch.testing.assert_close(logits(model, batch(kind)), logits(oracle, batch(kind)), atol=1e-5, rtol=1e-5)


@pytest.mark.grid
def test_trainer_resumes_from_its_checkpoint(settings: dict[str, Any], base: Base, tmp_path: Path) -> None:
    straight = _trainer(_twin(peftcli, "llama", base("llama"), settings), "llama", tmp_path)
    straight.train()
    resumed = _trainer(_twin(peftcli, "llama", base("llama"), settings), "llama", tmp_path / "again")
    with silence():
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed, "loss")[-2:] == pytest.approx(logged(straight, "loss")[-2:], abs=1e-5)


@pytest.mark.grid
def test_seq2seq_trainer_generates_with_the_adapter(settings: dict[str, Any], base: Base, tmp_path: Path) -> None:
    model = _twin(peftcli, "t5", base("t5"), settings)
    options = {"predict_with_generate": True, "generation_max_length": 8, "metric_for_best_model": "eval_length"}

    def longest(found: Any) -> dict[str, float]:
        # padded to the length that the model's own settings name
        return {"length": float((found.predictions != PAD).sum(-1).max())}

    trainer = _trainer(model, "t5", tmp_path, longest, **options)
    trainer.train()
    assert all(1 <= value <= 8 for value in logged(trainer, "eval_length"))
    predicted = trainer.predict(_rows("t5", 2)).predictions
    with eval_mode(model):
        expected = model.generate(**{k: v for k, v in _stack(_rows("t5", 2)).items() if k != "labels"}, max_length=8)
    assert torch.equal(torch.as_tensor(predicted)[:, : expected.shape[1]], expected)
    assert expected[0, 0] == PAD


@pytest.mark.grid
@pytest.mark.parametrize("kind", AUTO)
def test_a_model_that_inject_made_trains_under_trainer(
    kind: str, settings: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    """Without a PeftModel around it: the same losses, the best epoch restored."""
    if kind == "t5" and "num_virtual_tokens" in settings:
        pytest.skip("transformers cannot save the whole of a model whose tied embedding is wrapped; PeftModel can")
    wrapped = _twin(peftcli, kind, base(kind), settings)
    config = copy.deepcopy(wrapped.active_peft_config)
    model: nn.Module = AUTO[kind].from_pretrained(base(kind))
    peftcli.inject(model, config)
    peftcli.load_state(model, peftcli.adapter_state(wrapped.get_base_model()))
    found = []
    for number, one in enumerate((wrapped, model)):
        trainer = _trainer(one, kind, tmp_path / str(number), **TOO_FAST)
        trainer.train()
        found.append([logged(trainer, "loss"), logged(trainer, "eval_loss"), [trainer.evaluate()["eval_loss"]]])
    for here, there in zip(*found, strict=True):
        assert here == pytest.approx(there, abs=1e-5)
    assert found[1][2][0] == pytest.approx(min(found[1][1]), abs=1e-6)
    torch.testing.assert_close(
        peftcli.adapter_state(model), peftcli.adapter_state(wrapped.get_base_model()), atol=1e-5, rtol=1e-4
    )


@pytest.mark.slow
def test_gradient_checkpointing_under_trainer_gives_the_same_losses(
    settings: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    series = []
    for checkpointed in (False, True):
        model = _twin(peftcli, "llama", base("llama"), settings)
        name = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else None
        trainer = _trainer(model, "llama", tmp_path, **{name or "gradient_checkpointing": checkpointed})
        trainer.train()
        series.append(logged(trainer, "loss"))
        assert math.isfinite(series[-1][-1])
    assert series[0] == pytest.approx(series[1], abs=1e-5)


def test_a_model_is_prepared_as_by_peft() -> None:
    """Frozen, in float32, and with gradients through checkpointed blocks."""
    prepared = []
    for library in (peft, peftcli):
        model: Any = tiny("llama").to(torch.bfloat16)
        assert library.prepare_model_for_kbit_training(model) is model
        prepared.append(model)
    for theirs, ours in zip(*(model.named_parameters() for model in prepared), strict=True):
        assert (ours[0], ours[1].dtype, ours[1].requires_grad) == (theirs[0], theirs[1].dtype, theirs[1].requires_grad)
    peftcli.prepare_model_for_gradient_checkpointing(prepared[1])
    assert prepared[1].get_input_embeddings()(torch.tensor([[3]])).requires_grad
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig())
    model.prepare_model_for_gradient_checkpointing(model)
    assert model.get_input_embeddings()(torch.tensor([[3]])).requires_grad


def test_a_config_is_made_from_a_dict() -> None:
    values = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    config = peftcli.get_peft_config(values)
    assert (type(config), config.r, config.target_modules) == (peftcli.LoraConfig, 3, {"q_proj"})
    assert isinstance(config, peftcli.PeftConfig)
    assert not isinstance(values, peftcli.PeftConfig)
    with pytest.raises(ValueError, match="LORRA"):
        peftcli.get_peft_config({"peft_type": "LORRA"})
