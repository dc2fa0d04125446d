"""Soft prompts on models with heads: labels, padding, pooling and positions, and inputs that cannot be right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_tiny import PAD, VOCABULARY, batch, ids, labelled, logits, randomise, tiny
from torch import nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    CLIPVisionConfig,
    DistilBertConfig,
    DistilBertModel,
    EsmConfig,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForTokenClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

from peftcli.core.inject import disabled, inject, set_active, set_trainable, unload
from peftcli.core.prompts.config import max_positions
from peftcli.core.prompts.generate import generate
from peftcli.core.prompts.inputs import Insertion
from peftcli.errors import AdapterError
from peftcli.methods import METHODS

N, LABELS = 4, 3
EVERY = ("prompt_tuning", "p_tuning", "multitask_prompt_tuning", "prefix_tuning")
BOTH = ("prompt_tuning", "prefix_tuning")
"""One of each mechanism."""

_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": PAD,
}
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
}
_RATES = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 95}
_T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}

BUILDERS: dict[str, Callable[..., Any]] = {
    "bert sequence": lambda n=LABELS: BertForSequenceClassification(BertConfig(**_BERT, num_labels=n)),
    "bert token": lambda n=LABELS: BertForTokenClassification(BertConfig(**_BERT, num_labels=n)),
    "bert question": lambda n=2: BertForQuestionAnswering(BertConfig(**_BERT, num_labels=n)),
    "llama sequence": lambda n=LABELS: LlamaForSequenceClassification(LlamaConfig(**_LLAMA, num_labels=n)),
    "llama token": lambda n=LABELS: LlamaForTokenClassification(LlamaConfig(**_LLAMA, num_labels=n)),
    "llama question": lambda n=2: LlamaForQuestionAnswering(LlamaConfig(**_LLAMA)),
    "gpt2 sequence": lambda n=LABELS: GPT2ForSequenceClassification(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=n, **_RATES, **_IDS
        )
    ),
    "t5 token": lambda n=LABELS: T5ForTokenClassification(
        T5Config(vocab_size=VOCABULARY, num_labels=n, pad_token_id=PAD, eos_token_id=95, **_T5)
    ),
}
TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "question": "QUESTION_ANS"}


def _base(kind: str, *count: int) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = BUILDERS[kind](*count).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def _adapted(kind: str, method: str, *count: int, base: Any = None, task: str | None = None, **settings: Any) -> Any:
    model = _base(kind, *count) if base is None else base
    task = task or TASKS.get(kind.partition(" ")[2])
    inject(model, METHODS[method].config_class()(num_virtual_tokens=N, task_type=task, **settings))
    set_trainable(model, True)
    randomise(model)
    return model


def _inputs(rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(rows, length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}


def _right_padded() -> dict[str, torch.Tensor]:
    inputs = _inputs()
    inputs["attention_mask"][1, 5:], inputs["input_ids"][1, 5:] = 0, PAD
    return inputs


def _head(output: Any) -> torch.Tensor:
    found = output["logits"] if "logits" in output else output["start_logits"]
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.grid(each="method")
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("kind", ["bert token", "llama token", "t5 token"])
def test_logits_of_tokens_line_up_with_their_labels(kind: str, method: str) -> None:
    model, inputs = _adapted(kind, method), _right_padded()
    labels = torch.arange(18).view(2, 9) % LABELS
    labels[1, 5:] = -100
    output = model(**inputs, labels=labels)
    assert output.logits.shape == (2, 9, LABELS)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    output.loss.backward()
    assert all(value.grad.abs().sum() > 0 for value in model.parameters() if value.requires_grad)


@pytest.mark.grid(each="kind")
@torch.no_grad()
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(
    ("kind", "left"), [*((kind, 0) for kind in BUILDERS), ("llama sequence", 4), ("llama token", 4)]
)
def test_a_padded_row_equals_its_unpadded_run(kind: str, left: int, method: str) -> None:
    model, inputs = _adapted(kind, method), _inputs() if left else _right_padded()
    inputs["attention_mask"][1, :left], inputs["input_ids"][1, :left] = 0, PAD
    own = slice(left, None) if left else slice(5)
    alone = _head(model(**{name: value[1:, own] for name, value in inputs.items()}))[0]
    together = _head(model(**inputs))[1]
    found = together[-len(alone) :] if left else together[: len(alone)]
    torch.testing.assert_close(found, alone, atol=1e-4 if left else 1e-5, rtol=1e-4)


@pytest.mark.grid(each="method")
@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert question", "llama question"])
@pytest.mark.parametrize("method", EVERY)
def test_positions_of_answers_move_with_the_tokens(kind: str, method: str) -> None:
    model, inputs = _adapted(kind, method), _inputs()
    answers = {"start_positions": torch.tensor([2, 0]), "end_positions": torch.tensor([8, 5])}
    output = model(**inputs, **answers)
    assert output.start_logits.shape == output.end_logits.shape == (2, 9)
    if method == "prefix_tuning":
        whole, moved = output, 0
    else:
        layer = next(module for module in model.modules() if hasattr(module, "token_labels"))
        layer.token_labels = False  # what comes out uncut
        whole, moved = model(**inputs, **answers), N
    torch.testing.assert_close(whole.start_logits[:, moved:], output.start_logits)
    losses = [
        F.cross_entropy(found, answers[name] + moved)
        for name, found in (("start_positions", whole.start_logits), ("end_positions", whole.end_logits))
    ]
    torch.testing.assert_close(output.loss, sum(losses) / 2)


@torch.no_grad()
@pytest.mark.parametrize("method", BOTH)
def test_answers_after_left_padding_move_with_their_tokens(method: str) -> None:
    model, inputs = _adapted("llama question", method), _inputs(1)
    inputs["attention_mask"][0, :3] = 0

    def loss(inputs: dict[str, torch.Tensor], start: int) -> float:
        position = torch.tensor([start])
        return float(model(**inputs, start_positions=position, end_positions=position).loss)

    alone = {name: value[:, 3:] for name, value in inputs.items()}
    assert loss(inputs, 5) - loss(inputs, 6) == pytest.approx(loss(alone, 2) - loss(alone, 3), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", BOTH)
def test_labels_of_texts_are_left_alone_whatever_their_shape(method: str) -> None:
    several = _adapted("bert sequence", method, 9)
    labels = torch.rand(2, 9).round()  # as wide as the text is long
    output = several(**_inputs(), labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))
    number = _adapted("bert sequence", method, 1)
    one = {name: value[:, :1] for name, value in _inputs().items()}
    for given in (torch.tensor([0.3, 2.0]), torch.tensor([[0.3], [2.0]])):
        output = number(**one, labels=given)
        torch.testing.assert_close(output.loss, F.mse_loss(output.logits.squeeze(), given.squeeze()))
    classes = _adapted("bert sequence", method)
    output = classes(**one, labels=torch.tensor([[0], [2]]))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([0, 2])))


@torch.no_grad()
@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("kind", ["bert sequence", "bert token"])
def test_token_types_reach_their_tokens(kind: str, method: str) -> None:
    model, types = _adapted(kind, method), torch.tensor([[0] * 4 + [1] * 5] * 2)
    plain, typed = (_head(model(**_inputs(), **given)) for given in ({}, {"token_type_ids": types}))
    assert not torch.allclose(plain, typed, atol=1e-3)
    zeros = _head(model(**_inputs(), token_type_ids=torch.zeros_like(types)))
    torch.testing.assert_close(plain, zeros)


@pytest.mark.grid(each="method")
@torch.no_grad()
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("kind", ["bert token", "llama sequence", "gpt2 sequence"])
def test_embeddings_as_inputs_are_the_ids_looked_up(kind: str, method: str) -> None:
    model, inputs = _adapted(kind, method), _inputs()
    with disabled(model):
        vectors = model.get_input_embeddings()(inputs["input_ids"])
    got = model(inputs_embeds=vectors, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(_head(got), _head(model(**inputs)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", BOTH)
def test_hidden_states_of_a_prefix_are_those_of_the_tokens(method: str) -> None:
    model = _adapted("llama token", method)
    states = model(**_inputs(), output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {9 if method == "prefix_tuning" else 9 + N}


@torch.no_grad()
@pytest.mark.parametrize("kind", [(BertConfig, BertModel), (BigBirdConfig, BigBirdModel)])
def test_a_pooler_reads_the_first_token_and_not_the_prefix(kind: tuple[Any, Any]) -> None:
    """BERT's takes all that the layers give; BigBird's, a linear layer, what they give for the first token."""
    base = kind[1](kind[0](**_BERT, attention_type="original_full")).eval()
    dense = getattr(base.pooler, "dense", base.pooler)
    output = _adapted("", "prefix_tuning", base=base)(**_right_padded(), output_hidden_states=True)
    assert {state.shape[1] for state in output.hidden_states} == {9}
    torch.testing.assert_close(output.pooler_output, torch.tanh(dense(output.last_hidden_state[:, 0])))


@pytest.mark.grid(each="kind")
@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama sequence", "bert token", "gpt2 sequence"])
def test_a_prefix_is_the_same_in_every_attention(kind: str, attention: str) -> None:
    expected = _head(_adapted(kind, "prefix_tuning")(**_right_padded()))
    base = _base(kind)
    base.set_attn_implementation(attention)
    seen = _right_padded()["attention_mask"].bool() if expected.ndim == 3 else ...
    got = _head(_adapted(kind, "prefix_tuning", base=base)(**_right_padded()))
    torch.testing.assert_close(got[seen], expected[seen], atol=1e-5, rtol=1e-4)


def test_a_tuple_is_refused_where_logits_would_have_to_be_cut() -> None:
    with pytest.raises(AdapterError, match="return_dict: virtual tokens need return_dict=True"):
        _adapted("bert token", "prompt_tuning")(**_inputs(), return_dict=False)
    assert _adapted("bert token", "prefix_tuning")(**_inputs(), return_dict=False)[0].shape == (2, 9, LABELS)
    assert _adapted("bert sequence", "prompt_tuning")(**_inputs(), return_dict=False)[0].shape == (2, LABELS)


# tasks


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_each_row_gets_the_prompt_of_its_task(kind: str) -> None:
    base, inputs = tiny(kind), batch(kind, rows=3)
    model = _adapted("", "multitask_prompt_tuning", base=base, num_tasks=3, num_ranks=2)
    tasks = torch.tensor([2, 0, 2])
    together = logits(model, {**inputs, "task_ids": tasks})
    for row, task in enumerate(tasks):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = logits(model, {**one, "task_ids": task[None]})
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)
        other = logits(model, {**one, "task_ids": torch.tensor([1])})
        assert not torch.allclose(alone, other, atol=1e-2)
    alike = logits(model, {**inputs, "task_ids": torch.tensor([2, 2, 2])})
    assert torch.equal(logits(model, {**inputs, "task_ids": torch.tensor([2])}), alike)


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"num_return_sequences": 1}])
def test_generation_knows_the_rows_tasks(kind: str, options: dict[str, Any]) -> None:
    model = _adapted("", "multitask_prompt_tuning", base=tiny(kind, scale=6.0), num_tasks=2)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **options}
    inputs, tasks = _inputs(3, 6), torch.tensor([1, 0, 1])
    together = generate(model, **inputs, task_ids=tasks, **settings)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        assert torch.equal(together[row], generate(model, **one, task_ids=tasks[row : row + 1], **settings)[0])
    assert not torch.equal(together, generate(model, **inputs, task_ids=1 - tasks, **settings))
    alike = generate(model, **inputs, task_ids=torch.tensor([1, 1, 1]), **settings)
    assert torch.equal(generate(model, **inputs, task_ids=torch.tensor([1]), **settings), alike)
    with pytest.raises(AdapterError, match="the prompt has 2 tasks"):
        generate(model, **inputs, **settings)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_tasks_that_cannot_be_right_are_refused(kind: str) -> None:
    model = _adapted("", "multitask_prompt_tuning", base=tiny(kind), num_tasks=3)
    for tasks, message in (
        (None, "task_ids: the prompt has 3 tasks; say the task of each row"),
        (torch.tensor([0, 3]), r"task_ids: \[0, 3\]: the adapter's tasks are 0 to 2"),
        (torch.tensor([-1, 0]), "tasks are 0 to 2"),
        (torch.tensor([0, 1, 2]), "must be 2 whole numbers"),
        (torch.tensor([0.0, 1.0]), "must be 2 whole numbers"),
    ):
        given = {} if tasks is None else {"task_ids": tasks}
        with pytest.raises(AdapterError, match=message):
            model(**labelled(kind), **given)
    model(**labelled(kind), task_ids=torch.tensor([0, 2]))
    with pytest.raises(AdapterError, match="the prompt has 3 tasks"):  # those of the last call are forgotten
        model(**labelled(kind))
    with pytest.raises(AdapterError, match="one prompt for all tasks"):
        _adapted("", "prompt_tuning", base=tiny(kind))(**labelled(kind), task_ids=torch.tensor([0, 0]))


# inputs and settings that cannot be right


def _roberta() -> Any:
    """Padding takes positions: the first is the sixth."""
    return RobertaForCausalLM(RobertaConfig(**{**_BERT, "pad_token_id": 5}, is_decoder=True))


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(("kind", "limit"), [("gpt2", 128), ("bert", 128), ("opt", 128), ("roberta", 58)])
def test_more_tokens_than_positions_are_refused_in_words(kind: str, limit: int, method: str) -> None:
    model = _adapted("", method, base=_roberta() if kind == "roberta" else tiny(kind))
    told = f"num_virtual_tokens: {limit - 3} tokens and 4 virtual ones; the base model has {limit}"
    with pytest.raises(AdapterError, match=told):
        model(input_ids=ids(1, limit - 3))
    model(input_ids=ids(1, limit - 4))


def test_values_of_more_rows_than_the_batch_are_refused() -> None:
    insertion, positions = Insertion(torch.zeros(1, 1, dtype=torch.long), length=3, count=2), torch.arange(3)
    assert insertion.spread(positions[None], 0).shape == (1, 5)
    for take in (insertion.first, partial(insertion.spread, filler=0)):
        with pytest.raises(RuntimeError, match="expand"):
            take(positions.repeat(2, 1))


@pytest.mark.parametrize("method", EVERY)
def test_a_prompt_as_long_as_the_model_is_refused(method: str) -> None:
    model = tiny("llama")
    with pytest.raises(AdapterError, match="num_virtual_tokens: 128 leaves no room for the input"):
        inject(model, METHODS[method].config_class()(num_virtual_tokens=128))
    assert not any("prompt" in name for name, _ in model.named_parameters())


def _with_typed_prompt(base: Any, place: str, typed: torch.Tensor) -> Any:
    """The model with a prompt whose vectors are those of tokens (1, N)."""
    model = _adapted("", "prompt_tuning", base=base)
    model.get_parameter(f"{place}.prompt_embeddings").copy_(base.get_input_embeddings().weight[typed[0]])
    return model


@torch.no_grad()
def test_a_model_without_a_limit_of_positions_reads_a_prompt_as_tokens() -> None:
    """XLNet gives its number of positions as -1, and has a memory of its own when it generates."""
    sizes = {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32}
    base = XLNetLMHeadModel(XLNetConfig(vocab_size=VOCABULARY, **sizes)).eval()
    assert max_positions(base.config) is None
    assert max_positions(SimpleNamespace(max_position_embeddings=5)) == 5
    for kind, positions in (("absolute", 1024), ("rotary", 1026)):  # only the first counts from the pad token's id
        assert max_positions(EsmConfig(vocab_size=33, pad_token_id=1, position_embedding_type=kind)) == positions
    inputs, typed = _inputs(), ids(1, N, seed=1)
    expected = base(input_ids=torch.cat([typed.expand(2, -1), inputs["input_ids"]], 1)).logits
    model = _with_typed_prompt(base, "transformer.word_embedding", typed)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert torch.equal(
        generate(model, **inputs, max_new_tokens=3), generate(model, **inputs, max_new_tokens=3, use_mems=False)
    )
    with pytest.raises(AdapterError, match="kind of state; set use_cache=False, of XLNet use_mems=False"):
        generate(model, **inputs, max_new_tokens=3, use_mems=True)


@torch.no_grad()
def test_a_model_whose_state_counts_no_tokens_generates_without_it() -> None:
    config = RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, eos_token_id=None)
    model, read = _adapted("", "prompt_tuning", base=RwkvForCausalLM(config).eval()), ids(1, 5)
    found = generate(model, input_ids=read, max_new_tokens=3, do_sample=False)
    for _ in range(3):
        read = torch.cat([read, model(input_ids=read).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, read)


@torch.no_grad()
def test_an_encoder_that_does_not_name_its_embedding_reads_a_prompt_as_tokens() -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = FSMTConfig(langs=["a", "b"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, **sizes, **heads)
    base = FSMTForConditionalGeneration(config).eval()
    read, typed, answer = ids(2, 5), ids(1, N, seed=1), ids(2, 4, seed=2)
    whole = torch.cat([typed.expand(2, -1), read], 1)
    expected = base(input_ids=whole, attention_mask=torch.ones_like(whole), decoder_input_ids=answer).logits
    model = _with_typed_prompt(base, "model.encoder.embed_tokens", typed)
    found = model(input_ids=read, attention_mask=torch.ones_like(read), decoder_input_ids=answer).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        *((method, "num_virtual_tokens", 0) for method in EVERY),
        ("p_tuning", "encoder_hidden_size", 0),
        ("p_tuning", "encoder_num_layers", 0),
        ("p_tuning", "encoder_num_layers", 3),  # the MLP's are always the same
        ("p_tuning", "encoder_dropout", 0.1),
        ("p_tuning", "encoder_dropout", 1.0),
        ("p_tuning", "encoder_reparameterization_type", "GRU"),
        ("prefix_tuning", "encoder_hidden_size", 0),
        ("prefix_tuning", "init_weights", "ones"),
        ("prefix_tuning", "num_transformer_submodules", 2),
        ("prefix_tuning", "token_dim", 32),
        ("prompt_tuning", "token_dim", 16),
        ("multitask_prompt_tuning", "num_tasks", 0),
        ("multitask_prompt_tuning", "num_ranks", 0),
        ("multitask_prompt_tuning", "prompt_tuning_init", "SAMPLE_VOCAB"),
        ("multitask_prompt_tuning", "prompt_tuning_init_state_dict_path", "x.safetensors"),  # means nothing here
    ],
)
def test_settings_that_cannot_be_right_are_refused_by_name(method: str, key: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=f"^{key}: "):
        inject(tiny("llama"), METHODS[method].config_class()(**{key: value}))


def test_models_without_a_place_are_refused() -> None:
    for method in EVERY:
        for kind in ("convnet", "whisper"):
            with pytest.raises(AdapterError, match="reads no token ids: there is no place for virtual tokens"):
                inject(tiny(kind), METHODS[method].config_class()())


def _two_stacks() -> Any:
    model: Any = tiny("llama")
    model.model.more = copy.deepcopy(model.model.layers)
    return model


def _bamba() -> Any:
    """A layer of attention behind one with another state."""
    mixer = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    return BambaForCausalLM(BambaConfig(**_LLAMA, **mixer, attn_layer_indices=[1]))


def _distilled() -> Any:
    return DistilBertModel(DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=64, n_layers=2, n_heads=4))


@pytest.mark.parametrize("build", [_two_stacks, _bamba, _distilled])
def test_a_prefix_needs_nothing_but_attention_in_one_stack_of_layers(build: Callable[[], Any]) -> None:
    with pytest.raises(AdapterError, match="needs attention that keeps keys and values in every layer of a single st"):
        inject(build(), METHODS["prefix_tuning"].config_class()())


def test_cross_attention_in_a_list_of_its_own_is_no_second_stack() -> None:
    """As in Idefics."""
    model = _two_stacks()
    for layer in model.model.more:
        layer.self_attn.is_cross_attention = True
    assert len(inject(model, METHODS["prefix_tuning"].config_class()()).layers) == 2


def test_attention_that_keeps_the_keys_of_some_of_its_tokens_is_refused() -> None:
    """ProphetNet's reads streams that predict further tokens, behind the sequence."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32}
    for side in ("encoder", "decoder"):
        sizes |= {f"num_{side}_layers": 1, f"{side}_ffn_dim": 64, f"num_{side}_attention_heads": 4}
    model = _adapted("", "prefix_tuning", base=ProphetNetForConditionalGeneration(ProphetNetConfig(**sizes)))
    with pytest.raises(AdapterError, match="ProphetNetNgramSelfAttention does not"):
        model(input_ids=ids(2, 5), decoder_input_ids=ids(2, 5))


