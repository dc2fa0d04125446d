"""transformers' pipelines with an adapter: their answers to made-up inputs, and those of peftcli to the same."""

from __future__ import annotations

import importlib
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peftcli.data.rows import Place, Row
from peftcli.models.open import OpenBase
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions
from peftcli.tasks.pictures import noise, png
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator, generator_of
from peftcli.tasks.text.prompts import PromptForm

Answer = Mapping[str, float] | Sequence[str]
"""Numbers by their names, or words."""

_TEXTS = ("Hello", "A longer text of a few words more")
_GENERATES = "text-generation"
_NEW_TOKENS, _FILLS = 8, 5


@dataclass(frozen=True)
class _Kind:
    """A kind of pipeline, by the hub's name."""

    inputs: Callable[[Any], Sequence[dict[str, Any]]]
    """Makes up rows for a pipeline."""
    read: Callable[[Mapping[str, Any]], Answer]
    """Takes from an answer of ``predict`` what a pipeline says, too."""
    ask: Callable[[Any, Mapping[str, Any], Path], Answer]
    """Lets a pipeline answer a row, with the adapter in that folder."""


def has_pipeline(name: str, base: OpenBase) -> bool:
    """Whether transformers has a pipeline that answers as a task does."""
    tag = TASKS[name].pipeline_tag
    return tag in _KINDS or (tag == _GENERATES and not base.config.is_encoder_decoder)


def answers_of_both(
    name: str, task: Any, model: Any, other: Any, folder: Path, form_of: Callable[..., PromptForm]
) -> tuple[list[Answer], list[Answer]]:
    """The answers of peftcli to made-up inputs, and those of transformers' pipeline.

    ``model`` is peftcli's with the adapter, ``other`` transformers'; ``form_of`` is that of ``generator_of``.
    """
    tag = TASKS[name].pipeline_tag
    pipeline = _pipeline(tag, other, task.processor, getattr(task, "tokenizer", None))
    if tag == _GENERATES:
        return _continued(pipeline, generator_of(model, task.processor, form_of))
    kind = _KINDS[tag]
    given = kind.inputs(pipeline)
    rows = [Row(dict(values), Place("made up", number)) for number, values in enumerate(given, start=1)]
    with tempfile.TemporaryDirectory() as scratch:  # for answers that name files
        options = PredictOptions(beside=Path(scratch) / "answers")
        expected = list(task.predict(model, rows, options))
    prompt = getattr(task.settings, "prompt", None)
    asked = [
        values | {"ends": "reward" in answer, "prompt": prompt} for values, answer in zip(given, expected, strict=True)
    ]
    return [kind.read(answer) for answer in expected], [kind.ask(pipeline, values, folder) for values in asked]


def _pipeline(tag: str, model: Any, processor: Any, tokenizer: Any) -> Any:
    """The pipeline of transformers of a kind, with an adapter's model and what makes the model's inputs.

    ``tokenizer`` reads the outputs of a model that hears, where the processor does not.
    """
    kinds = {"special_tokens_map": "tokenizer", "sampling_rate": "feature_extractor"}
    kind = next((name for part, name in kinds.items() if hasattr(processor, part)), "image_processor")
    both = {name: getattr(processor, name, None) for name in ("tokenizer", "feature_extractor")}
    parts = both if both["feature_extractor"] else {kind: processor}
    if kind == "feature_extractor":
        parts["tokenizer"] = tokenizer
    return importlib.import_module("transformers").pipeline(tag, model=model, **parts)


def _continued(pipeline: Any, generator: TextGenerator) -> tuple[list[Answer], list[Answer]]:
    """How both continue texts. In transformers' pipeline an answer may go on behind its end, where it is cut here."""
    ours, theirs = list[Answer](), list[Answer]()
    for text in _TEXTS:
        (answer,) = generator.generate([text], GenerationSettings(max_new_tokens=_NEW_TOKENS))
        (found,) = pipeline(
            generator.form.ask(text), max_new_tokens=_NEW_TOKENS, do_sample=False, return_full_text=False
        )
        ours.append([answer.text.strip()])
        theirs.append([found["generated_text"].strip()[: len(answer.text.strip())]])
    return ours, theirs


# --- inputs -----------------------------------------------------------------------------------------------------------


def _pictures(pipeline: Any) -> Sequence[dict[str, Any]]:
    return [{"image": png(picture)} for picture in noise()]


