"""Cartridges (https://arxiv.org/abs/2506.06266)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.core.prompts.config import PrefixConfig
from peftcli.errors import AdapterError
from peftcli.guard.files import read_small
from peftcli.guard.ranges import AT_LEAST_0

_LARGEST = 1 << 26
"""Bytes of a document."""


@dataclass(kw_only=True)
class CartridgeConfig(PrefixConfig):
    """Settings of a cartridge, under PEFT's names."""

    peft_type = "CARTRIDGE"
    learning_rate = 5e-3
    trains_in_inference_mode = False

    num_frozen_tokens: int = field(default=1, metadata=AT_LEAST_0)
    """How many of the first virtual tokens do not train. Models attend much to the first token, whatever it says, and
    training that one is unsteady."""
    document: str | None = field(default=None, metadata={"file": False})
    """A text file. The cartridge starts as the keys and values of its first num_virtual_tokens tokens. Unset: random,
    which takes long to tame."""
    document_ids: list[int] | None = field(default=None, metadata={"recipe": False, "file": False}, repr=False)
    """Token ids of the document, as ``prepare`` finds them."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.num_frozen_tokens > self.num_virtual_tokens:
            found.append(("num_frozen_tokens", f"cannot be more than the {self.num_virtual_tokens} virtual tokens"))
        elif self.num_frozen_tokens == self.num_virtual_tokens and not self.inference_mode:
            found.append(("num_frozen_tokens", f"none of the {self.num_virtual_tokens} virtual tokens would train"))
        return found

    def prepare(self, load_tokenizer: Callable[..., Any]) -> None:
        if self.document is None:
            return
        try:
            text = read_small(Path(self.document), _LARGEST).decode()
            text = text.replace("\r\n", "\n").replace("\r", "\n")  # as in open()
        except (OSError, ValueError) as error:
            raise AdapterError(f"cannot be read: {error}", key="document", file=self.document) from None
        ids = load_tokenizer(None)(text)["input_ids"][: self.num_virtual_tokens]
        if len(ids) < self.num_virtual_tokens:
            raise AdapterError(
                f"has {len(ids)} tokens, fewer than num_virtual_tokens, {self.num_virtual_tokens}",
                key="document",
                file=self.document,
            )
        self.document_ids = ids
