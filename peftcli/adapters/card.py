"""The adapter's model card: README.md with YAML front matter, as the hub reads it. The same run gives the same text."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from peftcli.adapters.load import AdapterSource, is_hub_id
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import CONFIG_FILE, read_config, read_run
from peftcli.guard.files import one_line, read_errors, read_small
from peftcli.guard.typed_fields import mapping_at
from peftcli.methods import METHODS
from peftcli.system.disk import write_file
from peftcli.system.secrets import redact
from peftcli.tasks import TASKS, TaskRow
from peftcli.tasks.text.prompts import PromptForm

_SETTINGS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "seed",
)
"""Of the recipe's training section: what decides the result."""

_NOT_SETTINGS = {"base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"}
_COUNTS = ("rows", "used", "truncated", "tokens", "targets")
_PROVEN = ("comparison", "forgetting")
"""What run.json has where base model and adapter were compared. The cards of older runs stay as they are."""
_LARGEST = 1e300
_MAX_HASHES = 8
"""Files of one split whose hashes the card lists."""
_ADAPTER_PLACEHOLDER, _BASE_PLACEHOLDER = "path/to/this/adapter", "path/to/the/base/model"
_MAX_CARD_BYTES, _MAX_HEAD = 1 << 24, 100_000
"""Bytes of a card that somebody wrote, and characters of its front matter."""

_TRANSFORMERS = ("transformers",)
"""Tags of a base model of which only its library is known."""

_Row = tuple[str, ...]


def write_card(folder: Path, tags: Collection[str] = _TRANSFORMERS) -> Path:
    """Write the README.md of an adapter folder, from its run.json and adapter_config.json.

    Raises:
        AdapterError: those cannot be read.
        StorageError: it cannot be written.
    """
    path, info = folder / "README.md", read_info(folder)
    write_file(path, render_card(info, tags=tags, **_beside(folder, info)).encode())
    return path


def has_own_card(folder: Path, tags: Collection[str] = _TRANSFORMERS) -> bool:
    """Return whether README.md is missing, or as ``write_card`` writes it: nobody's text is lost with it."""
    path = folder / "README.md"
    try:
        info = read_info(folder)
        return not os.path.lexists(path) or _read_card(path) == render_card(info, tags=tags, **_beside(folder, info))
    except AdapterError:
        return False


def complete_card(folder: Path, tags: Collection[str] = _TRANSFORMERS) -> None:
    """Add to the front matter of a README.md that somebody wrote what the hub needs to know, where it is missing.

    Raises:
        AdapterError: a file of the folder cannot be read, or the card's front matter cannot be changed.
        StorageError: it cannot be written.
    """
    path, info = folder / "README.md", read_info(folder)
    written = _read_card(path)
    kind, use, base = _subject(info)
    ours = _head(kind, use, base, tags)

    def complete(head: dict[str, Any]) -> None:
        given = _tags(head)
        if head.get("library_name") == "transformers":  # as Trainer writes of every model
            del head["library_name"]
        if head.get("base_model"):
            del ours["base_model_relation"]
        head.update({**ours, **head, "tags": [*given, *(tag for tag in ours["tags"] if tag not in given)]})

    card = _with_head(written, complete, path)
    if card != written:
        write_file(path, card.encode())


def for_hub(folder: Path, repo_id: str, base_model_id: str | None = None, tags: Collection[str] = ()) -> str:
    """The card to upload: one that names ``repo_id``, unless somebody wrote or edited the folder's own.

    ``base_model_id`` takes the place of the base model's name in either, and ``tags`` come to its own.

    Raises:
        AdapterError: a file of the folder cannot be read, or the card's front matter cannot be changed.
    """
    info, path = read_info(folder), folder / "README.md"
    base, beside = str(info["base_model"].get("name") or ""), _beside(folder, info)
    written = _read_card(path) if os.path.lexists(path) else None
    own: list[str] = list(_TRANSFORMERS) if written is None else []
    with suppress(AdapterError):  # its front matter cannot be read
        _with_head(written or "", lambda head: own.extend(_tags(head)), path)
    if written is None or written == render_card(info, tags=own, **beside):
        named = {**info, "base_model": {**info["base_model"], "name": base_model_id or base}}
        own = [tag for tag in own if not tag.startswith("base_model:")]
        written = render_card(named, adapter=repo_id, tags=own, **beside)
    elif base_model_id:
        text = written.replace(base, base_model_id) if "/" in base or "\\" in base else written
        written = _with_head(text, lambda head: head.update(base_model=base_model_id), path)
    if tags:
        written = _with_head(written, lambda head: head.update(tags=[*_tags(head), *tags]), path)
    return redact(written)


