"""``model.generate`` of a model whose input virtual tokens precede."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peftcli.core.prompts.inputs import STATES, Insertion, SoftPrompt, bound, inserted, soft_prompt, takes, without
from peftcli.errors import AdapterError


def generate(model: Any, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """``model.generate``, with the virtual tokens if there are any; they are not in the answer.

    Takes and returns what ``transformers.GenerationMixin.generate`` does, and the rows' tasks if the prompt has some.
    While it runs, the ids hold a placeholder for each virtual token, a token of the row once more, for the sake of
    lengths and positions. What the caller gives to look at the ids (a streamer, processors, criteria) does not see it.
    """
    layer = soft_prompt(model)
    if layer is None:
        return model.generate(*args, **kwargs)
    inputs = {setting: False for state, setting in STATES.items() if takes(model, state)}
    inputs |= bound(model.generate, args, kwargs)
    start = None
    if not model.config.is_encoder_decoder:  # there the ids that grow are the decoder's
        inputs, start = _with_placeholders(inputs, model, layer)
        inputs = _hide_placeholders(inputs, start, layer.count)
    _refuse(inputs, model, layer)
    if task_ids is not None:
        layer.rows_of(task_ids, len(task_ids))
    before = layer.placeholders, layer.task_ids  # of a model that is its own assistant
    layer.placeholders, layer.task_ids = start, task_ids
    try:
        output = model.generate(**inputs)
    finally:
        layer.placeholders, layer.task_ids = before
    if start is None:
        return output
    if isinstance(output, torch.Tensor):
        return without(output, start, layer.count)
    output.sequences = without(output.sequences, start, layer.count)
    return output


def _setting(name: str, inputs: dict[str, Any], model: Any) -> Any:
    """Return a setting of ``generate`` from its arguments, or from the config that they give, or from the model's."""
    if name in inputs:
        return inputs[name]
    given = getattr(inputs.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _with_placeholders(inputs: dict[str, Any], model: Any, layer: SoftPrompt) -> tuple[dict[str, Any], torch.Tensor]:
    """Return arguments of ``generate`` with placeholders for the virtual tokens, and where these start in each row."""
    if inputs.get("inputs") is not None:
        inputs["input_ids"] = inputs.pop("inputs")
    ids = inputs.get("input_ids")
    if ids is None:
        raise AdapterError("generation with virtual tokens needs input_ids")
    if inputs.get("attention_mask") is None:  # as transformers infers it: pad is padding unless it is EOS too
        pad, eos = (_setting(name, inputs, model) for name in ("pad_token_id", "eos_token_id"))
        pads = pad is not None and pad not in (eos if isinstance(eos, list) else [eos])
        inputs["attention_mask"] = (ids != pad).long() if pads else torch.ones_like(ids)
    insertion = layer.insertion(inputs)
    given = {key: inputs.get(key) for key in ("input_ids", "attention_mask", "token_type_ids", "position_ids")}
    inputs |= inserted(given, insertion, _placeholder(ids, insertion, model.config))
    inputs = {key: value for key, value in inputs.items() if value is not None}
    for length in ("max_length", "min_length"):  # both count the prompt
        if value := _setting(length, inputs, model):
            inputs[length] = value + layer.count
    return inputs, insertion.start


def _placeholder(ids: torch.Tensor, insertion: Insertion, config: Any) -> torch.Tensor:
    """Return the first token of each row that is not a part of an image or sound: (B, 1)."""
    names = [f"{kind}_token_{ending}" for kind in ("image", "video", "audio") for ending in ("id", "index")]
    media = [value for name in names if (value := getattr(config, name, None)) is not None]
    is_text = ~torch.isin(ids, torch.tensor(media, dtype=ids.dtype, device=ids.device))
    is_text &= torch.arange(ids.shape[1], device=ids.device) >= insertion.start
    return ids.gather(1, is_text.long().argmax(-1, keepdim=True))


def _refuse(inputs: dict[str, Any], model: Any, layer: SoftPrompt) -> None:
    """Raise AdapterError for a way of generating that would go wrong in silence."""
    if _setting("prefill_chunk_size", inputs, model) and not layer.chunks:
        raise AdapterError("this soft prompt is read in one piece; unset it", key="prefill_chunk_size")
    if _setting("guidance_scale", inputs, model) not in (None, 1):  # its second prompt has no placeholders
        raise AdapterError("is not supported with virtual tokens; leave it unset", key="guidance_scale")
    cache = _setting("cache_implementation", inputs, model)
    if model.config.is_encoder_decoder and layer.decodes and cache is not None and "static" in cache:
        raise AdapterError(
            "a static cache has no room for the virtual tokens that an encoder-decoder's decoder reads; leave it unset",
            key="cache_implementation",
        )


def _hide_placeholders(inputs: dict[str, Any], start: torch.Tensor, count: int) -> dict[str, Any]:
    """Return the arguments with callbacks that see no placeholders, of which ``count`` begin at ``start`` (B, 1)."""

    def see(ids: torch.Tensor) -> torch.Tensor:  # a streamer gets them on the CPU
        return without(ids, start.to(ids.device), count)

    def processor(given: Any) -> Any:
        return lambda ids, scores: given(see(ids), scores)

    def criterion(given: Any) -> Any:
        return lambda ids, scores, **more: given(see(ids), scores, **more)

    changed: dict[str, Any] = {}
    for key, seeing in (("logits_processor", processor), ("stopping_criteria", criterion)):
        if given := inputs.get(key):
            # those of transformers stay, since ``generate`` tests their types
            own = [type(each).__module__.startswith("transformers.") for each in given]
            changed[key] = type(given)([x if theirs else seeing(x) for x, theirs in zip(given, own, strict=True)])
    if allowed := inputs.get("prefix_allowed_tokens_fn"):
        changed["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, without(ids[None], start[row : row + 1], count)[0]
        )
    if streamer := inputs.get("streamer"):
        changed["streamer"] = _Streamer(streamer, see)
    return inputs | changed


@dataclass
class _Streamer:
    """A streamer, which gets the prompt, (B, T), and then each new token."""

    given: Any
    see: Callable[[torch.Tensor], torch.Tensor]

    def put(self, value: torch.Tensor) -> None:
        self.given.put(self.see(value) if value.ndim > 1 else value)

    def end(self) -> None:
        self.given.end()