def _sounds(pipeline: Any) -> Sequence[dict[str, Any]]:
    """Clips of noise, a second long."""
    rate = int(pipeline.feature_extractor.sampling_rate)
    noise = np.random.default_rng(0).normal(0, 0.1, (2, rate)).astype(np.float32)
    return [{"audio": {"array": samples, "sampling_rate": rate}} for samples in noise]


def _masks(pipeline: Any) -> Sequence[dict[str, Any]]:
    return [{"text": f"{text} {pipeline.tokenizer.mask_token}"} for text in _TEXTS]


# --- answers ----------------------------------------------------------------------------------------------------------


def _picture(values: Mapping[str, Any]) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(values["image"]))


def _scores(found: Sequence[Mapping[str, Any]]) -> Answer:
    """The score of each class; of a model with one output, that."""
    named = {str(each["label"]): float(each["score"]) for each in found}
    return named if len(named) > 1 else {"": next(iter(named.values()))}


def _ask_of_text(pipeline: Any, values: Mapping[str, Any], folder: Path) -> Answer:
    plain = {"function_to_apply": "none"} if pipeline.model.config.num_labels == 1 else {}
    text, tokenizer = values["text"], pipeline.tokenizer
    if values["ends"] and tokenizer(text)["input_ids"][-1] != tokenizer.eos_token_id:
        text += tokenizer.eos_token or ""  # rewards are those of whole texts
    return _scores(pipeline(text, top_k=None, **plain))


def _ask_of_picture(pipeline: Any, values: Mapping[str, Any], folder: Path) -> Answer:
    return _scores(pipeline(_picture(values), top_k=pipeline.model.config.num_labels))


def _read_scores(answer: Mapping[str, Any]) -> Answer:
    scores: Mapping[str, float] = answer.get("scores") or {"": answer.get("value", answer.get("reward"))}
    return scores if len(scores) > 1 else {"": next(iter(scores.values()))}


def _ask_of_sound(pipeline: Any, values: Mapping[str, Any], folder: Path) -> Answer:
    return _scores(pipeline(_raw(values["audio"]), top_k=pipeline.model.config.num_labels))


def _raw(sound: Mapping[str, Any]) -> dict[str, Any]:
    return {"raw": sound["array"], "sampling_rate": sound["sampling_rate"]}


def _ask_for_shares(pipeline: Any, values: Mapping[str, Any], folder: Path) -> Answer:
    found = pipeline(_picture(values), subtask="semantic")
    return {each["label"]: float((np.asarray(each["mask"]) > 0).mean()) for each in found}


def _ask_for_tags(pipeline: Any, values: Mapping[str, Any], folder: Path) -> Answer:
    """The tag of each word: that of its first piece, which may begin with the blank before it."""
    words = values["tokens"]
    pieces = pipeline(" ".join(words), aggregation_strategy="none", ignore_labels=[])
    starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    return [next(str(piece["entity"]) for piece in pieces if piece["end"] > start) for start in starts]


def _ask_for_fills(pipeline: Any, values: Mapping[str, Any], folder: Path) -> Answer:
    return {str(each["token_str"]): float(each["score"]) for each in pipeline(values["text"], top_k=_FILLS)}


def _ask_for_text(pipeline: Any, values: Mapping[str, Any], folder: Path) -> Answer:
    if not pipeline.model.can_generate():
        return [" ".join(pipeline(_raw(values["audio"]))["text"].split())]
    settings = importlib.import_module("transformers").GenerationConfig.from_pretrained(folder)
    options = {"generation_config": settings}
    if values["prompt"]:
        ids = pipeline.tokenizer.get_prompt_ids(values["prompt"], return_tensors="pt")
        options["prompt_ids"] = ids.to(pipeline.device)
    return [pipeline(_raw(values["audio"]), generate_kwargs=options)["text"].strip()]


_KINDS = {
    "text-classification": _Kind(lambda _: [{"text": text} for text in _TEXTS], _read_scores, _ask_of_text),
    "token-classification": _Kind(
        lambda _: [{"tokens": text.split()} for text in _TEXTS], lambda answer: answer["tags"], _ask_for_tags
    ),
    "fill-mask": _Kind(
        _masks, lambda answer: {each["token"]: each["score"] for each in answer["fills"][0]}, _ask_for_fills
    ),
    "image-classification": _Kind(_pictures, _read_scores, _ask_of_picture),
    "audio-classification": _Kind(_sounds, _read_scores, _ask_of_sound),
    "image-segmentation": _Kind(_pictures, lambda answer: answer["shares"], _ask_for_shares),
    "automatic-speech-recognition": _Kind(_sounds, lambda answer: [answer["text"]], _ask_for_text),
}
