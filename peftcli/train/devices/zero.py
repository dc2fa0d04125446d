"""A run under DeepSpeed's ZeRO: each process keeps a part of the optimizer's state and, with ``zero3``, of the model.

DeepSpeed adds the gradients up, clips them, and updates the parts. What trains is whole in every process, as it is with
FSDP2 (``sharding``), so adapters and checkpoints are those of a run without it.

ZeRO: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from torch import nn
from transformers import PreTrainedModel

from peftcli.schema import Launch
from peftcli.train.devices.sharding import STAGES, check_divisible, is_sharded
from peftcli.train.loop import PreparedModel
from peftcli.train.optim import AVERAGES

_LARGEST_BUCKET = 50_000_000
_COMPILED = "deepspeed_shm_comm"
"""A kernel that DeepSpeed compiles on a CPU and uses for inference only. Killed meanwhile, it lets later runs wait."""


class ZeroModel(PreparedModel):
    """What trains, with DeepSpeed's engine around the model."""

    in_step = True

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine."""
        return self.model

    def micro_batch(self, accelerator: Accelerator, *, is_last: bool) -> AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Any, accelerator: Accelerator) -> None:
        if not is_sharded(self.model):  # its buckets hold what has gradients, and processes may drop different layers
            loss = loss + sum(0 * parameter.sum() for parameter in self.parameters)
        self.engine.backward(loss * accelerator.num_processes)  # it takes the mean over the processes

    def apply_gradients(self, accelerator: Accelerator, limit: float) -> float:
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0)
        return math.inf if self.engine.optimizer.overflow or norm < 0 else norm

    def gather_parameters(self) -> None:
        first: Any = self.parameters[0]  # to which DeepSpeed has given methods
        if is_sharded(self.model):
            first.all_gather(self.parameters)

    def sync_parameters(self) -> None:
        take = importlib.import_module("deepspeed.utils").safe_set_full_fp32_param
        values, first = [parameter.detach().clone() for parameter in self.parameters], cast(Any, self.parameters[0])
        if is_sharded(self.model):  # the parts that are gathered, beside those that are updated
            first.partition(self.parameters, has_been_updated=True)
        for parameter, value in zip(self.parameters, values, strict=True):
            take(parameter, value)

    def optimizer_state(self) -> dict[nn.Parameter, dict[str, Any]]:
        whole = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
        remembered: dict[str, Any] = next(iter(self.optimizer.state.values()), {})
        return {
            parameter: {
                key: whole(parameter, key).view_as(parameter) if key in AVERAGES else value
                for key, value in remembered.items()
                if value is not None
            }
            for parameter in self.parameters
        }

    def load_optimizer_state(self, state: dict[nn.Parameter, dict[str, Any]]) -> None:
        utils, zero = importlib.import_module("deepspeed.utils"), self.engine.optimizer
        remembered: dict[str, Any] = next((values for values in state.values() if values), {})
        if not remembered:
            return
        divided, fused = is_sharded(self.model), self.optimizer.defaults.get("fused", False)
        for part in zero.fp32_partitioned_groups_flat if divided else zero.single_partition_of_fp32_groups:
            self.optimizer.state[part] = {
                key: torch.zeros_like(part) if key in AVERAGES else _copied(value, fused and part.device)
                for key, value in remembered.items()
            }
        if not divided:
            zero._lazy_init_hp_params_optimizer_state()
        for parameter, values in state.items():
            for key in values.keys() & set(AVERAGES):
                utils.safe_set_full_optimizer_state(parameter, values[key].to(parameter.device), key)


def start_engine(
    model: nn.Module,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    launch: Launch,
    max_grad_norm: float,
) -> Any:
    """Return DeepSpeed's engine for a model, which it brings to its device. What trains stays whole in every process.

    Args:
        model: Its weights may be in the CPU's memory.
        parameters: What trains, on the device.
        optimizer: Over these.
        launch: With zero2 or zero3.
        max_grad_norm: To clip at; 0: not at all.

    Raises:
        ModelError: there is no stack of layers to divide, or the weights are quantised.
    """
    stage, config = STAGES[launch.strategy], _engine_config(model, parameters, launch, max_grad_norm)
    with contextlib.redirect_stdout(sys.stderr):  # it prints
        deepspeed = importlib.import_module("deepspeed")
        log = logging.getLogger("DeepSpeed")  # which goes to stdout
        log.setLevel(logging.ERROR)
        for handler in log.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        deepspeed.ops.__compatible_ops__[_COMPILED] = False
        if stage == STAGES["zero3"]:  # weight by weight, since the device may not hold all
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(parameters[0].device)
                torch.distributed.broadcast(buffer.data, 0)  # as Init does with the parameters
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if stage == STAGES["zero3"]:
        for parameter in parameters:  # after it was gathered for the first time
            vars(parameter)["ds_persist"] = True
        engine.optimizer.persistent_parameters += parameters
        for each in model.modules():
            if isinstance(each, PreTrainedModel):
                vars(each)["_is_fsdp_managed_module"] = True  # generates until the last process is ready
    return engine


def _engine_config(model: nn.Module, parameters: list[nn.Parameter], launch: Launch, max_grad_norm: float) -> object:
    """Return DeepSpeed's configuration, by the sizes of the layers to divide and of what trains."""
    stage = STAGES[launch.strategy]
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(_LARGEST_BUCKET, sum(each.numel() for each in parameters)),
    }
    if stage == STAGES["zero3"]:
        layers = [layer for _, found in check_divisible(model, "zero3") for layer in found]
        largest = max(sum(each.numel() for each in layer.parameters()) for layer in layers)
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_max_reuse_distance": 2 * largest,
            "stage3_prefetch_bucket_size": largest,
            **({"offload_param": {"device": "cpu", "pin_memory": True}} if launch.cpu_offload else {}),
        }
    zero |= {name: value if isinstance(value, bool) else int(value) for name, value in launch.zero_optimization.items()}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # it is the loop that counts
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    return DeepSpeedPlugin(hf_ds_config=config).deepspeed_config


def _copied(value: Any, device: Any) -> Any:
    return value.clone().to(device or value.device) if isinstance(value, torch.Tensor) else value
