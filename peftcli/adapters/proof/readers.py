"""Other libraries that load an adapter: compare what they say with peftcli, and name what a difference comes from."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from peftcli.adapters.export.ask import ASK
from peftcli.adapters.export.write import export_adapter
from peftcli.adapters.load import AdapterSource
from peftcli.adapters.merge import merge_adapter
from peftcli.adapters.proof.sketches import difference, hash_of, sketch
from peftcli.core.files import CONFIG_FILE, WEIGHTS_FILE, read_tensors
from peftcli.core.quantised import is_quantised, keep_layout
from peftcli.data.rows import Place, Row
from peftcli.errors import AdapterError, PeftcliError, UsageError
from peftcli.guard.files import one_line
from peftcli.models import tokens
from peftcli.models.diffusion import quiet_diffusers
from peftcli.models.guarded import quiet
from peftcli.models.open import OpenBase
from peftcli.tasks import DIFFUSERS_FILE, PIPELINE_PARTS, TASK_FILE
from peftcli.tasks.base import Batch, Exports, PredictOptions, Predicts, Probes, Task, reader_of_texts
from peftcli.tasks.pipelines import Answer, answers_of_both, has_pipeline
from peftcli.tasks.scores import scores_on

READERS = {
    "peft": ("peft",),
    "transformers": ("transformers", "peft"),
    "transformers-pipeline": ("transformers", "peft"),
    "sentence-transformers": ("sentence_transformers",),
    "diffusers": ("diffusers", "peft"),
    "llama.cpp": ("xllamacpp", "gguf"),
    "mlx": ("mlx_lm", "mlx"),
    "mistralrs": ("mistralrs",),
}
"""Readers of an adapter, or of the merged model -> the packages that each takes."""

_TOLERANCE, _TOLERANCE_MERGED, _TOLERANCE_QUANTISED = 1e-4, 0.002, 0.1
"""Largest difference of the model's outputs, as a share of their deviation, that another library explains. Quantised
layers may round their inputs, and with them another order of sums: seen was 0.03."""
_TEXTS = ("Hello", "A longer text, beside which the first one is padded.")
"""What readers of texts are compared by."""
_Blame = tuple[str, str]
"""The file that a difference comes from, and what is known of it."""
_Compared = tuple[float, Callable[[], _Blame]]
"""A difference, and what finds its blame."""


def require_readers(readers: Sequence[str]) -> None:
    """Check that readers are known and installed.

    Raises:
        UsageError: one is not; names the package.
    """
    for reader in readers:
        if reader not in READERS:
            raise UsageError(f"{reader!r} is not one of {', '.join(READERS)}", key="--with")
        missing = [each for each in READERS[reader] if importlib.util.find_spec(each) is None]
        if missing:
            package = missing[0].replace("_", "-")
            hint = f"pip install {package}"
            raise UsageError(f"{reader} needs the package {package}", key="--with", hint=hint)


def compare_reader(reader: str, source: AdapterSource, opened: OpenBase, task: Task[Any], model: Any) -> float:
    """Load an adapter with another library, and compare what it says with what peftcli says.

    ``model`` is peftcli's with the adapter, in float32: a reader rounds an adapter's weights to the number format of
    the base model.

    Returns:
        The largest difference, as a share of the outputs' deviation.

    Raises:
        AdapterError: the reader cannot load it, or says something else; names the file that is to blame.
        UsageError: the library has no place for such adapters.
    """
    find = {
        "sentence-transformers": _compare_exported,
        "diffusers": _compare_pictures,
        "transformers-pipeline": _compare_answers,
        **dict.fromkeys(ASK, _compare_program),
    }.get(reader, _compare_pictures if opened.is_pipeline and reader == "peft" else _compare_outputs)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the reader: whether it loads the same model is what is compared
            found, blame = find(reader, source, opened, task, model)
    except PeftcliError:
        raise
    except Exception as error:
        text = one_line(" ".join(str(error).split()) or type(error).__name__)
        message = f"{reader} cannot use it: {text}"
        raise AdapterError(message, file=str(source.folder), key=f"--with {reader}") from error
    allowed = _TOLERANCE_MERGED if reader == "sentence-transformers" else _TOLERANCE
    if any(is_quantised(module) for module in model.modules()):
        allowed = _TOLERANCE_QUANTISED
    if not found <= allowed:
        file, more = blame()
        what = f"loaded by {reader}, the model's outputs differ by {found:.2g} of their deviation{more}"
        raise AdapterError(what, file=file, key=f"--with {reader}")
    return found


def _compare_outputs(reader: str, source: AdapterSource, opened: OpenBase, task: Task[Any], model: Any) -> _Compared:
    if not isinstance(task, Probes):
        raise UsageError(f"the task has no inputs to compare readers with: {source.task}", key="--with")
    other, inputs = _load_with(reader, source, opened, task).to(model.device).eval(), task.probe()
    return _difference_of_outputs(other, model, inputs), lambda: _blame(source, opened, model, other, inputs)


def _compare_answers(reader: str, source: AdapterSource, opened: OpenBase, task: Task[Any], model: Any) -> _Compared:
    """Compare the answers of transformers' pipeline with those of ``predict``."""
    if source.task is None or not has_pipeline(source.task, opened):
        message = f"transformers has no pipeline that answers as {source.task} does"
        raise UsageError(message, file=str(source.folder), key=f"--with {reader}")
    other = _load_with("transformers", source, opened, task).to(model.device).eval()

    def blame() -> _Blame:
        assert isinstance(task, Probes)
        inputs = task.probe()
        if _difference_of_outputs(other, model, inputs) > _TOLERANCE:
            return _blame(source, opened, model, other, inputs)
        return str(source.folder / TASK_FILE), ", though its model is the same: names or processor are others"

    both = answers_of_both(source.task, task, model, other, source.folder, source.prompt_form)
    return _difference_of_answers(*both), blame