@torch.no_grad()
def test_a_row_that_starts_with_an_image_generates_as_a_greedy_loop() -> None:
    torch.manual_seed(0)  # with other weights the answer may hold the image token
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**_LLAMA), image_token_id=VOCABULARY - 1)
    model = _adapted("", "prefix_tuning", base=LlavaForConditionalGeneration(config).eval())
    tokens, image = torch.tensor([[VOCABULARY - 1] * 4 + [5, 6, 7]]), torch.ones(1, 3, 16, 16)
    got = generate(model, input_ids=tokens, pixel_values=image, max_new_tokens=3, eos_token_id=None)
    for _ in range(3):
        tokens = torch.cat([tokens, model(input_ids=tokens, pixel_values=image).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, tokens)


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("generates", [False, True])
def test_images_with_positions_of_their_own_are_refused(generates: bool, method: str) -> None:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**_LLAMA, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "temporal_patch_size": 1}
    ends = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    base = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ends)).eval()
    model, inputs = _adapted("", method, base=base), _inputs(1)
    call = partial(generate, model, max_new_tokens=2) if generates else model
    call(**inputs, mm_token_type_ids=torch.zeros(1, 9, dtype=torch.long))
    inputs["input_ids"][0, 2:6] = 63
    pixels, kinds = torch.ones(16, 12), (inputs["input_ids"] == 63).long()
    in_text_model = method == "prefix_tuning" and not generates  # which gets positions, and no marks
    told = "position_ids of two dimensions" if in_text_model else "mm_token_type_ids: marks images"
    with pytest.raises(AdapterError, match=told):
        call(**inputs, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=kinds)


