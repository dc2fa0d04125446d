"""Messages to a restaurant that book a table, made by a program: no person is meant.

Names and wordings of the evaluation rows are in no training row.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SEED = 0
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
_NAMES = """
Anna Ben Clara David Elena Felix Grace Hugo Ines Jonas Karim Laura Marco Nadia Oscar Paula Quentin Rosa Samir Tessa
Umberto Vera Walter Xenia Yusuf Zoe Aisha Boris Carmen Dmitri Esther Farid Greta Henrik Ingrid Jamal Katya Lorenzo Mei
Noah Olga Pedro Ravi Sofia Tomas Ursula Viktor Wanda Yara Zain
"""
_HELD_OUT_NAMES = """
Bruno Leila Akira Fatima Stefan Marta Kofi Ulrike Diego Hannah Igor Priya Sven Lucia Emil Naomi
"""
VALUES = {
    "name": (*_NAMES.split(), *_HELD_OUT_NAMES.split()),
    "people": NUMBERS,
    "day": DAYS,
    "time": tuple(f"{hour}:{minutes} pm" for hour in range(5, 11) for minutes in ("00", "15", "30", "45")),
}
"""Field -> the texts that a message may have there."""
_WORDINGS = (
    "Hi, this is [name]. A table for [people] on [day] at [time], please.",
    "Hello! We would like to come on [day] at [time], [people] of us. My name is [name].",
    "Could you keep us a table for [day]? We are [people] and arrive at [time]. Thanks, [name]",
    "[name] here. We are [people] people and want to eat with you on [day] around [time].",
    "Do you have room for [people] at [time] on [day]? It would be under the name [name].",
    "Good evening, I want to book for [day], [time]. Party of [people]. [name]",
    "My friends and I ([people] in total) hope to dine on [day] at [time]. Best wishes from [name].",
    "Please reserve for [name]: [day], [time], [people] persons.",
    "It is my birthday on [day]! Can [people] of us have a table from [time]? Yours, [name]",
    "On [day] we arrive at [time]. Please note [people] seats for [name].",
)
_HELD_OUT_WORDINGS = (
    "Dear team, is a table for [people] still free on [day] at [time]? Kind regards, [name]",
    "This is [name] again. Please put me down for [day] at [time], we will be [people].",
    "For [day], [time]: [people] guests. The booking is for [name].",
    "Hello, [name] speaking, I need a table on [day] at [time] for [people].",
)


@dataclass(frozen=True)
class Booking:
    """One message, and what it says."""

    text: str
    name: str
    people: str
    """A number as a word."""
    day: str
    time: str
    places: dict[str, tuple[int, int]]
    """Field -> where the text has it: its first character and the one past its last."""

    @property
    def fields(self) -> dict[str, Any]:
        """What a computer wants to know of it."""
        count = NUMBERS.index(self.people) + 2
        return {"name": self.name, "people": count, "day": self.day, "time": self.time}


def bookings(held_out: bool = False, seed: int = SEED) -> Iterator[Booking]:
    """Yield messages without end, of the training or of the evaluation rows."""
    draw = random.Random(f"{seed} {held_out}")
    names, wordings = (_HELD_OUT_NAMES, _HELD_OUT_WORDINGS) if held_out else (_NAMES, _WORDINGS)
    while True:
        time = f"{draw.randrange(5, 11)}:{draw.choice(('00', '15', '30', '45'))} pm"
        values = {
            "name": draw.choice(names.split()),
            "people": draw.choice(NUMBERS),
            "day": draw.choice(DAYS),
            "time": time,
        }
        text, places = "", {}
        for piece in re.split(r"(\[\w+\])", draw.choice(wordings)):
            field = piece.strip("[]")
            if field in values:
                places[field] = len(text), len(text) + len(values[field])
            text += values.get(field, piece)
        yield Booking(text=text, places=places, **values)
