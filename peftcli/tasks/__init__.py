"""The table of tasks. Readable without torch: a task's module is imported on demand.

A new task is one file that holds the functions of ``tasks.base.Task``, and one row here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from peftcli.tasks.base import Task


@dataclass(frozen=True)
class TaskRow:
    """One row of the table."""

    task_type: str
    """PEFT's name of the task, as adapter_config.json holds it."""
    auto_class: str
    """transformers' auto class that loads the base model."""
    summary: str
    module: str
    """Module below peftcli.tasks."""
    pipeline_tag: str
    """The hub's name of what such a model does."""
    usage: tuple[str, ...]
    """Lines of Python that use a loaded ``model`` and ``tokenizer`` once, for the model card."""
    packs: bool
    """Whether an example is one sequence of tokens, each with its own target: several then fit one row of a batch, and
    a long one can be split."""

    @property
    def peft_class(self) -> str:
        """PEFT's class that loads base model and adapter."""
        return f"AutoPeft{self.auto_class.removeprefix('Auto')}"

    def load(self) -> Task:
        """The task itself. Imports torch."""
        return cast("Task", importlib.import_module(f"peftcli.tasks.{self.module}").TASK)


TASKS: dict[str, TaskRow] = {
    "causal_lm": TaskRow(
        "CAUSAL_LM",
        "AutoModelForCausalLM",
        "continue or answer a text (GPT, Llama, Qwen)",
        "causal_lm",
        "text-generation",
        (
            'inputs = tokenizer("Hello", return_tensors="pt")',
            "if tokenizer.chat_template:",
            '    messages = [{"role": "user", "content": "Hello"}]',
            "    inputs = tokenizer.apply_chat_template(",
            '        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            "    )",
            "tokens = model.generate(**inputs, max_new_tokens=64)",
            'print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ),
        packs=True,
    ),
    "seq2seq_lm": TaskRow(
        "SEQ_2_SEQ_LM",
        "AutoModelForSeq2SeqLM",
        "turn one text into another (T5, BART)",
        "seq2seq_lm",
        "text-generation",
        (
            'inputs = tokenizer("Hello", return_tensors="pt")',
            "tokens = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        ),
        packs=False,
    ),
}
