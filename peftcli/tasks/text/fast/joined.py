"""Models over one base that compute what stands below their heads as one row of tokens, without padding.

Each model is called as ever. What it wants computed below its head stops the call (``_Request``); once the calls of all
models have come there, they are computed together, and made again from the beginning, with the result at hand. So are
the losses under the base model's head, of models that have no other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import disabled, evaluating
from peftcli.core.layer import AdapterLayer, model_ends
from peftcli.core.weights import named_tensors
from peftcli.errors import AdapterError, ModelError
from peftcli.models.probe import probing
from peftcli.tasks.text.fast.losses import frozen_losses, frozen_losses_by
from peftcli.tasks.text.fast.shared_base import ModelOnBase, Randomness, SharedBase
from peftcli.tasks.text.fast.unpadded import is_unpadded, unpad, unpadded_part
from peftcli.tasks.text.token_ids import is_half_precision

T = TypeVar("T")

_EXACT, _ROUNDED = 0.01, 0.5
"""How far hidden states in a joined row may be off, in float32 and in less, relative to what the adapter does."""
_NOISE = 0.05
"""Deviation of what is added to an adapter's weights while it is tried, since a new one does nothing."""


@dataclass(frozen=True)
class _HeadInputs:
    """Hidden states (N, D) whose losses are wanted, their targets (N,), and the head."""

    hidden: torch.Tensor
    targets: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]


_Inputs = dict[str, Any] | _HeadInputs
"""Arguments of the model below its head, or inputs of the head."""


class _Request(BaseException):  # so that no handler on the way takes it for an error
    def __init__(self, inputs: _Inputs):
        self.inputs = inputs


@dataclass(eq=False)
class JoinedModel:
    """One of the models."""

    model: Any
    """With one adapter, and its own head."""
    guest: ModelOnBase
    shares_head: bool
    """Whether its head is the base model's, without an adapter."""
    found: list[tuple[Any, Any]] = field(default_factory=list)
    """What was computed of the call at hand: an output below the head, or losses, and the random state after it."""
    used: int = 0
    """How many of them the call has taken again."""
    evaluated: bool = False
    """Whether the call has computed something by itself, in evaluation mode, which one stop more would repeat."""

    @property
    def unpadded(self) -> Any:
        """The forward below the head."""
        return unpadded_part(self.model).forward

    def answer(self, inputs: _Inputs) -> Any:
        """Return what was computed, or stop the call."""
        if self.used == len(self.found):
            raise _Request(inputs)
        output, random = self.found[self.used]
        self.used += 1
        self.guest.random.set(random)
        return copy.copy(output)  # hooks change it

    def below_head(self, inputs: dict[str, Any]) -> Any:
        """Return what was computed below the head, or stop the call; None: the model computes it by itself."""
        if self.model.training:
            return self.answer(inputs)
        self.evaluated = True
        return None

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor, head: Any) -> Any:
        """Return losses under a frozen head, or stop the call."""
        if self.shares_head and not self.evaluated and hidden.requires_grad:
            return self.answer(_HeadInputs(hidden, targets, head))
        return frozen_losses(hidden, targets, head)


