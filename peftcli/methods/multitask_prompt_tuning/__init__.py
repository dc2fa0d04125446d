"""Multitask prompt tuning (https://arxiv.org/abs/2303.02861)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peftcli.errors import AdapterError
from peftcli.guard.ranges import AT_LEAST_1
from peftcli.methods.prompt_tuning import TextPromptConfig

_FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
_BY_TASK: dict[str, Any] = AT_LEAST_1 | {"python_only": "its rows do not say which task they belong to"}


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(TextPromptConfig):
    """Settings of multitask prompt tuning, under PEFT's names."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    learning_rate = 2e-2
    sizes: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "num_tasks", "num_ranks")
    always_written: ClassVar[tuple[str, ...]] = (*TextPromptConfig.always_written, "num_tasks", "num_ranks")

    prompt_tuning_init: Literal["RANDOM", "TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"] = (
        "RANDOM"
    )
    """How the prompt starts. RANDOM: normal; TEXT: embeddings of prompt_tuning_init_text. The others go on from an
    adapter that was trained on many tasks: the mean of its tasks, one of them, or the part that they share."""
    prompt_tuning_init_state_dict_path: str | None = None
    """The adapter_model.safetensors of the adapter to start from."""
    prompt_tuning_init_task: int = 0
    """Which of its tasks EXACT_SOURCE_TASK starts from, counted from 0."""
    num_ranks: int = field(default=1, metadata=AT_LEAST_1)
    """Rank of each task's own factor. It adds num_tasks * num_ranks * (num_virtual_tokens + embedding size) weights."""
    num_tasks: int = field(default=1, metadata=_BY_TASK)
    """How many tasks share the prompt. Of more than one, each input says its own: task_ids."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.prompt_tuning_init_task < 0:
            found.append(("prompt_tuning_init_task", f"counts from 0; it is {self.prompt_tuning_init_task}"))
        if self.inference_mode:
            return found
        path = self.prompt_tuning_init_state_dict_path
        if self.prompt_tuning_init in _FROM_SOURCE and not path:
            found.append(("prompt_tuning_init_state_dict_path", f"{self.prompt_tuning_init} needs it"))
        if self.prompt_tuning_init in _FROM_SOURCE[:2] and self.num_tasks != 1:
            found.append(("num_tasks", f"{self.prompt_tuning_init} starts one task, not {self.num_tasks}"))
        if path and self.prompt_tuning_init not in _FROM_SOURCE:
            found.append(("prompt_tuning_init_state_dict_path", f"means nothing with {self.prompt_tuning_init}"))
        if path and not path.endswith(".safetensors"):
            found.append(("prompt_tuning_init_state_dict_path", "must be a .safetensors file; others can run code"))
        return found

    def fit(self, embedding: Any) -> int:
        if self.num_transformer_submodules == 2:
            raise AdapterError(
                "the adapter holds a second prompt, for the decoder, which PEFT trains and leaves out when it "
                "generates; train it with num_transformer_submodules=1",
                key="num_transformer_submodules",
            )
        return super().fit(embedding)

    def file_dict(self) -> dict[str, Any]:
        out = super().file_dict()
        if self.prompt_tuning_init in _FROM_SOURCE:  # PEFT would read the source again whenever it loads the adapter
            out.pop("prompt_tuning_init_state_dict_path", None)
            out["prompt_tuning_init"] = "RANDOM"
        return out
