"""Fold an adapter into its base model and write a checkpoint that transformers loads alone.

A base model in safetensors is streamed: one tensor is in memory at a time, also while it is written. Any other base
model (GGUF, or a checkpoint whose tensors are named unlike the model's) is loaded whole.

An adapter that was trained on a quantised base model is merged into the full-precision one, and verified against it:
what quantisation took from the base model is nothing that merging could lose.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from peftcli.adapters.float32 import computing_in_float32
from peftcli.adapters.load import AdapterSource, apply_adapter, find_adapter, other_base
from peftcli.core.files import content_of, load_adapter
from peftcli.core.inject import is_reshaped
from peftcli.core.layer import AdapterLayer, base_module, model_ends, modules_sharing
from peftcli.core.merge import merge, outermost
from peftcli.core.weights import base_weights
from peftcli.errors import AdapterError, ModelError, UsageError, to_peftcli_error
from peftcli.guard.files import read_json_object
from peftcli.guard.safetensors_header import TensorEntry
from peftcli.models import tokens
from peftcli.models.conversions import renaming_of_older
from peftcli.models.open import OpenBase, open_base
from peftcli.models.quantization import forget
from peftcli.schema import BaseModel
from peftcli.system.disk import write_file
from peftcli.system.outputs import expand_user, new_folder, require_empty, storage_errors
from peftcli.system.secrets import redact_values
from peftcli.tasks.base import Exports, Probes, Task, on_device, scores_of
from peftcli.tasks.text.stop_tokens import missing_stops

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
"""Largest difference of outputs that rounding the merged weights explains, as a share of the outputs' deviation."""
_SMALLEST = 0.1
"""Outputs that are smaller in the mean are compared as if they were as large: they may be small by chance."""
_MAX_GENERATION_CONFIG = 1_000_000
"""Bytes. Whisper's has 4,000."""
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Of models that read pictures or sounds."""
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class _Job:
    """What is merged into what."""

    source: AdapterSource
    base: OpenBase
    auto_class: str
    options: dict[str, Any]
    """What the base model's config says otherwise, as ``num_labels``."""
    dtype: torch.dtype | None
    """Of the result; None: the base model's own."""
    dequantise: bool
    """Whether the base model is quantised, and is to be made dense."""
    task: Task[Any] | None
    """The adapter's, where it is known."""

    def load(self, dtype: torch.dtype) -> nn.Module:
        """Load the base model with the adapter in it."""
        loaded = self.base.model(self.auto_class, dtype, **self.options)
        apply_adapter(loaded, self.source)
        return loaded.model


