"""How much memory a run needs, found before a weight is loaded.

The largest micro-batch goes through the model forward and backward, with tensors that have shapes and no values, and
what lives at once is counted. So every model, method and task is counted by the code that trains it.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import base_module, model_ends
from peftcli.core.linear import PLAIN_WEIGHTS, linear_view
from peftcli.core.weights import named_tensors
from peftcli.errors import Interrupted
from peftcli.models.base import OpenBase
from peftcli.models.parts import stacks
from peftcli.models.quantization import bytes_of_weight
from peftcli.schema import Recipe, Training
from peftcli.system.cores import bytes_of_kernels
from peftcli.system.memory import resident_memory
from peftcli.tasks.base import on_device
from peftcli.tasks.text.fast.losses import take_head_as_it_is
from peftcli.tasks.text.fast.norms import fuse_norms
from peftcli.tasks.text.fast.unpadded import unpad
from peftcli.train.batches import BatchForm, collate
from peftcli.train.data import Data
from peftcli.train.devices.accelerator import base_dtype, uses_bf16
from peftcli.train.devices.sharding import group_size
from peftcli.train.evaluate import import_packages
from peftcli.train.optim import state_bytes
from peftcli.train.plan import MicroBatch, Plan

_HELD_BACK = 1.2
"""Factor by which a process on a CPU takes more than the counted memory of a step, since freed memory is not all used
again: docs/log.md, "Memory that is estimated"."""
_STEPS = 2000
"""In how many steps, from the first, the largest micro-batch is looked for."""


@dataclass(frozen=True)
class Estimate:
    """What a process of a run needs at most, in bytes."""

    device: str
    """Whose memory: cpu or cuda."""
    packages: int
    """Python and its packages, and the data; 0 on a GPU."""
    weights: int
    """The base model's weights."""
    file: int
    """What loading the model takes beyond its weights: pages of its files, converted or divided. On a GPU the rest of
    weights that are quantised there before they are divided."""
    adapter: int
    """What trains: values, gradients, what the optimizer remembers, and the best values so far if they are kept."""
    step: int
    """What the largest micro-batch needs beyond these, forward and backward; on a CPU with kernels, which are kept."""
    evaluation: int
    """What the largest batch of an evaluation needs beyond the weights and the adapter; 0 without one."""
    saving: int
    """What writing the adapter or a checkpoint takes beyond these: a tensor at a time; 0 on a GPU."""

    @property
    def peak(self) -> int:
        """At most: while the model is loaded, or with what a step or an evaluation has freed, as a file is written."""
        training = self.adapter + max(self.step, self.evaluation) + self.saving
        return self.packages + self.weights + max(self.file, training)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures."""
        return {**asdict(self), "peak": self.peak}


def estimate(
    model: Any, config: AdapterConfig, recipe: Recipe, base: OpenBase, data: Data, plan: Plan
) -> Estimate | None:
    """Return what a process of a run needs; None if that is not known without values.

    ``model`` is on the meta device, with its adapter, ready to train; it is changed, and of no use afterwards. Every
    setting of the recipe is chosen.
    """
    log = logging.getLogger(__name__)
    if base.is_pipeline or base.is_stored_quantised:
        log.debug("the memory of a pipeline, or of weights that are stored quantised, is not estimated")
        return None
    try:
        with _without_logs():
            return _estimate(model, config, recipe, base, data, plan)
    except (Interrupted, MemoryError):
        raise
    except Exception:  # whatever code the model, the method and the task have, which expects values
        log.debug("the memory cannot be estimated", exc_info=True)
        return None


def bytes_written(model: nn.Module, training: Training, plan: Plan) -> dict[str, int]:
    """Return about how many bytes a run writes: its adapter, a checkpoint, and how many of these there are at once.

    ``peak`` is the most that is on the disk at once. What trains is counted, and what the optimizer remembers of it.
    ``model`` may be on the meta device, with its adapter.
    """
    tensors = named_tensors(model)
    adapter = sum(parameter.nbytes for _, _, parameter in tensors.values())
    checkpoint = adapter + state_bytes(tensors, training)
    every = {"no": 0, "steps": training.save_steps, "epoch": plan.steps_per_epoch}[training.save_strategy]
    written = math.ceil(plan.total_steps / every) if every else 0
    kept = min(written, training.save_total_limit)
    at_once = min(written, training.save_total_limit + 1)  # the oldest goes when the newest is whole
    peak = max(at_once * checkpoint, kept * checkpoint + adapter)
    return {"adapter": adapter, "checkpoint": checkpoint, "checkpoints": at_once, "peak": peak}


@contextmanager
def _without_logs() -> Iterator[None]:
    """Inside, nothing is said of operations that cannot be done without values."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _estimate(model: Any, config: AdapterConfig, recipe: Recipe, base: OpenBase, data: Data, plan: Plan) -> Estimate:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages, on_cpu = 0, device.type == "cpu"
    if on_cpu:
        import_packages(data, recipe.training)
        packages = resident_memory()
    if recipe.base_model.attn_implementation is not None:
        model.set_attn_implementation(recipe.base_model.attn_implementation)
    fuse_norms(model)
    counter = MemoryCounter(device)
    counter.place(model, base_dtype(recipe))
    tensors = named_tensors(model)
    trained = [parameter for _, _, parameter in tensors.values()]
    values = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    saved = _saved_by_quantization(model, recipe)
    whole = counter.live - values - sum(saved.values())
    elsewhere = _held_by_others(model, group_size(recipe.launch, plan.num_processes), saved)
    in_step = recipe.launch.strategy != "replicate" and plan.num_processes > 1
    if not (in_step and recipe.launch.strategy == "zero3"):
        unpad(model, config, try_out=False)
        take_head_as_it_is(model)
    form = BatchForm.of(model, data.task, config, plan, in_step=in_step)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(recipe))
    model.train()
    for parameter in trained:
        parameter.grad = counter.like(parameter)
    kept = 0 if recipe.launch.reshard_after_forward else elsewhere  # layers that stay whole after the forward pass

    def taken(step: int, rows: MicroBatch) -> int:
        batch = form.batch(data.task, data.train, plan, step, rows)
        with autocast:
            return counter.peak_of(lambda: data.task.loss(model, on_device(batch, device)).total.backward())

    most_tokens, *most_pairs = (taken(*each) for each in _largest(form, plan, data))
    step = max([most_tokens, *most_pairs])
    if on_cpu:
        of_other_lengths = step - most_tokens  # what attention has freed does not fit where rows are longer
        step = round(_HELD_BACK * (step + of_other_lengths)) + (bytes_of_kernels() if uses_bf16(recipe) else 0)
    evaluation = _evaluation_peak(model, recipe, data, counter, kept)
    best = values if recipe.training.load_best_model_at_end and on_cpu else 0
    return Estimate(
        device=device.type,
        packages=packages,
        weights=whole - elsewhere,
        file=_loading_bytes(recipe, base, whole, elsewhere, on_cpu=on_cpu, quantised=bool(saved)),
        adapter=2 * values + state_bytes(tensors, recipe.training) + best,
        step=kept + step,
        evaluation=evaluation,
        saving=max((each.numel() * each.element_size() for each in trained), default=0) if on_cpu else 0,
    )


