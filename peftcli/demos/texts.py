"""The rows of the demos of texts: train.jsonl and eval.jsonl in a folder, the same bytes each time."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from peftcli.demos.bookings import SEED, VALUES, Booking, bookings
from peftcli.demos.library import documented, messages

_CODE_CHARACTERS = 240
"""Of a function in a pair of docstrings, at most: short texts train fast."""
_GERMAN_MONTHS = (
    *("Januar", "Februar", "März", "April", "Mai", "Juni"),
    *("Juli", "August", "September", "Oktober", "November", "Dezember"),
)
_ENGLISH_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_FIRST, _LAST = date(1950, 1, 1), date(2049, 12, 31)
_QUESTIONS = {
    "name": ("Who books a table?", "What is the name of the guest?"),
    "day": ("On which day do they come?", "Which day is the table for?"),
    "time": ("At what time do they come?", "When will the table be needed?"),
    "people": ("How many people come?", "For how many is the table?"),
}
_FORM_FIELDS = ("name", "day", "time")
_EXAMPLE = ("A table for nine, Monday at 1:00 pm. Ada", '{"name": "Ada", "day": "Monday", "time": "1:00 pm"}')
"""A message and what it says, which stand before others."""
_CHATTY = (
    "Thank you so much for reaching out to us! We will be happy to look at your request as soon as possible.",
    "Dear guest, it is a pleasure to hear from you! Please let us know how we can make your evening special.",
    "I'm sorry, but I can't book tables. I would recommend that you contact the restaurant directly.",
    "Sure! I'd be happy to help you with that. Could you please tell me a bit more about your plans?",
)


def write_rows(folder: Path, **parts: Iterable[dict[str, Any]]) -> None:
    """Write files of JSON lines: train=rows is train.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def booking_forms(folder: Path) -> None:
    """Messages that book a table, each answered by what it says as JSON."""

    def row(booking: Booking) -> dict[str, Any]:
        return _chat(booking.text, json.dumps(booking.fields))

    _write_bookings(folder, row, 240, 24)


def booking_entities(folder: Path) -> None:
    """Messages that book a table, and where they say what."""

    def row(booking: Booking) -> dict[str, Any]:
        places = booking.places.items()
        entities = [{"start": start, "end": end, "label": field.upper()} for field, (start, end) in places]
        return {"text": booking.text, "entities": sorted(entities, key=lambda each: each["start"])}

    _write_bookings(folder, row, 600, 100)


def booking_replies(folder: Path) -> None:
    """Messages that book a table, each with a short reply that repeats it, chosen, and a chatty one, rejected."""
    draw = random.Random(SEED)

    def row(booking: Booking) -> dict[str, Any]:
        said = booking.fields
        short = f"Booked: {said['day']}, {said['time']}, {said['people']} people. See you then, {said['name']}!"
        pair = {"chosen": short, "rejected": draw.choice(_CHATTY)}
        answers = {name: [{"role": "assistant", "content": text}] for name, text in pair.items()}
        return {"prompt": [{"role": "user", "content": booking.text}], **answers}

    _write_bookings(folder, row, 96, 16)


def booking_schemas(folder: Path) -> None:
    """Messages that book a table, each with JSON Schemas of the right answer and of each of its parts."""

    def row(booking: Booking) -> dict[str, Any]:
        fields = {field: {"const": booking.fields[field]} for field in _FORM_FIELDS}
        parts = {field: _schema({field: each}) for field, each in fields.items()}
        whole = _schema(fields) | {"additionalProperties": False}
        return {"prompt": after_example(booking.text), "booking": whole, **parts}

    _write_bookings(folder, row, 400, 48)


def after_example(text: str) -> list[dict[str, str]]:
    """Ask for what a message says, after another one that is answered."""
    message, answer = _EXAMPLE
    return [
        {"role": "system", "content": "Say who comes and when."},
        {"role": "user", "content": message},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": text},
    ]


def _schema(properties: dict[str, Any]) -> dict[str, Any]:
    """A JSON Schema of objects that must have these properties."""
    return {"type": "object", "properties": properties, "required": [*properties]}


def booking_questions(folder: Path) -> None:
    """Questions about messages that book a table, in SQuAD's form."""
    draw = random.Random(SEED)

    def row(booking: Booking) -> dict[str, Any]:
        field = draw.choice([*_QUESTIONS])
        start, end = booking.places[field]
        answers = {"text": [booking.text[start:end]], "answer_start": [start]}
        return {"question": draw.choice(_QUESTIONS[field]), "context": booking.text, "answers": answers}

    _write_bookings(folder, row, 800, 100)