def merge_adapter(
    adapter: str,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    verify: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write base model + adapter to ``output`` as one plain checkpoint with its tokenizer.

    ``base`` is used in place of the base model that the adapter names; ``dtype`` None keeps the base model's. With
    ``dequantize`` the weights of a quantised base model are made dense: one that is stored so, or the one that the
    adapter was trained on. With ``verify`` the merged model's outputs are compared with those of base and adapter.

    Returns:
        What was written: folder, shards, bytes, dtype, untied, max_logit_difference and what it was found on.

    Raises:
        AdapterError: the adapter cannot be merged, does not fit, its base model is stored quantised, or the outputs
            differ.
        ModelError: the base model cannot be read.
        UsageError: the output folder holds something.
        StorageError: it cannot be written.
    """
    output = expand_user(output)
    require_empty(output)
    _refuse_name(output)
    source = find_adapter(adapter, base)
    command = shlex.join(["peftcli", "merge", adapter, "--output", str(output), *(["--dtype", dtype] if dtype else [])])
    job = _open_job(source, dtype, dequantize, command)
    name, trained = job.base.spec.name, source.base.quantization
    with new_folder(output) as partial, _reading(name):
        tell(f"merging into {name}")
        if odd := other_base(source, job.base.spec):
            tell(f"warning: {odd}")
        if trained and not dequantize:
            tell(f"it was trained on {trained.type} weights; these are the full-precision ones")
        untied = None if dequantize else _stream(job, partial, tell)
        if untied is None:
            untied = _merge_whole(job, partial)
        _write_companions(job, partial, untied)
        compared = _verify(job, partial, tell) if verify else None
    shards = [shard.stat().st_size for shard in output.rglob("*.safetensors")]
    stored_in = open_base(BaseModel(name=str(output))).config.dtype
    return {
        "output": str(output),
        "dtype": str(stored_in).removeprefix("torch.") if stored_in else None,
        "shards": len(shards),
        "bytes": sum(shards),
        "base_model": name,
        "untied": untied,
        "max_logit_difference": compared and compared.largest,
        "logit_spread": compared and compared.spread,
        "positions": compared and compared.positions,
        "same_tokens": compared and compared.same_tokens,
    }


def _open_job(source: AdapterSource, dtype: str | None, dequantize: bool, command: str) -> _Job:
    """Open the base model that the adapter is merged into, and refuse what cannot be merged."""
    if reason := source.config.merge_problem():
        raise AdapterError(reason, file=str(source.folder))
    source.config.inference_mode = True
    spec = source.base
    same_base = f"{command} --base {shlex.quote(source.base_name)}" if source.base_name else command
    if source.record.get("makes_up_for_quantization") and not dequantize:
        raise AdapterError(
            f"it corrects the error of the quantised weights of {spec.name}, and fits no others",
            hint=f"merge into those weights, made dense: {same_base} --dequantize",
        )
    if dequantize:
        base = open_trained_base(source)
    else:
        base = open_base(replace(spec, quantization=None), processors=source.folder)
    how = base.quantization
    if how and not dequantize:
        raise AdapterError(
            f"{base.name} is stored quantised ({how['type']}), and rounding the merged weights again would lose "
            "much of what was learned",
            hint=f"merge into the full-precision model that it was made of: {command} --base MODEL\n"
            f"or into its own weights, made dense: {same_base} --dequantize",
        )
    if dequantize and not how:
        raise UsageError(f"{base.name} is not quantised", key="--dequantize")
    return _Job(
        source,
        base,
        source.auto_class(lambda: base.config),
        source.model_options(base),
        getattr(torch, dtype) if dtype else None,
        dequantize,
        source.open_task(base),
    )


def open_trained_base(source: AdapterSource, processors: Path | None = None) -> OpenBase:
    """Open the base model, quantised as it was trained, also where another place is given for it.

    ``processors`` is the folder of the adapter's own processor, by default the adapter's.
    """
    processors = processors or source.folder
    opened = open_base(source.base, processors=processors)
    if opened.quantization or not source.trained_quantization:
        return opened
    return open_base(replace(source.base, quantization=source.trained_quantization), processors=processors)


def _refuse_name(output: Path) -> None:
    try:
        os.path.realpath(output).encode()
    except UnicodeEncodeError:
        raise UsageError(
            "has a name that is not UTF-8; safetensors cannot write there", file=str(output), key="--output"
        ) from None


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Inside, an error of a file is the base model's; what is written has its own (``storage_errors``)."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"cannot read {name}: {error}", key="base_model") from None
    except OSError as error:
        raise ModelError(f"cannot read {error.filename or name}: {error.strerror or error}", key="base_model") from None


def _stream(job: _Job, output: Path, tell: Callable[[str], None]) -> bool | None:
    """Merge shard by shard; return whether embeddings were untied, None when this base model cannot be streamed."""
    shards = job.base.shards
    if not shards:
        return None
    places = {key: shard for shard, header in shards.items() for key in header}
    model = job.base.empty_model(job.auto_class, **job.options)
    longer = _grow_embeddings(model, job)
    shapes = {name: tuple(value.shape) for name, value in _every_tensor(model)}
    rename = renaming_of_older(model)
    # real weights, into a model on the meta device
    load_adapter(model, job.source.config, job.source.folder, rename=rename)
    layers = outermost(model)
    if longer is None or is_reshaped(model) or base_weights(model).keys() & {*map(rename, job.source.header)}:
        return None  # its tensors are not the checkpoint's
    parents = {f"{path}.{leaf}": path for path, layer in layers.items() for leaf in _base_leaves(layer)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    rows = {key: longer[name] for name, key in _checkpoint_keys(list(longer), set(places), prefix).items()}
    keys = _checkpoint_keys(list(parents), set(places), prefix)
    sharers = _to_untie(model, layers, places, prefix)
    parents |= {each.name: each.path for each in sharers}
    keys |= {each.name: each.source for each in sharers}
    if any(key not in places for key in keys.values()):
        return None  # the checkpoint names its tensors otherwise
    stored = {key: entry.shape for header in shards.values() for key, entry in header.items()}
    if any(tuple(stored[key]) != shapes.get(name) for name, key in keys.items() if key not in rows):
        return None  # as the head of a base model for another number of classes
    new = {each.name for each in sharers if each.source == each.embedding}
    names = {key: name for name, key in keys.items() if name not in new}
    merged = _MergedTensors(job.base.spec.name, layers, parents, keys, names, places, rows, job.dtype)
    if all(torch.equal(merged.of_key(each.embedding), merged.of_sharer(each)) for each in sharers):
        sharers = []  # changed alike: they stay tied
    index: dict[str, str] = {}
    for number, (shard, header) in enumerate(shards.items(), 1):
        tell(f"shard {number} of {len(shards)}")
        tensors = {key: (merged.entry(key, entry), partial(merged.of_key, key)) for key, entry in header.items()}
        for each in sharers:
            if each.name in new and each.source in header:
                tensors[each.name] = (tensors[each.source][0], partial(merged.of_sharer, each))
        index |= dict.fromkeys(tensors, shard.name)
        write_file(output / shard.name, content_of(tensors))
    if len(shards) > 1:
        described = {"metadata": {}, "weight_map": dict(sorted(index.items()))}
        _write_json(output / "model.safetensors.index.json", described)
    return bool(sharers)


@dataclass(frozen=True)
class _Sharer:
    """A module, the output head for one, that shares its weight with the input embedding, and must not any more."""

    path: str
    name: str
    """Its weight's name in the model and in the merged checkpoint."""
    source: str
    """Its weight's key in the base checkpoint: the embedding's, which holds the weight of all, where it has none."""
    embedding: str
    """The embedding's key."""


@dataclass(frozen=True)
class _MergedTensors:
    """The tensors of the merged checkpoint, each read and merged when it is asked for."""

    base: str
    """The base model's name."""
    layers: dict[str, AdapterLayer]
    parents: dict[str, str]
    keys: dict[str, str]
    names: dict[str, str]
    places: dict[str, Path]
    rows: dict[str, int]
    """Key -> how many rows it has in the merged checkpoint, where these are more."""
    dtype: torch.dtype | None

    def entry(self, key: str, stored: TensorEntry) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor of the merged checkpoint, as safetensors names them."""
        shape = (self.rows[key], *stored.shape[1:]) if key in self.rows else stored.shape
        is_float = stored.dtype.startswith(("F", "BF"))
        return (_DTYPE_NAMES[self.dtype] if is_float and self.dtype else stored.dtype), shape

    def of_key(self, key: str) -> torch.Tensor:
        """The tensor of the merged checkpoint called ``key``."""
        value = self._base(key)
        return _cast(self._merged(self.names[key], value) if key in self.names else value, value, self.dtype)

    def of_sharer(self, sharer: _Sharer) -> torch.Tensor:
        """The merged weight of a module to untie."""
        value = self._base(sharer.source)
        return _cast(self._merged(sharer.name, value), value, self.dtype)

    def _base(self, key: str) -> torch.Tensor:
        """A tensor of the base checkpoint. Its file is opened for it alone: what is mapped of it takes memory."""
        with _reading(self.base), safe_open(self.places[key], framework="pt") as file:
            value: torch.Tensor = file.get_tensor(key)
        return tokens.grown(value, self.rows[key]) if key in self.rows else value

    def _merged(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The merged tensor called ``name`` in the model, whose base value is ``value``."""
        path = self.parents[name]
        layer, leaf = self.layers.get(path), name[len(path) + 1 :]
        if layer is None:
            return value
        base = {leaf: value}
        for other in _base_leaves(layer):
            key = self.keys.get(f"{path}.{other}")
            if other not in base and key is not None:
                base[other] = self._base(key)
        with torch.no_grad():
            merged = layer.folded(base).get(leaf, value)
        if not torch.isfinite(merged).all():
            raise AdapterError(f"{name} is not finite after merging")
        return merged


def _grow_embeddings(model: nn.Module, job: _Job) -> dict[str, int] | None:
    """Let the empty model hold the adapter's tokens; return the rows of each tensor that got more.

    None: a tensor changed in another way.
    """
    before = {name: value.shape for name, value in _every_tensor(model)}
    if not tokens.fit_adapter(model, job.source.config, job.source.header):
        return {}
    changed = {name: value.shape for name, value in _every_tensor(model) if value.shape != before[name]}
    rows_only = all(shape[1:] == before[name][1:] for name, shape in changed.items())
    return {name: shape[0] for name, shape in changed.items()} if rows_only else None


def _every_tensor(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _base_leaves(layer: AdapterLayer) -> list[str]:
    return [*base_module(layer).state_dict()]


def _checkpoint_keys(names: list[str], keys: set[str], prefix: str) -> dict[str, str]:
    """Name in the model -> key in the checkpoint, which may have or lack the model's outer prefix."""
    return {
        name: next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in keys), name)
        for name in names
    }