def _difference_of_outputs(other: Any, model: Any, inputs: Batch) -> float:
    """The difference of what two models say of the same inputs."""
    now, expected = (sketch(scores_on(each, inputs, bf16=False)) for each in (other, model))
    return difference(now, expected)


def _difference_of_answers(expected: Sequence[Answer], now: Sequence[Answer]) -> float:
    """The difference of numbers that answers hold; of words the share of answers that differ."""
    numbers = [[each for each in those if isinstance(each, Mapping)] for those in (now, expected)]
    if not numbers[1]:
        return sum(one != other for one, other in zip(now, expected, strict=True)) / len(expected)
    names = sorted({name for those in numbers for each in those for name in each})
    both = (torch.tensor([[each.get(name, 0.0) for name in names] for each in those]) for those in numbers)
    return difference(*map(sketch, both))


def _load_with(reader: str, source: AdapterSource, opened: OpenBase, task: Task[Any]) -> Any:
    """Load base model and adapter with another library, in float32, over the same quantised weights if there are any.

    For PEFT the base model has rows for new tokens.
    """
    auto = source.auto_class(lambda: opened.config)
    transformers = importlib.import_module("transformers")
    if not hasattr(transformers, auto):
        raise UsageError(f"{reader} loads no {auto}", file=str(source.folder), key=f"--with {reader}")
    if reader == "transformers":
        _refuse_other_adapters(opened.empty_model(auto, **source.recorded_options), source)
        # a base model's head for other classes is replaced by the adapter's
        known: dict[str, Any] = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "use_kernels": False}
        options = {**known, **source.recorded_options}
        if opened.spec.quantization:
            options["quantization_config"] = opened.quantization_config(auto, torch.float32, **source.recorded_options)
        model = getattr(transformers, auto).from_pretrained(source.folder, **options)
        keep_layout(model)
        return model
    base = opened.model(auto, torch.float32, **source.recorded_options).model
    keep_layout(base)
    if source.has_tokenizer and hasattr(reads := reader_of_texts(task.processor), "get_vocab"):
        tokens.fit_tokenizer(base, reads, source.folder)
    return importlib.import_module(reader).PeftModel.from_pretrained(base, source.folder)


def _refuse_other_adapters(model: Any, source: AdapterSource) -> None:
    """Raise UsageError for a class whose ``load_adapter`` loads something else than PEFT's adapters, as languages."""
    if type(model).load_adapter is not importlib.import_module("transformers").PreTrainedModel.load_adapter:
        message = f"transformers' {type(model).__name__} loads no adapters of PEFT: its own ones have their place"
        raise UsageError(message, file=str(source.folder), key="--with transformers")


def _compare_exported(reader: str, source: AdapterSource, opened: OpenBase, task: Task[Any], model: Any) -> _Compared:
    """Compare what the merged model answers in sentence-transformers with the answers of ``predict``."""
    if not (isinstance(task, Exports) and isinstance(task, Predicts)):
        message = f"the merged model of {source.task} is not one of {reader}"
        raise UsageError(message, file=str(source.folder), key=f"--with {reader}")
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        merge_adapter(str(source.folder), merged, base=source.base_name, dtype="float32")
        asked, now = task.ask_exported(merged, _TEXTS)
    rows = [Row(values, Place("made up", number)) for number, values in enumerate(asked, start=1)]
    expected = torch.tensor([next(iter(answer.values())) for answer in task.predict(model, rows, PredictOptions())])
    blamed = (
        str(source.folder / TASK_FILE),
        ": pooling or norm, or the activation of scores, since merging itself has compared the models",
    )
    return difference(sketch(torch.as_tensor(now).float()), sketch(expected)), lambda: blamed


