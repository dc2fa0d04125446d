"""Log-probabilities and answers for lm-eval equal a loop by hand over single rows, without batches and padding."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from trainkit import PROMPTS, base_folder, run_recipe, scratch, write_recipe

from peftcli.adapters.generate import load_generator
from peftcli.adapters.proof.benchmark import Scorer
from peftcli.core.inject import disabled
from peftcli.core.prompts.inputs import soft_prompt
from peftcli.errors import DataError
from peftcli.tasks.text.generation import GenerationSettings

ADAPTERS = {
    "lora": (),
    "prompt_tuning": ("method={type: prompt_tuning, num_virtual_tokens: 5}",),
    "prefix_tuning": ("method={type: prefix_tuning, num_virtual_tokens: 5}",),
    "p_tuning": ("method={type: p_tuning, num_virtual_tokens: 5, encoder_hidden_size: 16}",),
    "new_tokens": ("base_model={{name: {llama}, new_tokens: [<tool>]}}",),
    "seq2seq": ("base_model={t5}", "task=seq2seq_lm"),
}


@functools.cache
def adapter(kind: str) -> Path:
    """A trained adapter; of prompts and completions where there are no conversations."""
    folder = scratch() / f"benchmark-{kind}"
    bases = {"llama": base_folder(), "t5": base_folder("t5", chat=False)}
    changes = [each.format(**bases) if "base_model" in each else each for each in ADAPTERS[kind]]
    rows = PROMPTS if kind == "seq2seq" else trainkit.MESSAGES
    return run_recipe(write_recipe(folder, rows=rows), *changes, "training.learning_rate=0.05").folder


def scorer(kind: str, batch_size: int = 3) -> Scorer:
    return Scorer(load_generator(str(adapter(kind))), batch_size, lambda text: None)


PAIRS = [([5, 9, 40, 7], [61, 3]), ([11], [50, 8, 8, 70, 12]), ([30] * 20, [44]), ([7, 300], [9, 9, 1])]


def by_hand(model: Any, before: list[int], after: list[int]) -> tuple[float, bool]:
    """One row, no padding, logits of the whole vocabulary."""
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            start = [model.config.decoder_start_token_id, *after[:-1]]
            logits = model(input_ids=torch.tensor([before]), decoder_input_ids=torch.tensor([start])).logits[0]
        else:
            ids = torch.tensor([[*before, *after]])
            # counted from the end: the logits of virtual tokens stand before those of the row
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1 - len(after) : -1]
    chances = logits.double().log_softmax(-1)
    return float(chances[range(len(after)), after].sum()), logits.argmax(-1).tolist() == after


@pytest.mark.parametrize("kind", ADAPTERS)
def test_log_probabilities_and_answers_are_those_of_a_loop_by_hand(kind: str) -> None:
    asked = scorer(kind)
    model, last = asked.generator.model, 300 if kind == "new_tokens" else 299
    pairs = [([min(each, last) for each in before], after) for before, after in PAIRS]
    for inside in (False, True):
        with disabled(model) if inside else torch.no_grad():
            found = asked.scores(pairs)
            wanted = [by_hand(model, *pair) for pair in pairs]
        for one, other in zip(found, wanted, strict=True):
            assert one.log_probability == pytest.approx(other[0], abs=1e-5)
            assert one.is_greedy == other[1]
        if not inside:
            trained = [each.log_probability for each in found]
    assert trained != pytest.approx([each.log_probability for each in found], abs=1e-3)
    contexts = [text for text, _ in trainkit.PAIRS[:4]]
    settings = GenerationSettings(max_new_tokens=8)
    if not model.config.is_encoder_decoder:
        greedy = [_greedy(asked, asked.ids(context), 8) for context in contexts]
        assert asked.texts(contexts, settings, ()) == greedy


def _greedy(asked: Scorer, ids: list[int], new: int) -> str:
    """The answer by one forward pass a token, without a cache."""
    model, tokenizer, said = asked.generator.model, asked.generator.tokenizer, list[int]()
    for _ in range(new):
        given = torch.tensor([[*ids, *said]])
        with torch.inference_mode():
            logits = model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -1]
        said.append(int(logits.argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(said, skip_special_tokens=True).strip()


def test_virtual_tokens_leave_fewer_positions_and_a_long_context_loses_its_start() -> None:
    plain, soft = scorer("lora"), scorer("prompt_tuning")
    assert soft_prompt(soft.generator.model) is not None
    assert plain.max_length - soft.max_length == 5
    long = [7] * 300
    (found,) = plain.scores([(long, [9, 9])])
    assert plain.truncated == 1
    assert found.log_probability == pytest.approx(by_hand(plain.generator.model, long[:255], [9, 9])[0], abs=1e-5)
    with pytest.raises(DataError, match="cannot be scored"):
        plain.scores([([7], [9] * 300)])


def test_an_answer_ends_before_the_words_that_end_it() -> None:
    asked = scorer("lora")
    (whole,) = asked.texts(["What follows sun 1?"], GenerationSettings(max_new_tokens=12), ())
    assert len(whole) > 3
    stop = whole[2:4]
    (cut,) = asked.texts(["What follows sun 1?"], GenerationSettings(max_new_tokens=12), (stop,))
    assert cut == whole.partition(stop)[0].strip()


def test_a_conversation_is_asked_as_in_training() -> None:
    asked = scorer("lora")
    text = asked.conversation([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    begun = asked.conversation([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}], False)
    assert begun == f"{text}Oh"
