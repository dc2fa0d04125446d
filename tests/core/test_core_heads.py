"""The heads of models with a task train and are saved with any adapter, whatever they are called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import PAD, VOCABULARY, batch, ids, logits, tiny
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForQuestionAnswering,
)

from peftcli import PeftModelForQuestionAnswering, PeftModelForSequenceClassification, get_peft_model
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.heads import head_names
from peftcli.core.inject import disabled, inject, set_trainable, unload
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict
from peftcli.methods.lora import LoraConfig
from peftcli.models.parts import widen_heads

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
}
_BART: dict[str, Any] = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "d_model": 32,
    "eos_token_id": 95,
}
MODELS: dict[str, tuple[str, Callable[[], Any], list[str]]] = {
    "bert": ("SEQ_CLS", lambda: BertForSequenceClassification(BertConfig(**_SIZES)), ["classifier"]),
    "llama": ("SEQ_CLS", lambda: LlamaForSequenceClassification(LlamaConfig(**_SIZES)), ["score"]),
    "bert, answers": ("QUESTION_ANS", lambda: BertForQuestionAnswering(BertConfig(**_SIZES)), ["qa_outputs"]),
    "roberta": ("SEQ_CLS", lambda: RobertaForSequenceClassification(RobertaConfig(**_SIZES)), ["classifier"]),
    "deberta": (
        "SEQ_CLS",
        lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**_SIZES)),
        ["pooler", "classifier"],
    ),
    "distilbert": (
        "SEQ_CLS",
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=64, n_layers=1, n_heads=4)
        ),
        ["pre_classifier", "classifier"],
    ),
    "bart": (
        "SEQ_CLS",
        lambda: BartForSequenceClassification(BartConfig(vocab_size=VOCABULARY, **_BART)),
        ["classification_head"],
    ),
    "t5, answers": (
        "QUESTION_ANS",
        lambda: T5ForQuestionAnswering(
            T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, num_heads=4, num_layers=1, decoder_start_token_id=0)
        ),
        ["qa_outputs"],
    ),
}
every_model = pytest.mark.parametrize("kind", MODELS)
every_method = pytest.mark.parametrize("method", ["lora", "prompt_tuning", "p_tuning"])


def _base(kind: str, seed: int = 0) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return MODELS[kind][1]().eval()


def _config(kind: str, method: str, **settings: Any) -> Any:
    return METHODS[method].config_class()(task_type=MODELS[kind][0], **settings)


def _output(model: Any) -> torch.Tensor:
    tokens = torch.cat([ids(2, 8), torch.full((2, 1), 95)], 1)
    with torch.no_grad():
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    found = output.logits if "logits" in output else output.start_logits
    assert isinstance(found, torch.Tensor)
    return found


def _shake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@every_model
def test_heads_are_what_stands_beside_the_body(kind: str) -> None:
    assert head_names(_base(kind)) == MODELS[kind][2]


@pytest.mark.grid(keep=4)
@every_model
@every_method
def test_a_head_trains_and_comes_back_over_another_bases(kind: str, method: str, tmp_path: Path) -> None:
    model, config = _base(kind), _config(kind, method)
    before = _output(model)
    inject(model, config)
    set_trainable(model, True)
    _shake(model)
    assert config.modules_to_save == MODELS[kind][2]
    save_adapter(model, config, tmp_path / "one")
    prefix = "base_model.model." if method == "lora" else "base_model."
    assert all(any(name.startswith(f"{prefix}{head}.") for name in adapter_state(model)) for head in MODELS[kind][2])
    other = _base(kind, seed=0)
    for name in MODELS[kind][2]:
        for parameter in other.get_submodule(name).parameters():
            nn.init.normal_(parameter)  # as a new head is
    read = config_from_dict(read_config(tmp_path / "one"))
    load_adapter(other, read, tmp_path / "one")
    assert torch.equal(_output(other), _output(model))
    save_adapter(other, read, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with disabled(model):
        assert torch.equal(_output(model), before)


def test_a_head_of_ones_own_choice_stays() -> None:
    model, config = _base("deberta"), _config("deberta", "lora", modules_to_save=["classifier"])
    inject(model, config)
    assert config.modules_to_save == ["classifier", "pooler"]
    model, config = _base("roberta"), _config("roberta", "lora", modules_to_save=["classifier.out_proj"])
    inject(model, config)
    assert config.modules_to_save == ["classifier.out_proj"]


def test_models_for_text_have_no_head() -> None:
    for kind, task in (("llama", "CAUSAL_LM"), ("llama", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("bert", None)):
        model, config = tiny(kind), LoraConfig(task_type=task)
        inject(model, config)
        assert config.modules_to_save is None


def test_a_misspelt_head_of_a_new_adapter_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"modules_to_save: .* matches 'clasifier'; closest: classifier"):
        inject(_base("bert"), _config("bert", "lora", modules_to_save=["clasifier"]))
    config = _config("bert", "lora", target_modules=["qeury"])
    with pytest.raises(AdapterError, match=r"target_modules: .* matches 'qeury'; closest: query"):
        inject(_base("bert"), config)
    assert config.modules_to_save is None, "the head is added to that of a right one"


def _as_peft_writes(folder: Path, named: list[str] | None) -> Any:
    """The folder's config with PEFT's list of heads, existing or not."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": named}))
    return config_from_dict(read_config(folder))