def was_local(folder: Path) -> bool:
    """Return whether the run that made an adapter folder read its base model from files of the machine.

    Raises:
        AdapterError: a file of the folder cannot be read.
    """
    return bool(mapping_at(read_info(folder), "identity").get("base_model"))


def is_local(base: str) -> bool:
    """Return whether a base model's name is a file or folder of this machine and no hub id."""
    path_like = _is_absolute(base) or base.startswith((".", "~")) or base.count("/") > 1 or "\\" in base
    return path_like or (bool(base) and os.path.lexists(base))


def read_info(folder: Path) -> dict[str, Any]:
    """Return what the folder says of its adapter, in the shape of run.json.

    Raises:
        AdapterError: a file of the folder cannot be read.
    """
    run = read_run(folder)
    config = read_config(folder) if os.path.lexists(folder / CONFIG_FILE) else {}
    recipe = mapping_at(run, "recipe")
    source = AdapterSource(folder, config)
    recipe["task"] = (source.task if config else None) or ""
    recipe.setdefault("method", {"type": str(config.get("peft_type", "")).lower(), **config})
    base = {"name": config.get("base_model_name_or_path"), **mapping_at(run, "base_model")}
    task = mapping_at(run, "task") or {"type": recipe["task"], **mapping_at(source.task_values, "settings")}
    form, trained_on = source.recorded_form, source.trained_format
    if not form and trained_on in ("text", "prompt_completion"):
        form = PromptForm.of_rows(trained_on, {}, has_template=False)
    return {**run, "recipe": recipe, "base_model": base, "task": task, "prompt": form}


def render_card(
    info: Mapping[str, Any],
    *,
    adapter: str = _ADAPTER_PLACEHOLDER,
    plot: bool = False,
    processor: bool = False,
    form: bool = False,
    tags: Collection[str] = _TRANSFORMERS,
) -> str:
    """The card's text.

    ``info`` is what ``read_info`` returns, of which any part may be missing. ``plot`` (loss.png), ``processor`` and
    ``form`` (that of ``TaskRow.form``) say what stands beside the card; ``tags`` are those of the base model.
    """
    recipe, method = mapping_at(info, "recipe"), mapping_at(info, "recipe", "method")
    method.pop("type", None)
    kind, use, base = _subject(info)
    use = use.filled(mapping_at(info, "task")) if use else None
    sections = [
        _front_matter(_head(kind, use, base, tags) | _model_index(_title(kind, base), use, info)),
        _summary(kind, str(recipe.get("task") or ""), base, info),
        _use(info, adapter, processor, form),
        _processor_note(use, mapping_at(recipe, "base_model")) if processor else "",
        _data(info),
        _table("Settings", ("setting", "value"), _setting_rows(method, recipe, info)),
        _results(info),
        _comparison(mapping_at(info, "comparison")),
        _forgetting(mapping_at(info, "forgetting")),
        "![Loss by step](loss.png)\n" if plot else "",
        _table("Versions", ("package", "version"), sorted(mapping_at(info, "versions").items())),
    ]
    return redact("\n".join(section for section in sections if section))


def how_to_use(folder: Path, adapter: str | None = None) -> str:
    """The card's section on how to use an adapter folder, by the name ``adapter``.

    Raises:
        AdapterError: a file of the folder cannot be read.
    """
    info = read_info(folder)
    beside = _beside(folder, info)
    return redact(_use(info, adapter or _ADAPTER_PLACEHOLDER, beside["processor"], beside["form"]))


