"""Learning from answers that are compared: its losses, their settings, and what of them peftcli does not have."""

from __future__ import annotations

from typing import Any, NoReturn

from peftcli.drafting.peers.base import By, Draft, Rule, Setting, number

ONE_TURN = "chosen and rejected are one turn each there; peftcli reads lists of turns: put each into [ ]"
CPO_SHARE = "the weight of a supervised loss beside SimPO's, which peftcli does not add; task.loss: orpo has one"
_SETTINGS = {
    "beta": ("dpo", "ipo", "kto", "orpo", "simpo"),
    "label_smoothing": ("dpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Setting of the section task -> the losses that read it."""
TABLE: dict[str, Rule] = {
    **{name: By(f"task.{name}") for name in _SETTINGS},
    "cpo_alpha": CPO_SHARE,
    "rpo_alpha": "a share of supervised loss beside DPO's, which peftcli does not add; orpo has one of its own",
    "ref_model": "another reference model; peftcli compares with the base model, adapter off",
}
"""The keys of TRL's preference trainers, which ms-swift has too."""


def preference(draft: Draft, loss: str, source: str, beta: Any = None) -> None:
    """Write the task of answers that are compared."""
    draft.put("task.type", "preference", source)
    draft.put("task.loss", loss, source)
    if beta is not None:
        draft.settings["task.beta"] = Setting(beta, f"{draft.peer.label}'s default")
    if loss == "simpo" and "cpo_alpha" in draft.peer.table and draft.get("cpo_alpha") is None:
        draft.drop(f"cpo_alpha ({draft.peer.label}'s default)", CPO_SHARE, 1.0)


def loss_settings(draft: Draft, loss: str | None, **theirs: str) -> None:
    """Write the settings that the loss reads, and list those of other losses as not carried.

    Args:
        draft: The draft.
        loss: The loss of the recipe; None if it compares no answers.
        theirs: Our name of a setting -> the tool's key, where it has another name.
    """
    for ours, losses in _SETTINGS.items():
        key = theirs.get(ours, ours)
        if draft.get(key) is not None and loss in losses:
            draft.put(f"task.{ours}", number(draft.get(key)), key)
        elif draft.get(key) is not None:
            draft.drop(key, "a setting of another loss, which the recipe does not choose")


def refuse_sampling(draft: Draft, what: str) -> NoReturn:
    """Raise the error of methods that learn from answers which they sample.

    Raises:
        UsageError: always.
    """
    draft.refuse(
        f"{what}: learning from sampled answers (GRPO, PPO and the like) cannot be imported",
        "The nearest here is task: preference, on pairs of chosen and rejected answers: `peftcli explain preference`.",
    )
