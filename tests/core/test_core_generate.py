"""Generation with virtual tokens equals a greedy loop over the forward pass, cached, padded or searched."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import PAD, batch, ids, labelled, randomise, tiny
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation import EosTokenCriteria

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import disabled, inject, set_trainable, unload
from peftcli.core.prompts.generate import generate
from peftcli.core.prompts.inputs import soft_prompt, takes
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict
from peftcli.methods.prompt_tuning import PromptTuningConfig

pytestmark = pytest.mark.grid

N, STEPS = 5, 10
KINDS = ("llama", "llama_tied", "gpt2", "opt", "qwen2", "gemma3", "bloom")
MODELS = [
    *((method, kind) for method in ("prompt_tuning", "prefix_tuning") for kind in KINDS),
    *((method, kind) for method in ("p_tuning", "multitask_prompt_tuning", "cpt") for kind in ("llama", "gpt2")),
    ("cartridge", "llama"),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "cpt": {"cpt_token_ids": [50, 51, 52, 53, 54], "opt_projection_format_epsilon": 30.0}
}
METHODS_HERE = tuple(dict.fromkeys(method for method, _ in MODELS))
SEEDS = {("prefix_tuning", "opt"): 2, ("p_tuning", "llama"): 2}
"""Of adapters that would bring about a near tie or the end of the text."""
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this version of transformers calls it."""
GREEDY: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def _adapted(kind: str, method: str = "prompt_tuning", **settings: Any) -> nn.Module:
    model = tiny(kind, scale=6.0)
    inject(model, METHODS[method].config_class()(num_virtual_tokens=N, **SETTINGS.get(method, {}), **settings))
    set_trainable(model, True)
    randomise(model, SEEDS.get((method, kind), 1))
    return model


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request: pytest.FixtureRequest) -> nn.Module:
    method, kind = request.param
    return _adapted(kind, method)


def _padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows with 0, 3 and 5 places of left padding."""
    tokens, mask = ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    for row, empty in ((1, 3), (2, 5)):
        tokens[row, :empty], mask[row, :empty] = PAD, 0
    return tokens, mask


@torch.no_grad()
def _loop(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor, *, cached: bool) -> torch.Tensor:
    """The likeliest token after each, by forward calls only. Fails on a near tie, which rounding would decide."""
    cache, new = None, tokens
    for _ in range(STEPS):
        if cached:
            output = model(input_ids=new, attention_mask=mask, use_cache=True, **({CACHE: cache} if cache else {}))
            cache = output[CACHE]
        else:
            output = model(input_ids=tokens, attention_mask=mask, use_cache=False)
        best, second = output.logits[:, -1].topk(2).values.unbind(-1)
        assert (best - second).min() > 1e-3, "a near tie: choose another seed"
        new = output.logits[:, -1].argmax(-1, keepdim=True)
        tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return tokens


def _generate(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor] | None = None, **settings: Any) -> Any:
    """The greedy answer to the padded rows, or those given."""
    tokens, mask = given or _padded()
    return generate(model, input_ids=tokens, attention_mask=mask, **GREEDY | settings)


WAYS: dict[str, dict[str, Any]] = {
    "cached": {"use_cache": True},
    "not cached": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.grid(each=lambda model: model[0])
@pytest.mark.parametrize("way", WAYS)
def test_generate_equals_a_greedy_loop(model: nn.Module, way: str) -> None:
    layer = soft_prompt(model)
    assert layer is not None
    if way == "in chunks" and not layer.chunks:
        with pytest.raises(AdapterError, match="prefill_chunk_size: this soft prompt is read in one piece"):
            _generate(model, **WAYS[way])
    elif way != "in chunks" or model.config.model_type == "llama":
        got = _generate(model, **WAYS[way], return_dict_in_generate=True)
        assert torch.equal(got.sequences, _loop(model, *_padded(), cached=way == "cached"))
        assert layer.placeholders is None
    if "cached" in way:
        own = model.generate(**dict(zip(("input_ids", "attention_mask"), _padded(), strict=True)), **GREEDY | WAYS[way])
        assert torch.equal(own, _loop(model, *_padded(), cached=False)), "without our wrapper"


@pytest.mark.parametrize("beams", [1, 2])
def test_what_looks_at_the_ids_sees_no_placeholder(model: nn.Module, beams: int) -> None:
    tokens, _ = _padded()
    seen: list[torch.Tensor] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids[:: len(input_ids) // 3, :7])
        return scores

    def allow(row: int, ids: torch.Tensor) -> list[int]:
        assert torch.equal(ids[:7], tokens[row])
        return [*range(9)]

    def never(input_ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        note(input_ids, scores)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    looks: dict[str, Any] = {"logits_processor": [note], "stopping_criteria": [never]}
    _generate(model, **looks, prefix_allowed_tokens_fn=allow, num_beams=beams, max_new_tokens=2)
    assert len(seen) >= 4
    assert all(torch.equal(each, tokens) for each in seen)


def test_criteria_of_transformers_stay_what_they_are(model: nn.Module) -> None:
    """``generate`` asks for their types: rows are padded after the end of a text."""
    first = int(_generate(model, max_new_tokens=3)[0, 7])
    ended = _generate(model, stopping_criteria=[EosTokenCriteria(first)], max_new_tokens=3)
    assert ended[0, 7:].tolist() == [first, *[PAD] * (ended.shape[1] - 8)]


def test_a_streamer_is_given_the_prompt_alone(model: nn.Module) -> None:
    given: list[torch.Tensor] = []
    streamer: Any = type("Streamer", (), {"put": lambda self, value: given.append(value), "end": lambda self: None})()
    tokens, mask = _padded()
    _generate(model, (tokens[1:2], mask[1:2]), streamer=streamer, max_new_tokens=2)
    assert torch.equal(given[0], tokens[1:2])
    assert [each.shape for each in given[1:]] == [(1,), (1,)]


def test_each_row_of_a_padded_batch_equals_its_unpadded_run(model: nn.Module) -> None:
    (tokens, mask), together = _padded(), _generate(model)
    for row, empty in enumerate((0, 3, 5)):
        alone = _loop(model, tokens[row : row + 1, empty:], mask[row : row + 1, empty:], cached=False)
        assert torch.equal(together[row, empty:], alone[0])


@pytest.mark.grid
def test_beams_are_the_same_with_and_without_a_cache(model: nn.Module) -> None:
    tokens, mask = _padded()
    beams = [_generate(model, num_beams=3, use_cache=cached) for cached in (False, True)]
    assert torch.equal(*beams)
    for row, empty in enumerate((0, 3, 5)):
        alone = _generate(model, (tokens[row : row + 1, empty:], mask[row : row + 1, empty:]), num_beams=3)
        assert torch.equal(beams[0][row, empty:], alone[0])


@torch.no_grad()
def _score(model: nn.Module, tokens: torch.Tensor, given: int) -> float:
    """Log probability of a row's tokens after the first ``given``."""
    found = model(input_ids=tokens[None], attention_mask=torch.ones(1, len(tokens), dtype=torch.long)).logits[0]
    chosen = found[given - 1 - len(tokens) : -1].log_softmax(-1).gather(1, tokens[given:, None])
    return float(chosen.sum())