@pytest.mark.parametrize("method", ["prompt_tuning", "cpt"])
def test_a_second_table_of_the_vocabulary_has_no_rows_for_virtual_tokens(method: str) -> None:
    model: Any = tiny("llama")
    model.model.layers[0].mlp.experts = nn.Buffer(torch.zeros(VOCABULARY, 2, dtype=torch.long))
    with pytest.raises(AdapterError, match=r"^model.layers.0.mlp.experts is a table of the vocabulary"):
        inject(model, METHODS[method].config_class()(task_type="CAUSAL_LM"))


# several adapters


def _two(kind: str, first: str, second: str) -> Any:
    model = tiny(kind)
    for name, method in (("a", first), ("b", second)):
        inject(model, METHODS[method].config_class()(**({} if method == "lora" else {"num_virtual_tokens": N})), name)
        set_trainable(model, True, name)
        randomise(model, seed=len(name))
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(("first", "second"), [("prompt_tuning", "p_tuning"), ("prefix_tuning", "prefix_tuning")])
def test_two_soft_prompts_take_turns(kind: str, first: str, second: str) -> None:
    model = _two(kind, first, second)
    with pytest.raises(AdapterError, match="two soft prompts are active"):
        logits(model, batch(kind))
    outputs = []
    for name, other in (("a", "b"), ("b", "a")):
        set_active(model, [name])
        outputs.append(logits(model, batch(kind)))
        alone = copy.deepcopy(model)
        unload(alone, other)
        assert torch.equal(logits(alone, batch(kind)), outputs[-1])
    assert not torch.allclose(*outputs, atol=1e-3)
    set_active(model, [])
    assert torch.equal(logits(model, batch(kind)), logits(tiny(kind), batch(kind)))


