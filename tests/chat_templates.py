"""A small byte-level tokenizer, and chat templates in the manner of well-known models."""

from __future__ import annotations

from typing import Any

from mask_matrix import PUBLISHED
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peftcli.tasks.text.chat import IGNORED, Encoded

CORPUS = [
    "The capital of France is Paris. user assistant system model tool",
    "What is the answer? Hello there, hello again. two and two is four\n\n",
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
] * 4

SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|A|>", "<|U|>", "<|end|>", "<|stop|>", "<|open|>",
]  # fmt: skip
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

_OF_MODELS = {
    "smollm": "smollm2",
    "llama2": "llama2",
    "llama3": "llama3",
    "gemma": "gemma2",
    "mistral": "mistral_v1",
    "zephyr": "zephyr",
    "qwen3": "qwen3",
    "phi3": "phi3",
}
"""Name -> its model in the mask matrix."""
TEMPLATES = {
    **{name: PUBLISHED[model].text() for name, model in _OF_MODELS.items()},
    "mistral_tools": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' + m.tool_calls[0].function | tojson + ']' + eos_token }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
    ),
    # The question to think stands in the generation prompt only; thinking is never shown again.
    "deepseek": (
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{{- '<|A|>' + m.content.split('</think>')[-1] + eos_token }}"
        "{%- else %}{{- '<|U|>' + m.content }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|A|><think>\n' }}{%- endif %}"
    ),
    # A turn ends with two special tokens.
    "two_ends": (
        "{% for m in messages %}{{ '<|open|>' + ('<|A|>' if m.role == 'assistant' else '<|U|>') + m.content "
        "+ ('<|end|>' if m.role == 'assistant' else '') + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|open|><|A|>' }}{% endif %}"
    ),
    # The end of an answer is the header of the next turn.
    "open_ended": (
        "{% for m in messages %}{{ ('<|A|>' if m.role == 'assistant' else '<|U|>') + '\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|A|>\n' }}{% endif %}"
    ),
    # Marks that are not tokens.
    "plain": (
        "{% for m in messages %}{{ '[' + m.role + ']\n' + m.content + '[end]\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
    ),
}
# Harmony's: an answer ends with <|end|>, and the last one with <|stop|>; so does the thinking before it.
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}{{ '<|open|>analysis<|A|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|open|>final<|A|>' + m.content + ('<|stop|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|open|>' + m.role + '<|A|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|open|>' }}{% endif %}"
)
# The model is asked with a part of the header, and writes its rest.
PART_OF_HEADER = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


def make_tokenizer(
    template: str | None = None, *, eos: str | None = "</s>", add_bos: bool = False, add_eos: bool = False,
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:  # fmt: skip
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    single = ["<s>"] * add_bos + ["$A"] + ["</s>"] * add_eos
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if len(single) > 1:
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        steps.append(processors.TemplateProcessing(single=" ".join(single), special_tokens=ids))
    backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = TEMPLATES.get(template, template) if template else None
    return tokenizer


def trained(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of the runs of trained tokens."""
    runs: list[list[int]] = []
    previous = IGNORED
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            if previous == IGNORED:
                runs.append([])
            runs[-1].append(token)
        previous = label
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]