def test_the_best_beam_is_at_least_as_likely_as_the_greedy_answer(model: nn.Module) -> None:
    tokens, mask = _padded()
    first, scored = (tokens[:1], mask[:1]), {"return_dict_in_generate": True, "output_scores": True}
    beam = _generate(model, first, num_beams=8, length_penalty=0.0, **scored)
    assert _score(model, beam.sequences[0], 7) >= _score(model, _generate(model, first)[0], 7) - 1e-3
    assert abs(_score(model, beam.sequences[0], 7) - float(beam.sequences_scores[0])) < 1e-2


def test_no_mask_means_the_mask_that_transformers_infers(model: nn.Module) -> None:
    tokens, _ = _padded()
    options = {**GREEDY, "eos_token_id": 95, "max_new_tokens": 4}
    expected = _generate(model, **options)
    assert torch.equal(generate(model, tokens, **options), expected)
    assert torch.equal(generate(model, inputs=tokens, **options), expected)


def test_settings_that_transformers_takes_from_the_models_config_count(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, mask = _padded()
    own: Any = copy.deepcopy(model.generation_config)
    own.update(eos_token_id=95, pad_token_id=PAD, max_length=11)
    monkeypatch.setattr(model, "generation_config", own)
    expected = generate(model, tokens, attention_mask=mask, do_sample=False)
    assert expected.shape == (3, 11)
    given = GenerationConfig(do_sample=False)
    assert torch.equal(generate(model, tokens, generation_config=given), expected)
    own.update(pad_token_id=95)
    assert torch.equal(generate(model, tokens, generation_config=given, pad_token_id=PAD), expected)


def test_repetition_penalty_counts_real_tokens_only(model: nn.Module) -> None:
    tokens = ids(1, 6, seed=3)
    got, again = (
        _generate(model, (tokens, torch.ones_like(tokens)), repetition_penalty=1e9, use_cache=cached)
        for cached in (True, False)
    )
    new = got[0, 6:].tolist()
    assert len(set(new)) == len(new)
    assert not set(new) & set(tokens[0].tolist())
    assert torch.equal(got, again)


def test_a_penalty_for_a_row_hangs_on_its_own_tokens(model: nn.Module) -> None:
    tokens, mask = _padded()
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    together = _generate(model, **options)
    for at in range(len(tokens)):
        alone = _generate(model, (tokens[at : at + 1], mask[at : at + 1]), **options)
        assert torch.equal(alone[0], together[at, : alone.shape[1]])


def test_lengths_count_what_the_user_gave(model: nn.Module) -> None:
    given = ids(1, 6), torch.ones(1, 6, dtype=torch.long)
    assert _generate(model, given, max_new_tokens=None, max_length=11).shape == (1, 11)
    config = copy.deepcopy(model.generation_config)
    config.update(max_length=10, do_sample=False, eos_token_id=None)
    assert generate(model, given[0], attention_mask=given[1], generation_config=config).shape == (1, 10)
    assert config.max_length == 10


def test_min_new_tokens_and_eos(model: nn.Module) -> None:
    (tokens, mask), free = _padded(), _generate(model)
    stop = int(free[0, 8])
    got = _generate(model, (tokens[:1], mask[:1]), eos_token_id=stop)
    assert got[0, -1] == stop
    assert torch.equal(got[0], free[0, : got.shape[1]])
    assert got.shape[1] <= 9
    longer = _generate(model, (tokens[:1], mask[:1]), eos_token_id=stop, min_new_tokens=6)
    assert stop not in longer[0, 7:12].tolist()


def test_samples_of_one_prompt_are_drawn_alike_with_and_without_a_cache(model: nn.Module) -> None:
    tokens, _ = _padded()
    drawn = []
    for cached in (False, True):
        torch.manual_seed(0)
        drawn.append(_generate(model, do_sample=True, num_return_sequences=2, use_cache=cached))
    assert drawn[0].shape == (6, 7 + STEPS)
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0][:, :7], tokens.repeat_interleave(2, 0))