def _evaluation_peak(model: nn.Module, recipe: Recipe, data: Data, counter: MemoryCounter, kept: int) -> int:
    """Bytes that the largest batch of an evaluation takes, with the ``kept`` ones of layers; 0 without evaluation."""
    task, examples = data.task, data.eval
    if examples is None or recipe.training.eval_strategy == "no":
        return 0
    model.eval()
    before = counter.live
    largest = np.argsort(examples.sizes)[-recipe.training.per_device_eval_batch_size :].tolist()
    rows = collate(task, examples, largest, training=False)
    with torch.no_grad(), torch.autocast(counter.device.type, torch.bfloat16, enabled=uses_bf16(recipe)):
        try:
            counter.peak_of(lambda: task.loss(model, on_device(rows, counter.device)))
        except (Interrupted, MemoryError):
            raise
        except Exception:  # what comes after the model looks at its answers; by then most is known
            pass
    return kept + counter.most - before


def _loading_bytes(recipe: Recipe, base: OpenBase, whole: int, elsewhere: int, *, on_cpu: bool, quantised: bool) -> int:
    """Bytes that loading takes beyond the weights: ``whole`` in all, of which ``elsewhere`` other processes keep."""
    stored = base.stored_bytes()
    if on_cpu and abs(stored - whole) > whole / 20:  # or else the weights are pages of the file
        return stored + elsewhere
    if on_cpu and elsewhere:  # and what stays in this process is copied
        return whole if recipe.launch.cpu_ram_efficient_loading else whole - elsewhere
    return elsewhere if quantised else 0  # quantised on the GPU, whole, and divided then


