"""A small byte-level tokenizer, and chat templates in the manner of well-known models."""

from __future__ import annotations

from typing import Any

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

TEMPLATES = {
    # SmolLM2's own.
    "smollm": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral_tools": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' + m.tool_calls[0].function | tojson + ']' + eos_token }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
        "{% for message in rest %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}{% set content = (system if loop.index0 == 0 else '') + message['content'] %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    # Thinking is dropped from the turns before the last question; the last answer gets an empty one if it has none.
    "qwen3": (
        "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{%- set content = m.content or '' %}{%- set thought = '' %}"
        "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
        "{%- elif '</think>' in content %}"
        "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{{- '<|im_start|>assistant\n' }}"
        "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{%- else %}{{- content }}{%- endif %}"
        "{%- for call in m.tool_calls or [] %}{%- set f = call.function %}"
        "{{- '\n' if content or not loop.first else '' }}"
        '{{- \'<tool_call>\n{"name": "\' + f.name + \'", "arguments": \' + f.arguments | tojson }}'
        "{{- '}\n</tool_call>' }}"
        "{%- endfor %}{{- '<|im_end|>\n' }}"
        "{%- elif m.role == 'tool' %}"
        "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
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
    # EOS after the whole conversation, where no answer is asked for.
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
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