def test_repetition_penalty_spares_the_token_that_pads_and_ends() -> None:
    model = _adapted("llama")
    given = ids(1, 6), torch.ones(1, 6, dtype=torch.long)
    ends = int(_generate(model, given)[0, 6])
    assert ends not in given[0]
    got = _generate(model, given, eos_token_id=ends, pad_token_id=ends, repetition_penalty=1e9)
    assert got[0, 6:].tolist() == [ends]


def test_tokens_that_are_guessed_ahead_change_nothing(model: nn.Module) -> None:
    if not hasattr(model.config, "num_key_value_heads"):
        pytest.skip("one of each kind of attention is enough")
    tokens = ids(1, 5).repeat(1, 2)
    expected = _loop(model, tokens, torch.ones_like(tokens), cached=False)
    assert torch.equal(_generate(model, (tokens, torch.ones_like(tokens)), prompt_lookup_num_tokens=3), expected)


@pytest.mark.grid
@pytest.mark.parametrize("model", [each for each in MODELS if "llama" in each], indirect=True, ids="-".join)
def test_an_assistant_guesses_what_it_generates_by_itself(model: nn.Module) -> None:
    given = {"input_ids": ids(1, 7), "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    base: Any = copy.deepcopy(model)
    unload(base)
    assistant: Any = copy.copy(model)
    rounds = []

    def guess(**options: Any) -> Any:
        output = generate(model, **options)
        tokens = options["input_ids"]
        alone = GREEDY | {"max_new_tokens": output.sequences.shape[1] - tokens.shape[1]}
        rounds.append(torch.equal(output.sequences, generate(model, tokens, **alone)))
        return output

    assistant.generate = guess
    assert torch.equal(base.generate(**given, assistant_model=assistant, **GREEDY), base.generate(**given, **GREEDY))
    assert all(rounds)
    assert len(rounds) > 1
    expected = generate(model, **given, **GREEDY)
    assert torch.equal(generate(model, **given, assistant_model=assistant, **GREEDY), expected)


def test_guidance_and_embeddings_are_refused(model: nn.Module) -> None:
    with pytest.raises(AdapterError, match="guidance_scale: is not supported with virtual tokens"):
        generate(model, ids(1, 6), guidance_scale=1.5, **GREEDY)
    generate(model, ids(1, 6), guidance_scale=1, **GREEDY)
    with pytest.raises(AdapterError, match="needs input_ids"):
        generate(model, inputs_embeds=torch.zeros(1, 3, 32), **GREEDY)


def test_a_conversation_goes_on_with_its_cache(model: nn.Module) -> None:
    tokens = ids(1, 7)
    first = _generate(model, (tokens, torch.ones_like(tokens)), return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids(1, N + 4, seed=4)], 1)
    given = longer, torch.ones_like(longer)
    assert torch.equal(_generate(model, given, **{CACHE: first[CACHE]}), _generate(model, given))


