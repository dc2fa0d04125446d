"""Open what a recipe names, as a run would: its data, its model's shapes, its targets. Loads no weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from peftcli.adapters.begin import check_begin
from peftcli.core.config import AdapterConfig
from peftcli.core.inject import Injection, inject
from peftcli.core.weights import named_tensors
from peftcli.data.findings import refuse
from peftcli.errors import HubError, Interrupted, NetworkError, PeftcliError, Problem
from peftcli.guard.adapter_folder import find_weights
from peftcli.models.base import OpenBase
from peftcli.models.conversions import warn_of_peft
from peftcli.models.open import open_base
from peftcli.models.parts import parameters_of_heads
from peftcli.recipe import method_config
from peftcli.recipe.rates import with_rate
from peftcli.schema import DIVIDED, Recipe
from peftcli.tasks import open_task, row_of
from peftcli.tasks.base import Task, refuse_other_classes
from peftcli.train.checked import DeepCheck
from peftcli.train.data import RunData, load_data, plan_of, prepare_method, refuse_few_rows, with_task
from peftcli.train.devices.accelerator import refuse_attention
from peftcli.train.devices.launch import total_processes
from peftcli.train.devices.sharding import check_divisible, refuse_groups, refuse_strategy
from peftcli.train.evaluate import refuse_metrics
from peftcli.train.events import Event, Message
from peftcli.train.forward import add_embedding_noise, check_liger_kernel, checkpoint_activations
from peftcli.train.init_adapter import KEY, find_init_adapter, its_base_named, with_init_settings
from peftcli.train.memory.estimate import bytes_written, estimate
from peftcli.train.memory.fit import choose_settings, first_auto, settings_of, smallest
from peftcli.train.optim import check_optimizer, parameter_groups, unfinished_warmup
from peftcli.train.trackers import require_packages

T = TypeVar("T")
_SECTIONS = ("base_model", "task", "method", "dataset", "training", "launch", "gates")


def examine(recipe: Recipe) -> DeepCheck:
    """Every error and every warning that opening the recipe's data and model brings up."""
    return _Examination(recipe).run()


