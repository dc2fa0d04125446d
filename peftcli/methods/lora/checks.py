"""Settings of LoRA that mean nothing, whatever the model. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftcli.methods.lora.config import LoraConfig

Problems = list[tuple[str, str]]
_MOST_LAYERS = 500


def lora_problems(config: LoraConfig) -> Problems:
    """What is wrong, but for how A and B start: ``(key, message)`` each."""
    found: Problems = []
    if config.r < 1:
        found.append(("r", f"must be at least 1, not {config.r}"))
    if config.lora_alpha <= 0:
        found.append(("lora_alpha", f"must be above 0, not {config.lora_alpha}"))
    if not 0 <= config.lora_dropout < 1:
        found.append(("lora_dropout", f"must be in [0, 1), not {config.lora_dropout}"))
    found += [("rank_pattern", f"{k}: r must be at least 1, not {v}") for k, v in config.rank_pattern.items() if v < 1]
    for key, alpha in config.alpha_pattern.items():
        if alpha <= 0:
            found.append(("alpha_pattern", f"{key}: lora_alpha must be above 0, not {alpha}"))
    if config.bias not in ("none", "all", "lora_only"):
        found.append(("bias", f"must be none, all or lora_only, not {config.bias!r}"))
    return found + _together(config) + _token_problems(config) + _range_problems(config)


def _together(config: LoraConfig) -> Problems:
    """Settings that do not go with one another."""
    found: Problems = []
    if config.lora_bias and config.use_dora:
        found.append(("lora_bias", "does not go with use_dora"))
    if config.lora_bias and not isinstance(config.init_lora_weights, bool):
        found.append(("lora_bias", "needs init_lora_weights: true or false"))
    if config.use_dora and config.init_lora_weights == "mica":
        found.append(("use_dora", "does not go with init_lora_weights: mica"))
    if config.use_dora and config.ensure_weight_tying:
        found.append(("use_dora", "does not go with ensure_weight_tying: an embedding's lengths are not its head's"))
    for key in ("lora_dropout", "use_dora", "lora_bias"):
        if config.target_parameters and getattr(config, key):
            found.append((key, "does not go with target_parameters: their modules multiply by themselves"))
    return found


def _token_problems(config: LoraConfig) -> Problems:
    wanted, key = config.trainable_token_indices, "trainable_token_indices"
    lists = list(wanted.values()) if isinstance(wanted, dict) else [] if wanted is None else [wanted]
    if wanted is not None and not any(lists):
        return [(key, "names no token")]
    return [(key, f"token ids count from 0, not {token}") for tokens in lists for token in tokens if token < 0]


def _range_problems(config: LoraConfig) -> Problems:
    ranges = config.layer_replication
    if ranges is None:
        return []
    if not ranges:
        return [("layer_replication", "names no layer")]
    wrong = [pair for pair in ranges if len(pair) != 2 or not 0 <= pair[0] < pair[1]]
    if not wrong and sum(end - start for start, end in ranges) > _MOST_LAYERS:
        return [("layer_replication", f"makes more than {_MOST_LAYERS} layers, and no model has so many")]
    return [("layer_replication", f"each range is [first layer, last layer + 1], not {pair}") for pair in wrong]