def booking_searches(folder: Path) -> None:
    """What a booking says, the message that says it, and four messages that differ in one thing each."""
    draw = random.Random(SEED)

    def row(booking: Booking) -> dict[str, Any]:
        query = f"{booking.name}, {booking.people} people, {booking.day}, {booking.time}"
        others = []
        for field, (start, end) in booking.places.items():
            values = [each for each in VALUES[field] if each != booking.text[start:end]]
            others.append(booking.text[:start] + draw.choice(values) + booking.text[end:])
        return {"query": query, "positive": booking.text, "negative": others}

    _write_bookings(folder, row, 800, 100)


def dates(folder: Path) -> None:
    """German dates, and the same as 2024-03-09."""
    draw = random.Random(SEED)
    chosen = draw.sample(range((_LAST - _FIRST).days), 900)
    days = [_FIRST + timedelta(number) for number in chosen]
    rows = [{"prompt": german_date(day, draw), "completion": day.isoformat()} for day in days]
    write_rows(folder, train=rows[:800], eval=rows[800:])


def german_date(day: date, draw: random.Random) -> str:
    """Write a date as Germans do."""
    month = _GERMAN_MONTHS[day.month - 1]
    return draw.choice((f"{day.day}. {month} {day.year}", f"{day.day}. {month[:3]}. {day.year}"))


def english_date(day: date, draw: random.Random) -> str:
    """Write a date in English."""
    month = _ENGLISH_MONTHS[day.month - 1]
    short = draw.choice((month, month[:3]))
    return draw.choice((f"{day.day} {short} {day.year}", f"{short} {day.day}, {day.year}"))


def any_day(draw: random.Random) -> date:
    """Draw a day of a hundred years."""
    return _FIRST + timedelta(draw.randrange((_LAST - _FIRST).days))


def error_messages(folder: Path) -> None:
    """Error messages of Python's standard library, and the class of error: the three most frequent ones.

    The evaluation rows are of modules of their own.
    """
    draw = random.Random(SEED)
    found = messages(draw)
    classes = {name for name, _ in Counter(found["train"].values()).most_common(3)}
    parts = {}
    for part, texts in found.items():
        parts[part] = [{"text": text, "label": name} for text, name in texts.items() if name in classes]
        draw.shuffle(parts[part])
    write_rows(folder, **parts)


def code_search(folder: Path) -> None:
    """Functions of Python's standard library without their names, and the first lines of their docstrings.

    The evaluation rows are of modules of their own.
    """
    draw = random.Random(SEED)
    parts = {}
    for part, pairs in documented(draw).items():
        rows = [
            {"anchor": summary, "positive": re.sub(r"def \w+", "def f", code, count=1)}
            for summary, code in pairs.items()
        ]
        draw.shuffle(rows)
        parts[part] = rows
    write_rows(folder, train=parts["train"][:1000], eval=parts["eval"][:200])


def summaries(folder: Path) -> None:
    """First lines of docstrings of Python's standard library; the evaluation rows are of modules of their own."""
    draw = random.Random(SEED)
    parts = {part: draw.sample(sorted(pairs), len(pairs)) for part, pairs in documented(draw).items()}
    rows = {part: [{"text": text} for text in texts] for part, texts in parts.items()}
    write_rows(folder, train=rows["train"][:1600], eval=rows["eval"][:300])


def choices(folder: Path) -> None:
    """Functions of Python's standard library, each with three to five first lines of docstrings, one of them its own.

    The evaluation rows are of modules of their own.
    """
    draw = random.Random(SEED)
    parts: dict[str, list[dict[str, Any]]] = {}
    for part, pairs in documented(draw).items():
        short = {summary: code for summary, code in pairs.items() if len(code) <= _CODE_CHARACTERS}
        parts[part] = []
        for summary in draw.sample(sorted(short), len(short)):
            those = [summary, *draw.sample(sorted({*short} - {summary}), draw.randint(2, 4))]
            draw.shuffle(those)
            parts[part].append({"question": short[summary], "choices": those, "label": those.index(summary)})
    write_rows(folder, train=parts["train"][:320], eval=parts["eval"][:100])


def docstrings(folder: Path) -> None:
    """Functions of Python's standard library: chosen is the docstring's first line, rejected another function's.

    The evaluation rows are of modules of their own.
    """
    draw = random.Random(SEED)
    parts = {}
    for part, pairs in documented(draw).items():
        short = {summary: code for summary, code in pairs.items() if len(code) <= _CODE_CHARACTERS}
        chosen = draw.sample(sorted(short), len(short))
        parts[part] = [
            {"prompt": short[summary], "chosen": summary, "rejected": chosen[at - draw.randrange(1, len(chosen))]}
            for at, summary in enumerate(chosen)
        ]
    write_rows(folder, train=parts["train"][:800], eval=parts["eval"][:150])


def _write_bookings(folder: Path, row: Callable[[Booking], dict[str, Any]], train: int, held_out: int) -> None:
    parts = {"train": islice(bookings(), train), "eval": islice(bookings(held_out=True), held_out)}
    write_rows(folder, **{name: map(row, part) for name, part in parts.items()})


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