class _Examination:
    """Opens what a recipe names, step by step. An error is noted, and what does not depend on it is still opened."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.found, self.processes = recipe, DeepCheck(), total_processes(recipe.launch)
        self.data: RunData | None = None

    def run(self) -> DeepCheck:
        """Open all of it; return what was found."""
        base = self._attempt("base_model", lambda: open_base(self.recipe.base_model))
        notes = list[Event]()
        named = None if base is None else self._attempt("task", lambda: with_task(self.recipe, notes.append))
        if base is None or named is None:
            return self.found
        self.recipe = named
        begun = self._attempt("method", lambda: with_init_settings(named))
        config = None if begun is None else method_config(begun)
        task = self._attempt("base_model", lambda: open_task(begun or named, base))
        if task is not None:
            task.method = config or task.method
            self._open_data(task, config, [event.text for event in notes if isinstance(event, Message)])
        self._check_settings(base)
        model = self._open_model(base, task, config)
        if not self.found.errors:
            assert begun is not None
            assert config is not None
            self._estimate(begun, config, base, model)
        return self.found

    def _attempt(self, key: str, action: Callable[[], T]) -> T | None:
        """Return what an action returns; note its error under the key that it names, or ``key``, and return None."""
        try:
            return action()
        except (HubError, Interrupted, NetworkError):  # no mistake of the recipe
            raise
        except PeftcliError as error:
            place = f"{error.file}:{error.line}" if error.line else error.file
            section, dot, _ = (error.key or "").partition(".")
            is_column = error.file is not None and error.key != key and not (dot and section in _SECTIONS)
            own, column = (key, error.key) if is_column else (key, None)
            if error.key is not None and not is_column:
                if error.key.startswith(key) or section in _SECTIONS:
                    own = error.key
                elif key == "method":  # whose settings stand in that section
                    own = f"method.{error.key}"
            text = ": ".join(filter(None, (place, column, error.message)))
            hint = f" ({' '.join(error.hint.split())})" if error.hint else ""
            self.found.errors.append(Problem(text + hint, file="", key=own))
            self.found.exit_code = self.found.exit_code or error.exit_code
            return None

    def _open_data(self, task: Task[Any], config: AdapterConfig | None, notes: list[str]) -> None:
        """Read the data, and check what is in it and in how many steps it is seen."""
        recipe = self.recipe
        ready = self._attempt("method", partial(prepare_method, task))
        data = self._attempt("dataset", lambda: load_data(recipe, task)) if ready else None
        if data is None:
            return
        self._attempt("dataset", lambda: refuse(data.findings, recipe.dataset.allow))
        self._attempt("training", partial(refuse_metrics, recipe, data))
        self._attempt("dataset", data.refuse_size)
        plan = plan_of(smallest(recipe), data, self.processes)
        self.data = RunData(data, plan)
        if first_auto(recipe) is None:
            self._attempt("training", partial(refuse_few_rows, data, plan))
        if config is not None:
            self._attempt("method", partial(config.check_steps, plan.total_steps))
            self._attempt("launch.strategy", partial(refuse_strategy, recipe, data.task, config, self.processes))
            self._attempt("launch.shard_size", partial(refuse_groups, recipe.launch, self.processes))
        unfinished = unfinished_warmup(recipe.training, plan.total_steps)
        warnings = notes + data.warnings + plan.repeated(data.names) + unfinished
        self.found.would |= {"data": data.report, "steps": plan.total_steps, "warnings": warnings}

    def _check_settings(self, base: OpenBase) -> None:
        """Check the settings that need neither data nor model."""
        recipe = self.recipe
        self._attempt("training", lambda: check_optimizer(with_rate(recipe).training))
        self._attempt("training", lambda: require_packages(recipe))
        if torch.cuda.is_available() or recipe.training.bf16 is False:  # or another machine, with a GPU, decides
            self._attempt("base_model", lambda: refuse_attention(recipe))
        if recipe.training.use_liger_kernel:
            self._attempt("training", check_liger_kernel)
        self._attempt("base_model", lambda: base.quantization)

    def _open_model(self, base: OpenBase, task: Task[Any] | None, config: AdapterConfig | None) -> Any:
        """Return the model without values; with the adapter in it, if there is no error."""
        recipe, options = self.recipe, self.data.task.model_options() if self.data is not None else {}
        model = self._attempt(
            "base_model", lambda: base.empty_model(row_of(recipe).of(base.config).auto_class, **options)
        )
        if model is None or config is None:
            return model
        self._attempt("base_model", lambda: base.check_weights(model, fetch=False))
        self._attempt("base_model", lambda: base.check_groups(row_of(recipe).of(base.config).auto_class, model))
        if recipe.launch.strategy in DIVIDED and self.processes > 1:
            self._attempt("launch.strategy", partial(check_divisible, model, recipe.launch.strategy))
        if task is not None:
            self._attempt("method", lambda: task.fit_model(model, config))
        config.task_type = row_of(recipe).task_type
        new = parameters_of_heads(model) if options else []  # taken to be new
        if options and base.commit is None:  # or its files would be fetched
            new += self._attempt("base_model", lambda: base.missing_poolers(model)) or []
        source = find_init_adapter(recipe)

        def adapted() -> Injection:
            if source is not None and task is not None:
                refuse_other_classes(task, source.recorded_options, source.recorded_settings, source.folder)
            if source is not None:
                with its_base_named(source, recipe):
                    check_begin(model, config, source.header, find_weights(source.folder), new)
            injection = inject(model, config, initialised=new)
            warn_of_peft(model, config, named_tensors(model))
            return injection

        injection = self._attempt("method" if source is None else KEY, adapted)
        if injection is not None:
            self._attempt("training", lambda: parameter_groups(named_tensors(model), with_rate(recipe).training))
            self.found.would["parameters"] = {"trainable": injection.trainable, "all": injection.total}
            self.found.would["training_in_full"] = config.modules_to_save or []
        return model

    def _estimate(self, begun: Recipe, config: AdapterConfig, base: OpenBase, model: Any) -> None:
        """Find what a run takes of disk and memory, with the settings that are left to it chosen."""
        assert self.data is not None
        data, would = self.data.examples, self.found.would
        would["disk"] = bytes_written(model, begun.training, self.data.plan)
        if first_auto(begun) is not None:
            fits = self._attempt("training", partial(choose_settings, begun, base, data, self.processes))
            if fits is None:
                return
            begun = fits[0]
            would["chosen"] = settings_of(begun)
        training = begun.training
        if training.gradient_checkpointing:
            self._attempt("training", partial(checkpoint_activations, model, begun))
        if training.neftune_noise_alpha is not None:
            self._attempt("training", partial(add_embedding_noise, model, training.neftune_noise_alpha))
        needs = estimate(model, config, begun, base, data, plan_of(begun, data, self.processes))
        would["memory"] = needs and {**needs.as_dict(), "processes": self.processes // begun.launch.num_machines}