def _use(info: Mapping[str, Any], adapter: str, processor: bool, form: bool) -> str:
    kind, use, base = _subject(info)
    name = base if base and not is_local(base) else _BASE_PLACEHOLDER
    use = use.filled(mapping_at(info, "task")) if use else None
    lines = use.form_loading if use and form else use.loading if use else ()  # of a model that no class of PEFT loads
    loading = [line.replace(json.dumps(_BASE_PLACEHOLDER), json.dumps(name)) for line in lines]
    loading = loading or [*_model(info, use, name, adapter), *_loading(info, use, name, adapter, processor)]
    return _usage(kind, use, adapter, loading, info.get("prompt"))


def _subject(info: Mapping[str, Any]) -> tuple[str, TaskRow | None, str]:
    """The adapter's method, its task and its base model's name; empty or None where they are not known."""
    kind = str(mapping_at(info, "recipe", "method").get("type", ""))
    use = TASKS.get(str(mapping_at(info, "recipe").get("task") or ""))
    return kind, use, str(mapping_at(info, "base_model").get("name") or "")


def _head(kind: str, use: TaskRow | None, base: str, tags: Collection[str]) -> dict[str, Any]:
    """Return the content of the front matter."""
    head: dict[str, Any] = {"library_name": "peft"}
    found = {kind.replace("_", "-"), "peftcli", *tags} - {""}
    if base and not is_local(base) and ("/" in base or "transformers" in tags):  # models of others have an owner
        head = {"base_model": base, "base_model_relation": "adapter", **head}
        found.add(f"base_model:adapter:{base}")
    if use:
        head["pipeline_tag"] = use.pipeline_tag
    return {**head, "tags": sorted(found)}


def _front_matter(head: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)}---\n"