@pytest.mark.parametrize("order", [("prompt_tuning", "prefix_tuning"), ("prefix_tuning", "prompt_tuning")])
def test_a_prompt_and_a_prefix_do_not_go_together(order: tuple[str, str]) -> None:
    model = _two("llama", *order)
    with pytest.raises(AdapterError, match="two soft prompts are active"):
        logits(model, batch("llama"))
    with pytest.raises(AdapterError, match="two soft prompts are active"):
        generate(model, **batch("llama"), max_new_tokens=2)
    set_active(model, ["b"])
    logits(model, batch("llama"))


@torch.no_grad()
@pytest.mark.parametrize("method", BOTH)
def test_a_soft_prompt_is_found_below_adapters_that_come_later(method: str) -> None:
    both, first = _two("llama", method, "lora"), _two("llama", "lora", method)
    assert torch.equal(logits(both, batch("llama")), logits(first, batch("llama")))
    set_active(both, ["a"])
    alone = _two("llama", method, "lora")
    unload(alone, "b")
    assert torch.equal(logits(both, batch("llama")), logits(alone, batch("llama")))


def test_an_adapter_around_the_embedding_of_a_prompt_is_refused_and_below_it_is_not() -> None:
    lora, prompt = METHODS["lora"].config_class(), METHODS["prompt_tuning"].config_class()
    model = tiny("llama")
    inject(model, prompt(num_virtual_tokens=N), "prompt")
    inject(model, lora(target_modules=["embed_tokens"]), "rows")
    with pytest.raises(AdapterError, match="stands around the soft prompt; load that last"):
        logits(model, batch("llama"))
    set_active(model, ["prompt"])
    logits(model, batch("llama"))
    model = tiny("llama")
    inject(model, lora(target_modules=["embed_tokens"]), "rows")
    inject(model, prompt(num_virtual_tokens=N), "prompt")
    logits(model, batch("llama"))


def test_no_forward_pass_walks_over_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [_adapted("", method, base=tiny("llama")) for method in BOTH]
    models.append(_adapted("bert token", "prompt_tuning", task="FEATURE_EXTRACTION"))

    def walk(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("a walk over all modules")

    for name in ("modules", "named_modules", "named_parameters"):
        monkeypatch.setattr(nn.Module, name, walk)
    for model in models:
        model(**_inputs())