@torch.no_grad()
def test_positions_that_the_caller_counts_are_shifted(model: nn.Module) -> None:
    if not takes(model, "position_ids"):
        pytest.skip("this model takes no position_ids")
    inputs = {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    torch.testing.assert_close(model(**inputs, position_ids=torch.arange(6)[None]).logits, model(**inputs).logits)


# encoder-decoder


@pytest.fixture(scope="module", params=[method for method in METHODS_HERE if method != "cpt"])
def t5(request: pytest.FixtureRequest) -> nn.Module:
    return _adapted("t5", request.param)


@torch.no_grad()
def _decode(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    decoded = torch.full((len(tokens), 1), PAD)
    for _ in range(STEPS):
        found = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=decoded).logits[:, -1]
        best, second = found.topk(2).values.unbind(-1)
        assert (best - second).min() > 1e-3
        decoded = torch.cat([decoded, found.argmax(-1, keepdim=True)], 1)
    return decoded


def _right_padded() -> tuple[torch.Tensor, torch.Tensor]:
    tokens, mask = ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:], tokens[1, 4:] = 0, PAD
    return tokens, mask


@pytest.mark.parametrize("extra", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_encoder_decoder_generate_equals_a_greedy_loop(t5: nn.Module, extra: dict[str, Any]) -> None:
    (tokens, mask), layer = _right_padded(), soft_prompt(t5)
    if layer is not None and layer.decodes and "cache_implementation" in extra:
        with pytest.raises(AdapterError, match="static cache has no room"):
            _generate(t5, (tokens, mask), **extra)
        return
    got = _generate(t5, (tokens, mask), **extra)
    assert torch.equal(got, _decode(t5, tokens, mask))
    assert torch.equal(got[1], _generate(t5, (tokens[1:2, :4], mask[1:2, :4]), **extra)[0])
    if not extra:
        own = t5.generate(input_ids=tokens, attention_mask=mask, **GREEDY)
        assert torch.equal(own, got), "without our wrapper"


def test_encoder_decoder_beams_are_the_same_with_and_without_a_cache(t5: nn.Module) -> None:
    beams = [_generate(t5, _right_padded(), num_beams=3, use_cache=cached) for cached in (False, True)]
    assert torch.equal(*beams)


def _check_disabled(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain = copy.deepcopy(model)
    unload(plain)
    expected = plain.generate(input_ids=given[0], attention_mask=given[1], **GREEDY)
    with disabled(model):
        assert torch.equal(_generate(model, given), expected)


def test_disabled_generates_what_the_base_model_does(model: nn.Module) -> None:
    _check_disabled(model, _padded())


def test_encoder_decoder_disabled_generates_what_the_base_model_does(t5: nn.Module) -> None:
    _check_disabled(t5, _right_padded())
    with disabled(t5):
        plain = _generate(t5, _right_padded())
    assert not torch.equal(_generate(t5, _right_padded()), plain)


# training goes on


@pytest.mark.grid(each="method")
@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in ("llama", "t5") for method in METHODS_HERE if (kind, method) != ("t5", "cpt")],
)
def test_a_saved_soft_prompt_loads_trainable_and_trains_on(kind: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = METHODS[method].config_class()(num_virtual_tokens=N, **SETTINGS.get(method, {}))
    model = tiny(kind)
    inject(model, config)
    save_adapter(model, config, tmp_path)
    resumed, read = tiny(kind), config_from_dict(read_config(tmp_path))
    load_adapter(resumed, read, tmp_path, trainable=True)
    trained = [parameter for parameter in resumed.parameters() if parameter.requires_grad]
    saved = adapter_state(model)
    frozen = getattr(config, "num_frozen_tokens", 0)
    expected = [(len(value) - frozen, *value.shape[1:]) for value in saved.values()]
    assert [tuple(parameter.shape) for parameter in trained] == expected
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    losses = []
    for _ in range(12):
        loss = resumed(**labelled(kind)).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert (adapter_state(resumed)["prompt_embeddings"] != saved["prompt_embeddings"]).any()
    save_adapter(resumed, read, tmp_path / "again")
    final = tiny(kind)
    load_adapter(final, config_from_dict(read_config(tmp_path / "again")), tmp_path / "again")
    torch.testing.assert_close(adapter_state(final), adapter_state(resumed), atol=0, rtol=0)


def test_a_second_adapter_after_unload_inserts_its_tokens_once() -> None:
    model, once = tiny("llama"), tiny("llama")
    inject(model, PromptTuningConfig(num_virtual_tokens=3))
    unload(model)
    for each in (model, once):
        inject(each, PromptTuningConfig(num_virtual_tokens=4))
        set_trainable(each, True)
        randomise(each)
    with torch.no_grad():
        assert torch.equal(model(**batch("llama")).logits, once(**batch("llama")).logits)
