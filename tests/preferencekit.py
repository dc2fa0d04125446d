"""A batch for each preference loss, a tiny model with an adapter in it, and what TRL makes of them."""

from __future__ import annotations

from typing import Any

import torch
from classifierkit import encoded, open_task
from taskkit import PREFERRED, UNPAIRED
from trainkit import build

from peftcli.core.inject import inject
from peftcli.methods import config_from_dict

LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3},
    "dpo smoothed": {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"beta": 0.3},
    "orpo": {"beta": 0.3},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": 0.1},
    "kto": {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8},
}
"""Settings by the name of a case, which is that of its loss unless they give it."""
TRL = {
    "dpo": 0.674912,
    "dpo smoothed": 0.679653,
    "ipo": 2.773366,
    "orpo": 5.836857,
    "simpo": 0.968657,
    "kto": 0.498009,
}
"""The mean losses of TRL 1.16, as tests/interop/libraries/losses_of_trl.py prints them."""
ROWS = 4
GRPO: dict[str, Any] = {
    "rewards": [{"contains": "a", "weight": 0.5}, {"length": {"max": 5}}, {"exact_match": "answer"}],
    "group_size": 4,
    "max_new_tokens": 12,
}
GRPO_ROWS = [
    {"prompt": [{"role": "user", "content": text}], "answer": "tea"} for text in ("sun", "the old mill", "red fox")
]
"""Settings and rows of grpo over the tiny model."""


def adapted(**method: Any) -> Any:
    """The tiny model with an adapter that changes what it says."""
    model = build("llama")
    settings = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16}
    torch.manual_seed(1)
    inject(model, config_from_dict({"task_type": "CAUSAL_LM", **(method or settings | {"init_lora_weights": False})}))
    return model.eval()


def examples_of(loss: str, **settings: Any) -> tuple[Any, list[Any]]:
    """The task and its examples."""
    task = open_task("preference", "chat", **{"loss": loss, **LOSSES[loss], **settings})
    return task, encoded(task, (UNPAIRED if loss == "kto" else PREFERRED)[:ROWS])