def _to_untie(model: nn.Module, layers: dict[str, AdapterLayer], places: dict[str, Path], prefix: str) -> list[_Sharer]:
    """The modules to untie: they share their weight with the embedding, and the adapter changes it or the head."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return []
    paths = {id(module): name for name, module in model.named_modules()}
    ends = model_ends(model)
    embedding, head = (paths.get(id(module)) for module in ends)
    if embedding is None or head is None or not {embedding, head} & set(layers):
        return []
    sharing = modules_sharing(model, base_module(ends[0]))
    keys = _checkpoint_keys([f"{name}.weight" for name in (embedding, *sharing)], set(places), prefix)
    shared = keys[f"{embedding}.weight"]
    own = {name: keys[f"{name}.weight"] for name in sharing}
    return [_Sharer(name, f"{name}.weight", key if key in places else shared, shared) for name, key in own.items()]


def _merge_whole(job: _Job, output: Path) -> bool:
    model: Any = job.load(job.dtype or _dtype_of(job.base.config))
    untied = merge(model, job.source.config, dequantise=job.dequantise)
    if job.dequantise:
        forget(model)
    if untied:
        model.config.tie_word_embeddings = False
    with storage_errors(output):
        model.save_pretrained(output)
    return untied


def _write_companions(job: _Job, output: Path, untied: bool) -> None:
    """Config, generation config, processor, and what other readers need. A pipeline has written its own."""
    if job.base.is_pipeline:
        return
    saved = (output / "config.json").exists()  # with the whole model, whose layers may be other ones than the base's
    config = copy.deepcopy(open_base(BaseModel(name=str(output))).config if saved else job.base.config)
    empty = job.base.empty_model(job.auto_class, **job.options)
    if rows := tokens.fit_adapter(empty, job.source.config, job.source.header):
        config.get_text_config().vocab_size = rows
    for key, value in job.options.items():
        setattr(config, key, value)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if untied:
        config.tie_word_embeddings = False
    with storage_errors(output):
        config.dtype = job.dtype or _stored_dtype(output)
    path = output / "config.json"
    with storage_errors(path):
        config.save_pretrained(output)
        described = json.loads(path.read_bytes())
    described.setdefault("architectures", [type(empty).__name__])
    rope = described.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # readers that know only the older key
        described.setdefault("rope_theta", rope["rope_theta"])
    _write_json(path, described)
    processor: Any = None
    if job.task is not None:
        processor = job.task.processor
    elif _reads_tokens(empty) or job.source.has_tokenizer or job.base.file("tokenizer_config.json"):
        processor = job.base.processor()
    if hasattr(processor, "pad_token") and "pad_token_id" in job.options and processor.pad_token_id is None:
        processor.pad_token = processor.convert_ids_to_tokens(job.options["pad_token_id"])
    with storage_errors(output):
        if processor is not None:
            tokens.save_processor(output, processor)
        if not any((output / name).exists() for name in _PROCESSOR_FILES):  # what reads texts alone writes none
            for own in filter(None, map(job.base.file, _PROCESSOR_FILES)):
                (output / own.name).write_bytes(own.read_bytes())
        if empty.can_generate():
            _save_generation_config(job, output, processor, config)
        if isinstance(job.task, Exports):
            job.task.export(output)


def _save_generation_config(job: _Job, output: Path, processor: Any, config: Any) -> None:
    """The adapter's generation config, else the base model's with the tokens that the adapter's answers end with.

    Without a processor, which knows these tokens, the base model's as it is.
    """
    from transformers import GenerationConfig

    path = output / "generation_config.json"
    if (own := job.source.folder / path.name).is_file():
        _write_json(path, read_json_object(own, _MAX_GENERATION_CONFIG))
        return
    if theirs := job.base.file(path.name):
        path.write_bytes(theirs.read_bytes())
    if processor is None:
        return
    made = GenerationConfig.from_model_config(config)
    named = json.loads(path.read_bytes()).get("eos_token_id") if path.exists() else made.eos_token_id
    reads = getattr(processor, "tokenizer", processor)
    form = job.source.prompt_form(has_template=bool(reads.chat_template), decoder_only=not config.is_encoder_decoder)
    stops = missing_stops(reads, named, chat=form.chat)
    if not stops:
        return
    if not path.exists():
        made.save_pretrained(output)
    _write_json(path, {**json.loads(path.read_bytes()), "eos_token_id": stops if len(stops) > 1 else stops[0]})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with storage_errors(path):
        path.write_text(json.dumps(redact_values(data), indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class _Comparison:
    """How the merged model's outputs for a small batch differ from those of base model + adapter."""

    largest: float
    """The largest difference of two outputs."""
    allowed: float
    """The largest that rounding explains."""
    spread: float
    """The standard deviation of the outputs."""
    positions: int
    """Of a language model, the tokens after which the outputs were compared; else the rows."""
    same_tokens: int | None
    """After how many of them the likeliest token is the same; None: the model is no language model."""


