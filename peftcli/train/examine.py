"""Open what a recipe names, as a run would: its data, its model's shapes, its targets. Loads no weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from peftcli.core.files import check_begin
from peftcli.core.heads import parameters_of_heads
from peftcli.core.inject import Injection, inject
from peftcli.core.weights import named_tensors
from peftcli.data.findings import refuse
from peftcli.errors import HubError, Interrupted, NetworkError, PeftcliError, Problem
from peftcli.guard.adapter_folder import find_weights
from peftcli.models.conversions import warn_of_peft
from peftcli.models.open import open_base
from peftcli.recipe import method_config
from peftcli.recipe.rates import with_rate
from peftcli.schema import DIVIDED, Recipe
from peftcli.tasks import open_task, row_of
from peftcli.tasks.base import FitsModel, refuse_other_classes
from peftcli.train.checked import DeepCheck
from peftcli.train.data import load_data, plan_of, prepare_method, refuse_few_rows, with_task
from peftcli.train.devices.accelerator import refuse_attention
from peftcli.train.devices.kernels import check_liger_kernel, checkpoint_activations
from peftcli.train.devices.launch import total_processes
from peftcli.train.devices.sharding import check_divisible
from peftcli.train.devices.strategies import refuse_strategy
from peftcli.train.evaluate import refuse_metrics
from peftcli.train.events import Event, Message
from peftcli.train.init_adapter import KEY, find_init_adapter, its_base_named, with_init_settings
from peftcli.train.memory.estimate import bytes_written, estimate
from peftcli.train.memory.fit import choose_settings, first_auto, settings_of, smallest
from peftcli.train.optim import check_optimizer, parameter_groups, unfinished_warmup
from peftcli.train.setup import add_embedding_noise
from peftcli.train.trackers import require_packages

T = TypeVar("T")
_SECTIONS = ("base_model", "task", "method", "dataset", "training", "launch", "gates")


def examine(recipe: Recipe) -> DeepCheck:
    """Every error and every warning that opening the recipe's data and model brings up."""
    found = DeepCheck()

    def attempt(key: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except (HubError, Interrupted, NetworkError):  # no mistake of the recipe
            raise
        except PeftcliError as error:
            place = f"{error.file}:{error.line}" if error.line else error.file
            section, dot, _ = (error.key or "").partition(".")
            is_column = error.file is not None and error.key != key and not (dot and section in _SECTIONS)
            own, column = (key, error.key) if is_column else (_recipe_key(error.key, key), None)
            text = ": ".join(filter(None, (place, column, error.message)))
            hint = f" ({' '.join(error.hint.split())})" if error.hint else ""
            found.errors.append(Problem(text + hint, file="", key=own))
            found.exit_code = found.exit_code or error.exit_code
            return None

    processes = total_processes(recipe.launch)
    base = attempt("base_model", lambda: open_base(recipe.base_model))
    if base is None:
        return found
    said: list[Event] = []
    named = attempt("task", lambda: with_task(recipe, said.append))
    if named is None:
        return found
    recipe, notes = named, [event.text for event in said if isinstance(event, Message)]
    begun = attempt("method", lambda: with_init_settings(named))
    config = None if begun is None else method_config(begun)
    task = attempt("base_model", lambda: open_task(begun or recipe, base))
    options: dict[str, Any] = {}
    if task is not None:
        task.method = config or task.method
        ready = attempt("method", partial(prepare_method, task))
        data = attempt("dataset", lambda: load_data(recipe, task)) if ready else None
        if data is not None:
            options = data.task.model_options()
            attempt("dataset", lambda: refuse(data.findings, recipe.dataset.allow))
            attempt("training", partial(refuse_metrics, recipe, data))
            attempt("dataset", data.refuse_size)
            plan = plan_of(smallest(recipe), data, processes)
            if first_auto(recipe) is None:
                attempt("training", partial(refuse_few_rows, data, plan))
            if config is not None:
                attempt("method", partial(config.check_steps, plan.total_steps))
                attempt("launch.strategy", partial(refuse_strategy, recipe, data.task, config, processes))
            found.would |= {
                "data": data.report,
                "steps": plan.total_steps,
                "warnings": notes
                + data.warnings
                + plan.repeated(data.names)
                + unfinished_warmup(recipe.training, plan.total_steps),
            }
    attempt("training", lambda: check_optimizer(with_rate(recipe).training))
    attempt("training", lambda: require_packages(recipe))
    if torch.cuda.is_available() or recipe.training.bf16 is False:  # or another machine, with a GPU, decides
        attempt("base_model", lambda: refuse_attention(recipe))
    if recipe.training.use_liger_kernel:
        attempt("training", check_liger_kernel)
    attempt("base_model", lambda: base.quantization)
    model = attempt("base_model", lambda: base.empty_model(row_of(recipe).auto_class, **options))
    if model is not None and config is not None:
        attempt("base_model", lambda: base.check_weights(model, fetch=False))
        attempt("base_model", lambda: base.check_groups(row_of(recipe).auto_class, model))
        if recipe.launch.strategy in DIVIDED and processes > 1:
            attempt("launch.strategy", partial(check_divisible, model, recipe.launch.strategy))
        if isinstance(task, FitsModel):
            attempt("method", lambda: task.fit_model(model, config))
        config.task_type = row_of(recipe).task_type
        new = parameters_of_heads(model) if options else []  # taken to be new
        if options and base.commit is None:  # or its files would be fetched
            new += attempt("base_model", lambda: base.missing_poolers(model)) or []
        source = find_init_adapter(recipe)

        def adapted() -> Injection:
            if source is not None:
                refuse_other_classes(options, source.recorded_options, source.folder)
                with its_base_named(source, recipe):
                    check_begin(model, config, source.header, find_weights(source.folder), new)
            injection = inject(model, config, initialised=new)
            warn_of_peft(model, config, named_tensors(model))
            return injection

        injection = attempt("method" if source is None else KEY, adapted)
        if injection is not None:
            attempt("training", lambda: parameter_groups(named_tensors(model), with_rate(recipe).training))
            found.would["parameters"] = {"trainable": injection.trainable, "all": injection.total}
            found.would["training_in_full"] = config.modules_to_save or []
        if found.errors:
            return found
        assert data is not None
        assert begun is not None
        found.would["disk"] = bytes_written(model, begun.training, plan)
        if first_auto(begun) is not None:
            fits = attempt("training", partial(choose_settings, begun, base, data, processes))
            if fits is None:
                return found
            begun = fits[0]
            found.would["chosen"] = settings_of(begun)
        if begun.training.gradient_checkpointing:
            attempt("training", partial(checkpoint_activations, model))
        if begun.training.neftune_noise_alpha is not None:
            attempt("training", partial(add_embedding_noise, model, begun.training.neftune_noise_alpha))
        needs = estimate(model, config, begun, base, data, plan_of(begun, data, processes))
        found.would["memory"] = needs and {**needs.as_dict(), "processes": processes // recipe.launch.num_machines}
    return found


def _recipe_key(key: str | None, section: str) -> str:
    """The recipe's key for an error's: a method's settings stand in the section ``method``."""
    if key is None:
        return section
    if key.startswith(section) or key.partition(".")[0] in _SECTIONS:
        return key
    return f"{section}.{key}" if section == "method" else section