class JoinedModels:
    """Models over one base."""

    def __init__(self, base: Any):
        """Take the base model, on its device, for the joined rows.

        Raises:
            ModelError: it cannot compute rows of several models.
        """
        if not unpad(base.train()):
            name, attention = type(base).__name__, getattr(base.config, "_attn_implementation", "no known")
            raise ModelError(
                f"{name} with {attention} attention on {base.device.type} does not compute batches without padding",
                key="base_model",
            )
        self.inner, self.head = unpadded_part(base), model_ends(base)[1]
        self.joined = SharedBase(self.inner)
        self._refuse_dropout()

    def _refuse_dropout(self) -> None:
        random = Randomness(self.inner.device)
        before = random.state
        with torch.no_grad(), random():
            self.inner(**self._probe())
        if not all(map(torch.equal, before, random.state)):
            raise ModelError(
                f"{type(self.inner).__name__} draws random numbers in training, those of all adapters",
                key="base_model",
                hint="a base model without dropout of its own can train several adapters at once",
            )

    def _probe(self) -> dict[str, torch.Tensor]:
        """Rows of unequal length."""
        size = self.inner.config.get_text_config().vocab_size
        ids = torch.randint(size, (2, 12), generator=torch.Generator().manual_seed(0)).to(self.inner.device)
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(12) < torch.tensor([[7], [12]])).long().to(ids.device),
        }

    def add(self, model: Any, config: AdapterConfig, random: Randomness) -> JoinedModel:
        """Let a model over the base's weights take part, which draws random numbers of its own.

        Raises:
            AdapterError: its adapter cannot.
        """
        problem = config.packing_problem()
        if problem is None and not is_unpadded(model):
            problem = "needs padding"
        try:
            if problem is None:
                added = JoinedModel(model, self.joined.add(unpadded_part(model), random), self._is_head_of(model))
                problem = None if self._agrees(added) else "gives other outputs there"
        except AdapterError as error:
            problem = error.message
        if problem is not None:
            raise AdapterError(f"cannot be trained beside others: the adapter {problem}", key="method")
        return added

    def _is_head_of(self, model: Any) -> bool:
        """Whether the base model's head is the model's own."""
        own = model_ends(model)[1]
        if own is None or self.head is None or isinstance(own, AdapterLayer):
            return False
        return list(map(id, own.parameters())) == list(map(id, self.head.parameters()))

    def _agrees(self, added: JoinedModel) -> bool:
        """Return whether an adapter, with noise in its weights, computes the same behind others' tokens as alone."""
        model, inner, inputs = added.model, unpadded_part(added.model), self._probe()
        kept, exact = inputs["attention_mask"].bool(), not is_half_precision(inner)
        exact &= not torch.is_autocast_enabled(inner.device.type)
        tensors = {parameter: parameter.clone() for _, _, parameter in named_tensors(model).values()}
        with probing(model, inner.device), evaluating(self.inner):
            torch.manual_seed(0)
            for parameter in tensors:
                parameter.add_(_NOISE * torch.randn_like(parameter))
            alone = inner(**inputs).last_hidden_state[kept].float()
            with disabled(model):
                base = inner(**inputs).last_hidden_state[kept].float()
            _, output = self._compute([(None, inputs), (added, inputs)])
            for parameter, before in tensors.items():
                parameter.copy_(before)
        off, change = ((each - alone).square().mean().sqrt() for each in (output.last_hidden_state[kept].float(), base))
        return bool(off <= (_EXACT if exact else _ROUNDED) * change + 1e-4 * alone.std())

    def call(self, calls: Sequence[tuple[JoinedModel, Callable[[], T]]]) -> list[T]:
        """Return what each function returns, which calls its model. Each draws random numbers of its own."""
        results, begun = dict[JoinedModel, T](), {joined: joined.guest.random.state for joined, _ in calls}
        while len(results) < len(calls):
            wanted = list[tuple[JoinedModel, _Inputs]]()
            for joined, function in calls:
                if joined in results:
                    continue
                joined.guest.random.state = begun[joined]
                try:
                    with joined.guest.random(), _answering(joined):
                        results[joined] = function()
                except _Request as stopped:
                    wanted.append((joined, stopped.inputs))
            for kind, compute in ((dict, self._compute), (_HeadInputs, _losses)):
                part: list[Any] = [each for each in wanted if isinstance(each[1], kind)]
                for (joined, _), output in zip(part, compute(part) if part else (), strict=True):
                    joined.found.append((output, joined.guest.random.state))
        for joined, _ in calls:
            joined.found.clear()
        return [results[joined] for joined, _ in calls]

    def _compute(self, calls: Sequence[tuple[JoinedModel | None, Mapping[str, Any]]]) -> list[Any]:
        """Compute the models' parts below the head for their inputs; None is the base model."""
        forwards = [self.inner.forward if joined is None else joined.unpadded for joined, _ in calls]
        parts = [forward.part(inputs) for forward, (_, inputs) in zip(forwards, calls, strict=True)]
        sizes = [len(part.layout.computed) for part in parts]
        guests = [None if joined is None else joined.guest for joined, _ in calls]
        with self.joined.of(list(zip(guests, sizes, strict=True))):
            output = self.inner.forward.compute(parts)
        states = output.last_hidden_state[0].split(sizes)
        each = zip(forwards, states, parts, strict=True)
        return [forward.spread(type(output)(**output), own, part) for forward, own, part in each]


def _losses(calls: Sequence[tuple[JoinedModel, _HeadInputs]]) -> list[Any]:
    """Compute the losses of several models under the head that they share."""
    wanted = [each for _, each in calls]
    hidden, targets = torch.cat([each.hidden for each in wanted]), torch.cat([each.targets for each in wanted])
    losses, correct = frozen_losses(hidden, targets, wanted[0].head)
    sizes = [len(each.targets) for each in wanted]
    return list(zip(losses.split(sizes), correct.split(sizes), strict=True))


@contextmanager
def _answering(joined: JoinedModel) -> Iterator[None]:
    """Inside, what the model wants computed is what was computed together, or stops the call."""
    joined.used, joined.evaluated, joined.unpadded.instead = 0, False, joined.below_head
    try:
        with frozen_losses_by(joined.losses):
            yield
    finally:
        joined.unpadded.instead = None