def _verify(job: _Job, output: Path, tell: Callable[[str], None]) -> _Comparison | None:
    """Do as ``_compare``; return None where neither the adapter's task is known nor what the model reads."""
    try:
        if job.task is None and not _reads_tokens(job.base.empty_model(job.auto_class, **job.options)):
            raise _InputsUnknown
        return _compare(job, output, tell)
    except _InputsUnknown:
        tell(
            f"not verified: the adapter's task is not known, so {job.auto_class} gets no inputs to compare its outputs"
        )
        return None


class _InputsUnknown(Exception):
    """The adapter's task is not known, and its model does not take token ids alone."""


def _compare(job: _Job, output: Path, tell: Callable[[str], None]) -> _Comparison:
    """Compare the outputs of the merged model with those of base model + adapter, both in float32.

    Weights stay as they are stored while that works; otherwise they are loaded in float32.
    """
    written = open_base(BaseModel(name=str(output)))
    # a quantised model computes in a dtype of its own
    tolerance = 0.15 if job.dequantise else _TOLERANCE.get(_dtype_of(written.config), 0.15)
    dtypes = None if job.dequantise else (_one_dtype(job.base), _one_dtype(written))
    if dtypes and all(dtypes):
        with suppress(RuntimeError, _InputsUnknown):  # of a model that reads a weight without calling its module
            found = _difference(job, written, dtypes, tolerance, tell)
            if found.largest <= found.allowed:
                return found
    found = _difference(job, written, (torch.float32, torch.float32), tolerance, tell)
    if not found.largest <= found.allowed:
        raise AdapterError(
            f"the merged model's outputs differ by {found.largest:.3g}, where their spread is {found.spread:.3g}, and "
            f"rounding explains {found.allowed:.3g}; nothing was written"
        )
    return found