def test_heads_that_peft_names_by_guess_are_read(tmp_path: Path) -> None:
    for kind in ("bert", "llama", "distilbert"):
        model, config = _base(kind), _config(kind, "lora")
        inject(model, config)
        save_adapter(model, config, tmp_path / kind)
        read = _as_peft_writes(tmp_path / kind, ["classifier", "score", "classifier", "score"])
        again = _base(kind)
        load_adapter(again, read, tmp_path / kind, trainable=True)
        assert read.modules_to_save == MODELS[kind][2]
        assert torch.equal(_output(again), _output(model))


def test_a_file_without_the_head_is_read_with_a_warning(tmp_path: Path) -> None:
    model, config = _base("bart"), LoraConfig()
    inject(model, config)
    save_adapter(model, config, tmp_path)
    read = _as_peft_writes(tmp_path, ["classifier", "score"])
    read.task_type = "SEQ_CLS"
    with pytest.warns(UserWarning, match="was saved without classification_head"):
        load_adapter(_base("bart"), read, tmp_path)
    assert read.modules_to_save is None


def test_the_wrapper_of_the_task_comes_with_it() -> None:
    for kind, wrapper in (
        ("bert", PeftModelForSequenceClassification),
        ("bert, answers", PeftModelForQuestionAnswering),
    ):
        model = get_peft_model(_base(kind), _config(kind, "prompt_tuning", num_virtual_tokens=3))
        assert type(model) is wrapper
        head = model.get_base_model().get_submodule(MODELS[kind][2][0])
        assert all(parameter.requires_grad for parameter in head.copy.parameters())
        assert _output(model).shape == _output(_base(kind)).shape


def test_the_figures_of_a_model_without_a_task_stay() -> None:
    model = tiny("bert")
    injection = inject(model, LoraConfig(r=2))
    assert injection.trainable == 2 * 2 * 2 * 2 * 32
    assert logits(model, batch("bert")).shape == (2, 3)


@pytest.mark.grid(keep=5)
@pytest.mark.parametrize("adapted", [*MODELS, "bert: classifier", "roberta: out_proj"])
def test_a_head_computes_in_float32(adapted: str) -> None:
    """In a model that computes in less, with or without autocast; also one that a LoRA adapts."""
    kind, _, target = adapted.partition(": ")
    model = _base(kind).bfloat16()
    inject(model, LoraConfig(target_modules=[target]) if target else _config(kind, "lora"))
    widen_heads(model)
    _shake(model)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = _output(model)
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16())
    unload(model)
    assert _output(model).dtype == torch.float32


def test_what_is_no_head_computes_as_before() -> None:
    """A body without its prefix, in which a LoRA's r is the number of labels."""
    model = BertModel(BertConfig(**_SIZES, num_labels=_SIZES["hidden_size"])).bfloat16()
    inject(model, LoraConfig(r=2))
    widen_heads(model)
    assert {value.dtype for value in model.parameters() if not value.requires_grad} == {torch.bfloat16}