def _largest(form: BatchForm, plan: Plan, data: Data) -> list[tuple[int, MicroBatch]]:
    """Steps, from 0, and what of them is in the model at once: with the most tokens, and with the most pairs of tokens.

    Attention may hold a number for each pair of a row. Padding counts if it is computed.
    """

    def rows(step: int) -> list[MicroBatch]:
        each = (plan.micro_batches(step, process) for process in reversed(range(plan.num_processes)))
        return form.divided(next(filter(any, each)), data.train)  # the last process that has rows has the longest

    def tokens(part: MicroBatch) -> list[int]:
        if not form.pads:
            return [int(plan.sizes[example]) for row in part for example in row]
        sizes = [int(plan.sizes[row].sum()) for row in part]
        return [max(sizes)] * len(sizes)

    steps = range(min(plan.steps_per_epoch, plan.total_steps, _STEPS))
    parts = [(step, part) for step in steps for part in filter(None, rows(step))]
    most_tokens = max(parts, key=lambda each: sum(tokens(each[1])))
    most_pairs = max(parts, key=lambda each: sum(size**2 for size in tokens(each[1])))
    return [most_tokens] if most_pairs is most_tokens else [most_tokens, most_pairs]


def _saved_by_quantization(model: nn.Module, recipe: Recipe) -> dict[nn.Parameter, int]:
    """Bytes by which each quantised linear weight is smaller. An output head is not quantised."""
    quantization, ends = recipe.base_model.quantization, {base_module(end) for end in model_ends(model) if end}
    if quantization is None:
        return {}
    layers = {base_module(each) for each in model.modules() if linear_view(each) is not None} - ends
    frozen = [each.weight for each in layers if not each.weight.requires_grad]
    return {each: int(each.numel() * (each.element_size() - bytes_of_weight(quantization))) for each in frozen}


def _held_by_others(model: nn.Module, count: int, saved: Mapping[nn.Parameter, int]) -> int:
    """Bytes of the layers' weights that other processes hold, less two whole layers: one computes, one is gathered."""
    if count == 1:
        return 0
    adapters = {id(each) for _, _, each in named_tensors(model).values()}
    layers = [layer for _, found in stacks(model) for layer in found]
    sizes = [
        sum(each.nbytes - saved.get(each, 0) for each in layer.parameters() if id(each) not in adapters)
        for layer in layers
    ]
    return max(0, sum(sizes) - sum(sizes) // count - 2 * max(sizes))


_DEVICE = torch.ops.prim.device.default
_INDEX = torch.ops.aten.index.Tensor


class MemoryCounter(TorchDispatchMode):
    """Inside, floating-point numbers are not computed; whole numbers, as token ids and masks, are.

    Torch's fake tensors stand for the former. What a model does with the latter may depend on their values: which
    tokens are no padding, and where targets are.
    """

    def __init__(self, device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.device, self.live, self.most = device, 0, 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known = set[int]()

    def place(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Put a model of the meta device on the device: what is frozen in a dtype, what trains as it is."""
        placed = dict[torch.Tensor, torch.Tensor]()
        for module in model.modules():
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in held:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if tensor not in placed:
                            placed[tensor] = self._placed(tensor, dtype)
                        tensors[name] = placed[tensor]

    def _placed(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        own = dtype if frozen and tensor.is_floating_point() else tensor.dtype
        if not own.is_floating_point:
            return torch.zeros(tensor.shape, dtype=own, device=self.device)
        with self._fake:
            made = torch.empty(tensor.shape, dtype=own, device=self.device)
            self._count(made)
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return another tensor like one, which is counted too."""
        return self._placed(tensor.detach(), tensor.dtype)

    def peak_of(self, compute: Callable[[], object]) -> int:
        """Call a function without values; return how many bytes lived at most beyond those from before.

        Raises:
            Exception: what it computes depends on values. ``most`` is as far as it came.
        """
        before = self.most = self.live
        PLAIN_WEIGHTS.add(FakeTensor)
        try:
            with self:
                compute()
        finally:
            PLAIN_WEIGHTS.discard(FakeTensor)
        return self.most - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # most calls are this one
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is _INDEX:  # where a mask is true is known
            places = [
                each.nonzero().unbind(1) if each is not None and each.dtype == torch.bool else [each]
                for each in args[1]
            ]
            args = (args[0], [place for each in places for place in each])
        if not any(isinstance(each, FakeTensor) for each in tree_leaves((args, kwargs))):
            made = func(*args, **kwargs)
            if not any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in tree_leaves(made)):
                return made
        with self._fake:
            made = func(*args, **kwargs)
        for each in tree_leaves(made):
            if isinstance(each, FakeTensor):
                self._count(each)
        return made

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or tensor.device.type != self.device.type:
            return
        self._known.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