def _compare_program(reader: str, source: AdapterSource, opened: OpenBase, task: Task[Any], model: Any) -> _Compared:
    """Compare what a program that is not in Python answers to prompts, in the form that it reads, with ``generate``."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        written = export_adapter(str(source.folder), folder, program=reader, base=source.base_name, numbers="f32")
    replayed = written["replayed"]
    blamed = str(source.folder / WEIGHTS_FILE), ": its answers are others"
    return 1 - replayed["same_answers"] / replayed["answers"], lambda: blamed


def _compare_pictures(reader: str, source: AdapterSource, opened: OpenBase, task: Task[Any], model: Any) -> _Compared:
    """Compare a picture of diffusers' pipeline, with the adapter in a form for other readers, with one of peftcli.

    diffusers reads its own file, and PEFT the folder of each part.
    """
    forms = [DIFFUSERS_FILE] if reader == "diffusers" else [f"{part}/{WEIGHTS_FILE}" for part in PIPELINE_PARTS]
    there = [name for name in forms if (source.folder / name).is_file()]
    if not there:
        message = f"has no {forms[0]}, which {reader} would load"
        raise UsageError(message, file=str(source.folder), key=f"--with {reader}")
    diffusers, peft = importlib.import_module("diffusers"), importlib.import_module("peft")
    given: dict[str, Any] = {"prompt": _TEXTS[0], "num_inference_steps": 2, "output_type": "np"}
    with quiet_diffusers():
        theirs = diffusers.DiffusionPipeline.from_pretrained(opened.folder, use_safetensors=True)
        theirs.set_progress_bar_config(disable=True)
        for name in there:
            if name == DIFFUSERS_FILE:
                theirs.load_lora_weights(source.folder, weight_name=name)
            else:
                part = name.partition("/")[0]
                setattr(theirs, part, peft.PeftModel.from_pretrained(getattr(theirs, part), source.folder / part))
        now, expected = (
            sketch(torch.from_numpy(each(**given, generator=torch.Generator().manual_seed(0)).images))
            for each in (theirs.to(model.device, model.compute_dtype), model.pipeline)
        )
    return difference(now, expected), lambda: _blame_form(source, task, there)


# --- what is to blame -------------------------------------------------------------------------------------------------


def _blame(source: AdapterSource, opened: OpenBase, model: nn.Module, other: Any, inputs: Batch) -> _Blame:
    """Name what another library's model lacks: a tensor of the adapter, or of the base model; else the config."""
    first = _first_difference(model, other, inputs)
    where = f", first those of {first}" if first else ""
    held = {hash_of(value.float()) for value in (*other.parameters(), *other.buffers())}
    tensors = read_tensors(source.folder)
    own = {name: value for name, value in tensors.items() if name.startswith(f"{source.config.file_prefix}{first}.")}
    below = dict(model.get_submodule(first).named_parameters(prefix=first)) if first else {}
    for file, candidates in ((source.folder / WEIGHTS_FILE, own or tensors), (Path(opened.name), below)):
        for name, value in candidates.items():
            if hash_of(value.float()) not in held:
                return str(file), f"{where}: it lacks {name}"
    return str(source.folder / CONFIG_FILE), where


def _first_difference(model: nn.Module, other: Any, inputs: Batch) -> str | None:
    """The first module, of those that two models have in common, whose outputs differ."""
    inner = other.get_base_model() if hasattr(other, "get_base_model") else other
    expected, found = _outputs(model, model, inputs), _outputs(other, inner, inputs)
    both = [path for path in expected if path in found]
    return next((path for path in both if not difference(found[path], expected[path]) <= _TOLERANCE), None)


def _outputs(model: nn.Module, within: nn.Module, inputs: Batch) -> dict[str, Any]:
    """Sketches of what the modules within a model give, by their paths, in the order in which they are done."""
    found = dict[str, Any]()

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found.setdefault(path, sketch(output))

        return hook

    hooks = [module.register_forward_hook(keep(path)) for path, module in within.named_modules() if path]
    try:
        scores_on(model, inputs, bf16=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _blame_form(source: AdapterSource, task: Task[Any], forms: Sequence[str]) -> _Blame:
    """Name the tensor that differs between the adapter and its files for other readers, else such a file."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copy(source.folder / name, scratch)
        task.save(Path(scratch))
        for form in forms:
            paths = (Path(folder) / form for folder in (source.folder, scratch))
            now, expected = (load_file(path) if path.is_file() else {} for path in paths)
            for name, value in expected.items():
                if name not in now or not torch.equal(now[name], value):
                    return str(source.folder / form), f": {name} is not that of {WEIGHTS_FILE}"
    return str(source.folder / forms[0]), ""
