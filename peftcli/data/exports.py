"""Exports of annotation tools, a row at a time: Label Studio, doccano, Prodigy, spaCy.

Entities become ``entities``: ``{start, end, label}`` with places in ``text``. Classes become ``label``. A row is known
by the keys that the tools write, and no task is meant by them.
"""

from __future__ import annotations

from typing import Any

_IGNORED = {"answer": "ignore"}
"""What marks a row that nobody annotated: it is left out, and counted."""
Values = dict[str, Any]


def as_object(value: Any) -> Any:
    """Return a row of spaCy's training data, ``[text, {"entities": [...]}]``, as an object; else the value as it is."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict):
        return {**value[1], "text": value[0]} if {"entities", "cats"} & value[1].keys() else value
    return value


def from_export(values: Values) -> tuple[str, Values] | None:
    """Return the tool that wrote a row, and the row with ``entities`` or ``label``; None: it needs no change."""
    annotations = values.get("annotations", values.get("completions"))
    if isinstance(values.get("data"), dict) and isinstance(annotations, list):
        found = _label_studio(values, annotations)
        return ("Label Studio", found) if found is not None else None
    if not isinstance(values.get("text"), str):
        return None
    for column in ("label", "labels", "entities"):
        if (entities := _entities(values.get(column))) is not None:
            tool = "Label Studio" if "labels" in values[column][0] else "doccano"
            return tool, {**_without(values, column), "entities": entities}
    if isinstance(values.get("ents"), list) and "entities" not in values:
        return "spaCy", {**_without(values, "ents"), "entities": values["ents"]}
    if isinstance(cats := values.get("cats"), dict) and cats and "label" not in values:
        chosen = [name for name, share in cats.items() if isinstance(share, int | float) and share >= 0.5]
        return "spaCy", {**_without(values, "cats"), "label": chosen[0] if len(chosen) == 1 else chosen}
    accepted = values.get("accept") if "options" in values and "label" not in values else None
    if isinstance(accepted, list) and accepted:
        return "Prodigy", {**values, "label": accepted[0] if len(accepted) == 1 else accepted}
    return None


def _without(values: Values, column: str) -> Values:
    return {name: value for name, value in values.items() if name != column}


def _entities(value: Any) -> list[Values] | None:
    """The entities of a list of another form than ours; None if it is not one."""
    if not isinstance(value, list) or not value:
        return None
    found = []
    for each in value:
        if isinstance(each, dict) and {"start_offset", "end_offset", "label"} <= each.keys():
            found.append({"start": each["start_offset"], "end": each["end_offset"], "label": each["label"]})
        elif isinstance(each, dict) and {"start", "end", "labels"} <= each.keys():
            found += _labelled(each)
        elif isinstance(each, list) and len(each) == 3 and isinstance(each[2], str):
            found.append(dict(zip(("start", "end", "label"), each, strict=True)))
        else:
            return None
    return found


def _labelled(value: Values) -> list[Values]:
    names = value["labels"] if isinstance(value["labels"], list) else [value["labels"]]
    return [{"start": value["start"], "end": value["end"], "label": name} for name in names]


def _label_studio(values: Values, annotations: list[Any]) -> Values | None:
    """The row of a task of Label Studio: its data, with what the first annotation says; None: of another kind."""
    data = dict(values["data"])
    done = [
        each
        for each in annotations
        if isinstance(each, dict) and isinstance(each.get("result"), list) and not each.get("was_cancelled")
    ]
    if not done:
        return {**data, **_IGNORED}
    entities, chosen = list[Values](), dict[str, list[Any]]()
    for part in (part for part in done[0]["result"] if isinstance(part, dict)):
        kind, value = part.get("type"), part.get("value")
        if not isinstance(value, dict):
            continue
        if kind in ("labels", "hypertextlabels") and {"start", "end", "labels"} <= value.keys():
            entities += _labelled(value)
        elif kind == "choices" and isinstance(value.get("choices"), list):
            chosen.setdefault(str(part.get("from_name")), []).extend(value["choices"])
        elif kind == "rating":
            chosen.setdefault(str(part.get("from_name")), []).append(value.get("rating"))
        elif kind != "relation":
            return None
    texts = [value for value in data.values() if isinstance(value, str)]
    if "text" not in data and len(texts) == 1 and not chosen:
        data["text"] = texts[0]
    named = {("label" if len(chosen) == 1 else name): each for name, each in chosen.items()}
    classes = {name: each[0] if len(each) == 1 else each for name, each in named.items()}
    return {**data, **classes} if chosen and not entities else {**data, **classes, "entities": entities}