def _model_index(title: str, use: TaskRow | None, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the front matter's results on the held-out rows, not verified by anybody; empty without a comparison.

    Rows of this machine's files are private; of the hub's datasets, the id is named.
    """
    measured = _measured(mapping_at(info, "comparison"))
    if use is None or not measured:
        return {}
    from huggingface_hub import EvalResult, ModelCardData

    dataset, data = mapping_at(info, "recipe", "dataset"), mapping_at(info, "data")
    source = str(dataset.get("eval") or dataset.get("train") or "")
    is_private = not is_hub_id(source) or any(mapping_at(each, "sha256") for each in (data, data.get("eval")))
    results = [
        EvalResult(
            task_type=use.pipeline_tag,
            dataset_type="private" if is_private else source,
            dataset_name="held-out rows" if is_private else source,
            metric_type=name.removeprefix("eval_"),
            metric_value=values["adapter"],
            verified=False,
        )
        for name, values in measured.items()
    ]
    head = ModelCardData(model_name=title, eval_results=results)
    return {"model-index": head.to_dict()["model-index"]}


def _measured(comparison: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics that were measured of base model and adapter, each with its numbers."""
    numbers = ("base", "adapter", "difference", "low", "high")
    found = {str(name): mapping_at(comparison, "metrics", name) for name in mapping_at(comparison, "metrics")}
    return {name: each for name, each in found.items() if all(_is_number(each.get(key)) for key in numbers)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _comparison(comparison: Mapping[str, Any]) -> str:
    """The table of base model and adapter on the same held-out rows."""
    rows = [
        (name, *(_value(float(each[key])) for key in ("base", "adapter", "difference")), _interval(each), verdict)
        for name, each in _measured(comparison).items()
        for verdict in [str(each.get("verdict", "")).replace("_", " ")]
    ]
    head = ("metric", "base model", "this adapter", "difference", "95 % interval", "verdict")
    text = _table("Base model and adapter", head, rows)
    if not text:
        return ""
    draws, units, drawn = comparison.get("draws"), comparison.get("units"), ""
    if _is_number(draws) and _is_number(units):
        drawn = f"; intervals by {draws:,} draws of {units:,} {_text(comparison.get('unit'))}"
    guess = " The base model has no trained head, so it guesses." if comparison.get("base_head_is_new") is True else ""
    chance = " A difference whose interval contains 0 may be chance."
    return f"{text}\nBoth on the same held-out rows{drawn}.{chance}{guess}{_right(comparison)}\n"


def _right(comparison: Mapping[str, Any]) -> str:
    """What became of the rows that the base model had right; empty where it had none, or guesses."""
    counts = [mapping_at(comparison, "right").get(name) for name in ("base", "lost", "gained")]
    if not counts[0] or not all(map(_is_number, counts)) or comparison.get("base_head_is_new") is True:
        return ""
    base, lost, gained = counts
    return f" Of {base:,} rows that the base model had right, this adapter has {lost:,} wrong; it gains {gained:,}."


def _forgetting(found: Mapping[str, Any]) -> str:
    """The table of what a language model forgot, on texts that it was not trained on."""
    names, head = ("texts", "loss", "kl", "kept_tokens"), ("texts of", "number", "loss", "KL", "tokens kept")
    groups = {"all": dict(found), **{name: mapping_at(found, "groups", name) for name in mapping_at(found, "groups")}}
    kept = {name: each for name, each in groups.items() if all(_is_number(each.get(key)) for key in names)}
    rows = [(name, *(_value(each[key]) for key in names)) for name, each in kept.items()]
    text = _table("What it forgot", head, rows)
    if not text:
        return ""
    is_sure = _is_number(found.get("low")) and _is_number(found.get("high"))
    span = f" (95 % interval {_interval(found)})" if is_sure else ""
    return (
        f"{text}\nOn texts that ship with peftcli: the rise of the cross-entropy{span} and the KL divergence from the"
        " base model, in nats a token, and the share of the base model's first choices that are this adapter's too.\n"
    )


def _interval(values: Mapping[str, Any]) -> str:
    return f"{_value(float(values['low']))} to {_value(float(values['high']))}"


def _title(kind: str, base: str) -> str:
    name = METHODS[kind].title if kind in METHODS else _text(kind).replace("_", " ") or "unknown method"
    base = _last_part(base) if is_local(base) else base
    return f"{name} adapter" + (f" for {_text(base)}" if base else "")


def _summary(kind: str, task: str, base: str, info: Mapping[str, Any]) -> str:
    name = METHODS[kind].title if kind in METHODS else _text(kind).replace("_", " ") or "unknown method"
    title, base = _title(kind, base), _last_part(base) if is_local(base) else base
    text = f"# {title}\n\nThis is not a whole model: it is an adapter made with {name}, and it is loaded on top of "
    text += f"its base model, {_code(base)}." if base else "its base model."
    if task:
        text += f" Its task is {_code(task)}."
    counts = mapping_at(info, "parameters")
    trained, every = counts.get("trainable"), counts.get("all")
    if isinstance(trained, int) and isinstance(every, int) and 0 < trained <= every:
        text += f" {trained:,} of {every:,} parameters were trained ({100 * trained / every:.3g} %)."
    return text + "\n"


def _usage(kind: str, use: TaskRow | None, adapter: str, loading: list[str], form: PromptForm | None) -> str:
    """Commands and Python that load the adapter and call it once."""
    text, library = "## How to use it\n\n", "peft"
    if use:
        text += f"With peftcli, on the command line:\n\n```bash\n{use.command(adapter)}\n```\n\n"
    if kind in METHODS and METHODS[kind].soft_prompt:
        library = "peftcli"
        text += (
            "With peftcli in Python. Some releases of PEFT repeat the virtual tokens at each generated token when they"
            " run on transformers 5, and then generate other text.\n\n"
        )
    else:
        text += f"With {'diffusers' if use and use.loading else 'PEFT and transformers'}, in Python:\n\n"
    if not any(line.startswith(("model = ", "pipeline = ")) for line in loading):
        auto_class = use.peft_class if use else "AutoPeftModel"
        loading = [
            f"from {library} import {auto_class}",
            f"from transformers import {_processor_class(_processor(use))}",
            "",
            f"model = {auto_class}.from_pretrained({json.dumps(adapter)})",
            *loading,
        ]
    calls = ('inputs = tokenizer("Hello", return_tensors="pt")', "print(model(**inputs))")
    if use:
        calls = (*(form.python_lines("Hello") if form and use.asking else use.asking), *use.usage)
    lines = [line.replace(json.dumps(_ADAPTER_PLACEHOLDER), json.dumps(adapter)) for line in (*loading, *calls)]
    return text + "```python\n" + "\n".join(lines) + "\n```\n"


def _model(info: Mapping[str, Any], use: TaskRow | None, name: str, adapter: str) -> list[str]:
    """Lines of Python that load a model whose head depends on the classes; none where PEFT's class does it."""
    recorded = {name: value for name, value in mapping_at(info, "task").items() if name != "type"}
    options: dict[str, Any] = {}
    with suppress(AttributeError, TypeError):
        options = use.settings(**recorded).model_options() if use and recorded else {}
    if not use or not options:
        return []
    names = list(options.get("id2label", {}).values())
    quoted = json.dumps(names).replace("`", "\\u0060")
    others = ", ".join(f"{name}={value!r}" for name, value in options.items() if isinstance(value, int))
    head = f"id2label=dict(enumerate({quoted}))" if names else others
    return [
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted([use.auto_class, _processor_class(_processor(use))]))}",
        "",
        f"base = {use.auto_class}.from_pretrained({json.dumps(name)}, {head}, ignore_mismatched_sizes=True)",
        f"model = PeftModel.from_pretrained(base, {json.dumps(adapter)})",
    ]


