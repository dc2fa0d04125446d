"""CPT: Context-aware Prompt Tuning (https://arxiv.org/abs/2410.17222)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peftcli.core.config import BOOKKEEPING
from peftcli.core.prompts.config import EmbeddedPromptConfig
from peftcli.errors import AdapterError
from peftcli.guard.ranges import AT_LEAST_0

INPUT_FORMAT, INPUT, OUTPUT_FORMAT, OUTPUT = 1, 2, 3, 4
"""Types of the tokens of the first example. In each further one they are 4 higher; 0 is a token of no example."""
_OTHER_LOSS = {"python_only": "peftcli train predicts the rows' own targets, not the context's outputs"}


@dataclass(frozen=True, kw_only=True)
class ContextExample:
    """An example that stands before every input."""

    prompt: str
    """The question. The vectors of its tokens train, each within opt_projection_epsilon of where it started."""
    completion: str
    """The answer, which follows the prompt as it is written here. The vectors of its tokens do not train."""


@dataclass(kw_only=True)
class CPTConfig(EmbeddedPromptConfig):
    """Settings of context-aware prompt tuning, under PEFT's names.

    What trains stays within opt_projection_epsilon of where it starts, so the context does most of the work: in the
    60 steps of docs/learning_rates.md the loss fell by 2 % more.
    """

    peft_type = "CPT"
    learning_rate = 1e-2
    always_written: ClassVar[tuple[str, ...]] = (
        *EmbeddedPromptConfig.always_written,
        "cpt_token_ids",
        "cpt_mask",
        "cpt_tokens_type_mask",
    )

    task_type: str | None = field(default="CAUSAL_LM", metadata=BOOKKEEPING)
    """PEFT's task name. CPT has a loss for CAUSAL_LM only."""
    num_virtual_tokens: int = field(default=1, metadata={"recipe": False})
    """Number of tokens of the context. Found from cpt_token_ids."""
    context: list[ContextExample] | None = field(default=None, metadata={"file": False})
    """The examples that stand before every input, as text; cpt_token_ids and cpt_tokens_type_mask are made from it."""
    cpt_token_ids: list[int] | None = None
    """Token ids of the context, where it is not given as text. Unset: one token, of id 0."""
    cpt_mask: list[int] | None = field(default=None, metadata={"recipe": False})
    """PEFT writes a 1 here for each token of the context. It changes nothing."""
    cpt_tokens_type_mask: list[int] | None = None
    """What each token of the context is. 1: format of an input, 2: input, 3: format of an output, 4: output; 4 more in
    each further example; 0: none of them. Outputs and zeros do not train. Unset: all are 1."""
    opt_weighted_loss_type: Literal["none", "decay"] = field(default="none", metadata=_OTHER_LOSS)
    """decay: outputs count the less in the loss the more examples stand between them and the input's own."""
    opt_loss_decay_factor: float = field(default=1.0, metadata=AT_LEAST_0 | _OTHER_LOSS)
    """What decay multiplies an example's weight in the loss by, compared with the next example's."""
    opt_projection_epsilon: float = field(default=0.1, metadata=AT_LEAST_0)
    """How far an input token's vector may move from where it started, times the square root of a 2048th of its size."""
    opt_projection_format_epsilon: float = field(default=0.1, metadata=AT_LEAST_0)
    """The same, for the tokens of the format."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer of context. Unset: the base model's."""

    def normalise(self) -> None:
        super().normalise()
        if self.context:  # of a recipe, the examples are mappings
            self.context = [ContextExample(**each) if isinstance(each, dict) else each for each in self.context]
        if self.cpt_token_ids or not self.context:
            self._set_tokens(self.cpt_token_ids or [0], self.cpt_tokens_type_mask)

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        ids = self.cpt_token_ids
        if self.task_type != "CAUSAL_LM":
            found.append(("task_type", f"CPT trains causal language models only, not {self.task_type}"))
        if self.context and ids:
            found.append(("context", "is said by cpt_token_ids already; leave one of them out"))
        for key in ("cpt_mask", "cpt_tokens_type_mask"):
            if ids and len(given := getattr(self, key)) != len(ids):
                found.append((key, f"{len(given)} numbers for the {len(ids)} of cpt_token_ids"))
        for key in ("cpt_token_ids", "cpt_tokens_type_mask"):
            if any(value < 0 for value in getattr(self, key) or ()):
                found.append((key, "holds a negative number"))
        form, own = self.opt_projection_format_epsilon, self.opt_projection_epsilon
        # of examples that are given as text, what stands in prompts trains
        kinds = {kind % OUTPUT for kind in self.cpt_tokens_type_mask or [INPUT]}
        if not any((0, form, own, form)[kind] for kind in kinds) and not self.inference_mode:
            trains = "opt_projection_epsilon" if INPUT in kinds else "opt_projection_format_epsilon"
            found.append((trains if any(kinds) else "cpt_tokens_type_mask", "no token of the context would train"))
        if ids and self.num_virtual_tokens != len(ids):
            found.append(("num_virtual_tokens", f"is {self.num_virtual_tokens}, and cpt_token_ids has {len(ids)}"))
        return found

    def prepare(self, load_tokenizer: Callable[..., Any]) -> None:
        if not self.context:
            return
        tokenizer = load_tokenizer(self.tokenizer_name_or_path)
        ids, kinds = list[int](), list[int]()
        for number, example in enumerate(self.context):
            for text, kind in ((example.prompt, INPUT), (example.completion, OUTPUT)):
                new = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids, kinds = ids + new, kinds + [OUTPUT * number + kind] * len(new)
        if not ids:
            raise AdapterError("contains no token", key="context")
        self.context = None
        self._set_tokens(ids, kinds)

    def _set_tokens(self, ids: list[int], kinds: list[int] | None) -> None:
        self.cpt_token_ids, self.cpt_mask = ids, self.cpt_mask or [1] * len(ids)
        self.cpt_tokens_type_mask = kinds or [INPUT_FORMAT] * len(ids)
        if self.num_virtual_tokens == 1:
            self.num_virtual_tokens = len(ids)
