"""Soft prompts on models with heads: PEFT as oracle where it is right, and what it does where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import PAD, VOCABULARY, ids, randomise
from oracle import file_of, peft_config_class, saved_by_peft, silence
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from peftcli import PeftModel, get_peft_model
from peftcli.methods import METHODS

N = 4
EVERY = ("lora", "prompt_tuning", "p_tuning", "multitask_prompt_tuning")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
}
_BERT: dict[str, Any] = {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "texts": ("SEQ_CLS", lambda: BertForSequenceClassification(BertConfig(**_BERT, num_labels=3))),
    "texts, llama": ("SEQ_CLS", lambda: LlamaForSequenceClassification(LlamaConfig(**_SIZES, num_labels=3))),
    "tokens": ("TOKEN_CLS", lambda: BertForTokenClassification(BertConfig(**_BERT, num_labels=3))),
    "answers": ("QUESTION_ANS", lambda: BertForQuestionAnswering(BertConfig(**_BERT))),
}

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # PEFT's


def _base(kind: str) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = MODELS[kind][1]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def _settings(kind: str, method: str) -> dict[str, Any]:
    return {"task_type": MODELS[kind][0], **({} if method == "lora" else {"num_virtual_tokens": N})}


def _ours(kind: str, method: str) -> Any:
    model = get_peft_model(_base(kind), METHODS[method].config_class()(**_settings(kind, method)))
    randomise(model)
    return model.eval()


def _theirs(kind: str, method: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(_base(kind), peft_config_class(method)(**_settings(kind, method)))
    randomise(model)
    return model.eval()


def _both(kind: str, method: str, folder: Path) -> tuple[Any, Any]:
    """Our model, and what PEFT makes of its file."""
    model = _ours(kind, method)
    model.save_pretrained(folder)
    with silence():
        return model, peft.PeftModel.from_pretrained(_base(kind), folder).eval()


@torch.no_grad()
def _logits(model: Any, method: str = "", **inputs: torch.Tensor) -> torch.Tensor:
    """The last nine positions, which are those of the tokens."""
    given = inputs or {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    if method == "multitask_prompt_tuning":
        given = {**given, "task_ids": torch.zeros(2, dtype=torch.long)}
    output = model(**given)
    found = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)
    return found if found.ndim == 2 else found[:, -9:]


@pytest.mark.grid(each="method")
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("kind", MODELS)
def test_each_reads_what_the_other_writes_and_as_many_weights_train(kind: str, method: str, tmp_path: Path) -> None:
    if kind == "answers" and method == "multitask_prompt_tuning":
        pytest.skip("PEFT passes no task_ids on there")
    model, oracle = _both(kind, method, tmp_path / "first")
    torch.testing.assert_close(_logits(model), _logits(oracle, method), atol=1e-5, rtol=1e-5)
    oracle = _theirs(kind, method)
    if method in ("lora", "prompt_tuning"):
        assert model.get_nb_trainable_parameters()[0] == oracle.get_nb_trainable_parameters()[0]
    saved_by_peft(oracle, tmp_path / "theirs")
    model = PeftModel.from_pretrained(_base(kind), tmp_path / "theirs").eval()
    torch.testing.assert_close(_logits(model), _logits(oracle, method), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    there, here = file_of(tmp_path / "theirs")[1], file_of(tmp_path / "ours")[1]
    assert here.keys() == there.keys()
    torch.testing.assert_close(here, there, atol=0, rtol=0)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_token_types_are_pefts(method: str, tmp_path: Path) -> None:
    model, oracle = _both("texts", method, tmp_path)
    inputs = {"input_ids": ids(2, 9), "token_type_ids": torch.tensor([[0] * 4 + [1] * 5] * 2)}
    torch.testing.assert_close(_logits(model, **inputs), _logits(oracle, **inputs), atol=1e-5, rtol=1e-5)


# where PEFT is wrong


def test_interop_3_2_labels_of_tokens_raise_in_peft_and_train_here() -> None:
    inputs = {"input_ids": ids(2, 6), "labels": torch.zeros(2, 6, dtype=torch.long)}
    with pytest.raises(ValueError, match="batch_size"):
        _theirs("tokens", "prompt_tuning")(**inputs)
    assert torch.isfinite(_ours("tokens", "prompt_tuning")(**inputs).loss)


@torch.no_grad()
def test_interop_3_2_positions_of_answers_do_not_move_in_peft_and_do_here(tmp_path: Path) -> None:
    model, oracle = _both("answers", "prompt_tuning", tmp_path)
    inputs = {"input_ids": ids(2, 9)}

    def loss(model: Any, position: int) -> float:
        at = torch.tensor([position, position])
        return float(model(**inputs, start_positions=at, end_positions=at).loss)

    assert loss(oracle, 3) != pytest.approx(loss(model, 3), abs=1e-4)
    assert loss(oracle, 3 + N) == pytest.approx(loss(model, 3), abs=1e-5)


def test_a_right_padded_text_is_pooled_at_its_padding_in_peft_and_at_its_end_here(tmp_path: Path) -> None:
    model, oracle = _both("texts, llama", "prompt_tuning", tmp_path)
    alone = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    padding = torch.zeros(2, 4, dtype=torch.long)
    padded = {name: torch.cat([value, padding], 1) for name, value in alone.items()}
    torch.testing.assert_close(_logits(model, **alone), _logits(oracle, **alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_logits(model, **padded), _logits(model, **alone), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(_logits(oracle, **padded), _logits(oracle, **alone), atol=1e-2)


def test_interop_3_6_the_list_of_heads_grows_in_peft_and_stays_here(tmp_path: Path) -> None:
    lengths = []
    for make, reader in ((_theirs, peft.PeftModel), (_ours, PeftModel)):
        model, folder = make("texts", "lora"), tmp_path / make.__name__
        for turn in range(2):
            saved_by_peft(model, folder / str(turn))
            lengths.append(len(file_of(folder / str(turn))[0]["modules_to_save"]))
            model = reader.from_pretrained(_base("texts"), folder / str(turn))
    assert lengths[0] < lengths[1]
    assert lengths[2:] == [1, 1]


def test_interop_3_6_a_head_of_another_name_stays_random_in_peft_and_trains_here(tmp_path: Path) -> None:
    def base() -> Any:
        sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "eos_token_id": 95}
        return T5ForSequenceClassification(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))

    oracle = peft.get_peft_model(base(), peft.LoraConfig(task_type="SEQ_CLS"))
    assert not any("classification_head" in name for name in peft.get_peft_model_state_dict(oracle))
    model = get_peft_model(base(), METHODS["lora"].config_class()(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert any("classification_head" in name for name in file_of(tmp_path)[1])
