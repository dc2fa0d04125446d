"""Settings that methods share, and checks of settings. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peftcli.core.config import TargetedConfig

if TYPE_CHECKING:
    from torch import nn

    from peftcli.core.layer import AdapterLayer

Problems = list[tuple[str, str]]


@dataclass(kw_only=True)
class BiasConfig(TargetedConfig):
    """A config of a method that can train biases of the base model too."""

    bias: str = "none"
    """Which biases of the base model are trained too: none, all, or those of the adapted layers. The last is written
    as PEFT writes it for the method: vera_only, fourier_only, MiSS_only, ..."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.bias not in ("none", "all") and not self.bias.endswith("_only"):
            found.append(("bias", f"must be none, all or end in _only, not {self.bias!r}"))
        return found

    def attach(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> None:
        from peftcli.core.inject import train_other_biases

        super().attach(model, layers)
        if self.bias == "all":
            train_other_biases(model)


@dataclass(kw_only=True)
class FanInConfig(TargetedConfig):
    """A config of a method whose file says how the adapted weights are stored."""

    fan_in_fan_out: bool = field(default=False, metadata={"recipe": False})
    """Whether the adapted weights are stored (in, out), as GPT-2's are. Found from the layer itself."""

    def attach(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> None:
        from peftcli.core.linear import linear_view

        super().attach(model, layers)
        views = [linear_view(layer) for layer in layers.values()]
        self.fan_in_fan_out = any(view.transposed for view in views if view)


def too_small(config: object, **least: float) -> Problems:
    """Settings below the least that each may be."""
    found = {key: getattr(config, key) for key in least}
    return [(key, f"must be at least {least[key]}, not {value}") for key, value in found.items() if value < least[key]]


def too_large(config: object, **most: float) -> Problems:
    """Settings above the most that each may be."""
    found = {key: getattr(config, key) for key in most}
    return [(key, f"must be at most {most[key]}, not {value}") for key, value in found.items() if value > most[key]]


def not_positive(config: object, *keys: str) -> Problems:
    """Settings that are not above zero."""
    found = {key: getattr(config, key) for key in keys}
    return [(key, f"must be above 0, not {value}") for key, value in found.items() if value <= 0]


def no_share(config: object, *keys: str) -> Problems:
    """Settings that are no share of something: not in [0, 1)."""
    found = {key: getattr(config, key) for key in keys}
    return [(key, f"must be in [0, 1), not {value}") for key, value in found.items() if not 0 <= value < 1]


def no_choice(config: object, key: str, *choices: object) -> Problems:
    """The setting, when it is none of the choices."""
    value = getattr(config, key)
    shown = ", ".join(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices)
    return [] if value in choices else [(key, f"must be one of {shown}, not {value!r}")]


def pattern_too_small(config: object, key: str, least: int) -> Problems:
    """Entries of a setting like rank_pattern that are below the least that they may be."""
    found: dict[str, int] = getattr(config, key)
    return [(key, f"{name}: must be at least {least}, not {value}") for name, value in found.items() if value < least]