def _loading(info: Mapping[str, Any], use: TaskRow | None, name: str, adapter: str, own: bool) -> list[str]:
    """Lines of Python that load the processor, and tell a loaded model where its answers end if it does not know."""
    kind = _processor(use)
    lines = [f"{kind} = {_processor_class(kind)}.from_pretrained({json.dumps(adapter if own else name)})"]
    if stops := info.get("eos_token_id"):
        lines.append(f"model.generation_config.eos_token_id = {json.dumps(stops)}  # what its answers end with")
    return lines


def _processor(use: TaskRow | None) -> str:
    """The kind of processor that makes the inputs."""
    return use.processor if use and use.processor else "tokenizer"


def _processor_class(kind: str) -> str:
    return "Auto" + kind.title().replace("_", "")  # AutoTokenizer, AutoImageProcessor, ...


def _processor_note(use: TaskRow | None, settings: Mapping[str, Any]) -> str:
    """Say what the adapter's own processor has that the base model's lacks."""
    tokens = settings.get("new_tokens")
    new = ", ".join(_code(str(token)) for token in tokens) if isinstance(tokens, list) else ""
    parts = [f"the special tokens {new}"] * bool(new) + ["the chat template"] * bool(settings.get("chat_template"))
    what = _processor(use).replace("_", " ")
    text = f"The {what} is the adapter's own" + (f": it has {' and '.join(parts)} of its training." if parts else ".")
    if new:
        text += (
            " The `AutoPeftModel` classes give the base model rows for the new tokens where it has none;"
            " with `PeftModel.from_pretrained`, call `model.resize_token_embeddings(len(tokenizer))` on the base model"
            " first if it has fewer rows than that."
        )
    return text + "\n"


def _data(info: Mapping[str, Any]) -> str:
    text = _table("Training data", ("rows", "what", "value"), _data_rows(info))
    note = "train: the rows that it was trained on. eval: held-out rows, for measuring only. targets: what the loss "
    note += "counts, as tokens of answers. truncated: rows that were too long. sha256: of the data's file."
    return text and f"{text}\n{note}\n"


def _data_rows(info: Mapping[str, Any]) -> list[_Row]:
    rows: list[_Row] = []
    for split, data in (("train", mapping_at(info, "data")), ("eval", mapping_at(info, "data", "eval"))):
        counts = {name: data.get(name) for name in _COUNTS}
        counts |= {f"dropped: {why}": count for why, count in mapping_at(data, "dropped").items()}
        rows += [(split, name, f"{count:,}") for name, count in counts.items() if isinstance(count, int)]
        if any(each in info for each in _PROVEN):
            hashes = list(mapping_at(data, "sha256").values())[:_MAX_HASHES]
            rows += [
                (split, "sha256" if len(hashes) == 1 else f"sha256 of file {at}", str(each))
                for at, each in enumerate(hashes, 1)
            ]
    return rows