@torch.inference_mode()
def _difference(
    job: _Job, written: OpenBase, dtypes: tuple[Any, Any], tolerance: float, tell: Callable[[str], None]
) -> _Comparison:
    """Compare outputs computed in float32 with weights of these dtypes."""
    tell("verifying: base model with adapter")
    model: Any = job.load(dtypes[0]).eval()
    try:
        rows = job.task.probe() if isinstance(job.task, Probes) else _random_tokens(model)
    except ModelError:  # of a class that several tasks have, whose processor is not this one's
        raise _InputsUnknown from None
    padded = getattr(getattr(model, "config", None), "pad_token_id", None) is not None
    inputs = rows if padded else {name: value[:1] for name, value in rows.items()}  # classifiers take no more then
    with computing_in_float32(model):
        try:
            expected = scores_of(model(**on_device(inputs, model.device))).cpu()
        except Exception as error:  # of whatever kind a model raises that lacks an input
            if job.task is not None or to_peftcli_error(error) is not None:
                raise
            raise _InputsUnknown from error
    writes_tokens = isinstance(model, nn.Module) and model_ends(model)[1] is not None
    del model
    gc.collect()  # its modules refer to one another
    tell("verifying: merged model")
    merged = written.model(job.auto_class, dtypes[1]).model.eval()
    with computing_in_float32(merged):
        found = scores_of(merged(**on_device(inputs, merged.device))).cpu()
    size = max(_SMALLEST, float(expected.square().mean().sqrt()))  # of small outputs, as a regression's
    spread = float(expected.std(correction=0)) if expected.numel() > 1 else size
    return _Comparison(
        largest=float((found - expected).abs().max()),
        allowed=tolerance * min(size, max(1.0, spread) if expected.numel() > 1 else size),
        spread=spread,
        positions=expected.shape[:-1].numel() if writes_tokens else len(expected),
        same_tokens=int((found.argmax(-1) == expected.argmax(-1)).sum()) if writes_tokens else None,
    )


def _one_dtype(base: OpenBase) -> torch.dtype | None:
    """The dtype of all of a checkpoint's tensors, if it is one in which weights are usually stored."""
    names = {entry.dtype for header in base.shards.values() for entry in header.values()}
    return next((dtype for dtype, name in _DTYPE_NAMES.items() if names == {name}), None)


def _reads_tokens(model: Any) -> bool:
    """Return whether a model whose task is not known reads a text, and no picture or sound."""
    return bool(model.main_input_name == "input_ids")


def _random_tokens(model: Any) -> dict[str, torch.Tensor]:
    """Return a batch to compare models with whose task is not known."""
    rows = base_module(model.get_input_embeddings()).weight.shape[0]
    ids = torch.randint(rows, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def _cast(value: torch.Tensor, like: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """``value`` in ``dtype``, or in that of ``like``; what is no floating-point number stays as it is."""
    return value.to(dtype or like.dtype).contiguous() if like.is_floating_point() else value


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the largest tensor in the folder's first shard."""
    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as file:
        slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 - safe_open is no mapping
        largest = max(slices, key=lambda each: torch.Size(each.get_shape()).numel())
        return largest[:1].dtype if largest.get_shape() else torch.float32


def _dtype_of(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
