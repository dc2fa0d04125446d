from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from chat_templates import make_tokenizer
from transformers import PreTrainedTokenizerFast

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def tokenizers() -> MakeTokenizer:
    """Makes a tokenizer with the chat template of that name; each kind is built once."""
    built: dict[tuple[Any, ...], PreTrainedTokenizerFast] = {}

    def get(template: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
        key = (template, *sorted(options.items()))
        if key not in built:
            built[key] = make_tokenizer(template, **options)
        return built[key]

    return get