def _setting_rows(method: Mapping[str, Any], recipe: Mapping[str, Any], info: Mapping[str, Any]) -> list[_Row]:
    training = mapping_at(recipe, "training")
    rows = [(f"method.{key}", value) for key, value in sorted(method.items()) if key not in _NOT_SETTINGS]
    rows += [(f"training.{key}", training[key]) for key in _SETTINGS if training.get(key, -1) != -1]
    rows.append(("dataset.max_length", mapping_at(recipe, "dataset").get("max_length")))
    rows.append(("steps", mapping_at(info, "steps").get("done")))
    return [(key, _value(value)) for key, value in rows if value not in (None, {}, [], "")]


def _results(info: Mapping[str, Any]) -> str:
    """The table of metrics: of the adapter that was kept, and before it of the first evaluation, if there was one."""
    measured = mapping_at(info, "eval")
    first, kept = mapping_at(measured, "first"), mapping_at(measured, "kept") or mapping_at(measured, "last")
    values = [(name, first.get(name), value) for name, value in kept.items()]
    values.append(("train_loss", None, info.get("train_loss")))
    lines: list[_Row] = [("metric", "first evaluation", "this adapter")]
    lines += [(name, _value(start), _value(end)) for name, start, end in values if end is not None]
    if not first:
        lines = [(name, end) for name, _, end in lines]
    text = _table("Results", lines[0], lines[1:])
    return text and f"{text}\nMetrics that begin with eval_ are of the held-out rows; train_loss is the run's mean.\n"


def _table(title: str, head: tuple[str, ...], rows: list[_Row]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return f"## {title}\n\n" + "".join("| " + " | ".join(_text(cell) for cell in line) + " |\n" for line in lines)


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _text(value: object) -> str:
    """A value within the card's text: one line, no Markdown of its own, no folder of the machine."""
    text = str(value)
    text = _last_part(text) if _is_absolute(text) else text
    text = "".join(char if char.isprintable() else " " for char in text)
    return re.sub(r"([|<>`\[\]])", r"\\\1", text)


def _code(value: str) -> str:
    return "`" + _text(value).replace("\\", "").replace("`", "") + "`"


def _is_absolute(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name or path


def _tags(head: Mapping[str, Any]) -> list[str]:
    """The tags that front matter names."""
    given = head.get("tags") or []
    return [given] if isinstance(given, str) else [str(tag) for tag in given]


def _with_head(card: str, change: Callable[[dict[str, Any]], None], path: Path) -> str:
    """``card`` with its front matter changed; the same text where that changes nothing."""
    front = re.match(r"---\n(|.*?\n)---(\n|\Z)", card, re.DOTALL)
    if front and len(front[1]) > _MAX_HEAD:
        raise AdapterError(f"its front matter has more than {_MAX_HEAD:,} characters", file=str(path))
    try:
        head = (yaml.load(front[1], _HeadLoader) if front else None) or {}
        if not isinstance(head, dict):
            raise TypeError("no mapping")
        before = copy.deepcopy(head)
        change(head)
        written = _front_matter(head)
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        raise AdapterError(
            "its front matter cannot be read: "
            + one_line(" ".join(str(getattr(error, "problem", None) or error).split())),
            file=str(path),
            line=mark.line + 2 if mark else None,
            hint="mend it, or take the file away: a new one is made",
        ) from None
    if head == before:
        return card
    return written + (card[front.end() :] if front else "\n" + card)


class _HeadLoader(yaml.SafeLoader):
    """PyYAML without merge keys, which can make a short text a large one."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        pass


_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError)
"""What PyYAML raises on malformed input."""


def _read_card(path: Path) -> str:
    with read_errors(path):
        content = read_small(path, _MAX_CARD_BYTES)
    return content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")


def _beside(folder: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return which files that the card mentions are in the folder."""
    processors = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    own = any((folder / name).is_file() for name in processors)
    use = _subject(info)[1]
    form = bool(use and use.form and (folder / use.form).is_file())
    return {"plot": (folder / "loss.png").is_file(), "processor": own, "form": form}
