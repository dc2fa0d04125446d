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

    def load(self) -> Task:
        """The task itself. Imports torch."""
        return cast("Task", importlib.import_module(f"peftcli.tasks.{self.module}").TASK)


TASKS: dict[str, TaskRow] = {
    "causal_lm": TaskRow(
        "CAUSAL_LM", "AutoModelForCausalLM", "continue or answer a text (GPT, Llama, Qwen)", "causal_lm"
    ),
    "seq2seq_lm": TaskRow(
        "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", "turn one text into another (T5, BART)", "seq2seq_lm"
    ),
}
