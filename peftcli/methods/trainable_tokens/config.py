"""The settings of trainable tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from peftcli.core.config import TargetedConfig
from peftcli.methods._settings import Problems

if TYPE_CHECKING:
    from torch import nn

    from peftcli.core.layer import AdapterLayer


@dataclass(kw_only=True)
class TrainableTokensConfig(TargetedConfig):
    """Settings of trainable tokens, under PEFT's names. The target_modules are by default the input embedding."""

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    always_written: ClassVar[tuple[str, ...]] = ("target_modules", "token_indices")

    token_indices: list[int] = field(default_factory=list)
    """Ids of the tokens to train. Each costs as many parameters as the embedding is wide."""
    init_weights: bool = True
    """Start from the base model's rows; false starts at random."""

    def problems(self) -> Problems:
        found = super().problems()
        if not self.token_indices:
            found.append(("token_indices", "names no token"))
        found += [("token_indices", f"ids count from 0, not {token}") for token in self.token_indices if token < 0]
        if self.target_modules == "all-linear":
            found.append(("target_modules", "all-linear names no embedding"))
        return found

    def targets(self, model: nn.Module) -> list[str]:
        from peftcli.core.targets import shortest_names
        from peftcli.methods.trainable_tokens.layers import embedding_name, first_of_each_weight

        if self.target_modules is None:
            self.target_modules = [embedding_name(model)]
        names = super().targets(model)
        kept = first_of_each_weight(model, names)
        if len(kept) < len(names):  # PEFT, too, ties what shares a weight, and goes wrong where it is named
            self.target_modules = shortest_names(model, kept)
        return kept

    def wrap(self, module: nn.Module, name: str) -> AdapterLayer:
        from peftcli.methods.trainable_tokens.layers import wrap

        return wrap(module, name, self)

    def attach(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> None:
        from peftcli.methods.trainable_tokens.layers import share

        super().attach(model, layers)
        share(model, layers.values())
