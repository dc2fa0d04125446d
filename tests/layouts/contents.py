"""What the files of the layouts contain: seeded sentences, questions, pictures and sounds that a small model can learn.

Words are drawn so freely that few rows are nearly equal. Long texts are the documentation that comes with Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def _words(text: str, delimiter: str | None = None) -> list[str]:
    return text.split(delimiter)


_GOOD = _words("wonderful superb charming brilliant delightful excellent lovely perfect moving great fresh clever")
_BAD = _words("awful boring terrible dreadful clumsy poor ugly broken tedious dull stale stupid")
_FAIR = _words("average ordinary passable usual plain middling acceptable unremarkable")
_THINGS = _words(
    "plot music dinner service battery screen acting ending room staff price camera story garden soup "
    "waiter sound handle shipping box design voice dialogue pace light cover keyboard terrace breakfast "
    "taste manual colour cast lens"
)
_WHEN = (
    """
yesterday again|after two weeks|on Monday|for my sister|at the airport|with the children|in late May|as expected|this
winter|before lunch|in our town|for the money|at first sight|by the sea|after a year|on the train
""".replace("\n", " ")
    .strip()
    .split("|")
)
TOPICS = {
    "World": _words(
        "minister treaty border election embassy parliament peace troops refugees summit president capital "
        "vote crisis sanctions"
    ),
    "Sports": _words(
        "striker goal coach league match season injury tennis medal stadium final referee champion sprint defender"
    ),
    "Business": _words(
        "shares profit bank merger investors dollar quarter exports retailer inflation bonds revenue factory "
        "market wages"
    ),
    "Sci/Tech": _words(
        "software chip rocket browser researchers satellite laptop virus network telescope database robot "
        "genome server quantum"
    ),
}
_LINKS = (
    """
said|expected|after the|before a|with new|while|against|despite the|reported|near|because of|without any|and its|the
next|called for|waits for|denied|over|praised|into|a former|the largest|one more|under
""".replace("\n", " ")
    .strip()
    .split("|")
)
_FIRST = _words("Anna Ben Clara David Elena Felix Grace Hugo Ines Jonas Karim Laura Marco Nadia Oscar Paula Rosa Samir")
_LAST = _words("Berg Costa Dietz Evans Fischer Garcia Haas Ito Jansen Kaya Lopez Meyer Novak Olsen Petit Rossi Sato")
PLACES = _words("Turin Oslo Lima Vienna Porto Kyoto Dakar Quito Riga Leeds Tampa Izmir Lyon Perth Osaka Ghent")
_ORGANISATIONS = _words("Acme Nordbank Siemens Unesco Interpol Volvo Reuters Fiat Nokia Airbus Philips Renault")
_VERBS = _words("met joined visited praised left called helped invited sued thanked followed hired")
_NOUNS = {
    "house": "casa", "dog": "perro", "book": "libro", "river": "río", "tree": "árbol", "city": "ciudad", "bread": "pan",
    "window": "ventana", "friend": "amigo", "night": "noche", "milk": "leche", "road": "camino", "door": "puerta",
    "moon": "luna", "sea": "mar", "letter": "carta", "horse": "caballo", "bridge": "puente",
}  # fmt: skip
_ADJECTIVES = {
    "old": "viejo", "small": "pequeño", "red": "rojo", "new": "nuevo", "white": "blanco", "long": "largo",
    "open": "abierto", "cold": "frío", "dark": "oscuro", "quiet": "tranquilo", "cheap": "barato", "dry": "seco",
}  # fmt: skip
EMOTIONS = {
    "joy": ["happy", "laughing", "glad", "cheerful", "smiling"],
    "anger": ["furious", "shouting", "angry", "mad", "outraged"],
    "fear": ["afraid", "trembling", "scared", "worried", "nervous"],
    "love": ["dear", "beloved", "darling", "adored", "sweet"],
}
_PRODUCTS = _words("kettle lamp tent drill scarf blender helmet router heater bicycle printer guitar stroller mattress")
_FAULTS = "does not start|is too loud|arrived late|has a scratch|lost its lid|smells of smoke|leaks|is the wrong size"
_WISHES = "a refund|a new one|a spare part|an invoice|a discount|a manual|a call|an exchange"


def numbers(seed: str | int) -> random.Random:
    """A source of draws that depends on the seed alone."""
    return random.Random(seed)


def opinion(draw: random.Random, tone: int) -> str:
    """A review: ``tone`` is -1, 0 or 1."""
    words = (_FAIR, _GOOD, _BAD)[tone]
    things = draw.sample(_THINGS, 3)
    parts = [f"{draw.choice(('the', 'its', 'their'))} {thing} was {draw.choice(words)}" for thing in things]
    parts.insert(draw.randrange(3), draw.choice(_WHEN))
    return f"{', '.join(parts)} and we paid {draw.randrange(5, 900)}.".capitalize()


def news(draw: random.Random, topic: str) -> str:
    """A sentence of a newspaper's section."""
    words = draw.sample(TOPICS[topic], 4)
    return f"{draw.choice(PLACES)}: {' '.join(f'{word} {draw.choice(_LINKS)}' for word in words)} {draw.choice(_WHEN)}"


def headline(draw: random.Random, topic: str) -> str:
    """A shorter one."""
    return " ".join(draw.sample(TOPICS[topic], 3)).capitalize()


def feeling(draw: random.Random, names: Sequence[str]) -> str:
    """A remark that shows these emotions."""
    said = " and ".join(draw.choice(EMOTIONS[name]) for name in names)
    return f"{draw.choice(_FIRST)} was {said} {draw.choice(_WHEN)}, the {draw.choice(_THINGS)} too"


def sentence(draw: random.Random) -> tuple[list[str], list[str]]:
    """Words, and their tags: PER, ORG and LOC."""
    first, last = draw.choice(_FIRST), draw.choice(_LAST)
    parts = [([first, last], "PER"), ([draw.choice(_VERBS)], ""), ([draw.choice(_ORGANISATIONS)], "ORG")]
    parts += [(["in"], ""), ([draw.choice(PLACES)], "LOC"), (draw.choice(_WHEN).split(), ""), (["."], "")]
    if draw.random() < 0.4:
        parts = [*parts[3:6], ([","], ""), *parts[:3], parts[-1]]
    words = [word for names, _ in parts for word in names]
    tags = [f"{'BI'[at > 0]}-{kind}" if kind else "O" for names, kind in parts for at, _ in enumerate(names)]
    return words, tags


def spans(words: Sequence[str], tags: Sequence[str]) -> tuple[str, list[tuple[int, int, str]]]:
    """The sentence as a text, and its entities' places."""
    text, found = "", list[tuple[int, int, str]]()
    for word, tag in zip(words, tags, strict=True):
        text += " " * bool(text)
        start, text = len(text), text + word
        if tag.startswith("B-"):
            found.append((start, len(text), tag[2:]))
        elif tag.startswith("I-"):
            found[-1] = (found[-1][0], len(text), tag[2:])
    return text, found


def passage(draw: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A text, and questions with the answers that it holds."""
    one, other = draw.sample(_FIRST, 2)
    place, firm, year = draw.choice(PLACES), draw.choice(_ORGANISATIONS), str(draw.randrange(1850, 2020))
    thing, when = draw.choice(_THINGS), draw.choice(_WHEN)
    text = (
        f"{one} {draw.choice(_LAST)} was born in {place} in {year}. {when.capitalize()}, {other} {draw.choice(_LAST)} "
        f"brought a {thing} to {firm}."
    )
    asked = [(f"Where was {one} born?", place), (f"When was {one} born?", year), (f"Who brought a {thing}?", other)]
    return text, asked


def claim(draw: random.Random) -> tuple[str, dict[str, str]]:
    """A premise, and what it entails, leaves open and contradicts."""
    name, thing, place = draw.choice(_FIRST), draw.choice(_PRODUCTS), draw.choice(PLACES)
    other = draw.choice([each for each in PLACES if each != place])
    premise = f"{name} {draw.choice(_LAST)} bought a {thing} in {place} {draw.choice(_WHEN)}."
    return premise, {
        "entailment": f"{name} owns a {thing} from {place}.",
        "neutral": f"{name} {draw.choice(_VERBS)} {draw.choice(_FIRST)} {draw.choice(_WHEN)}.",
        "contradiction": f"{name} has never bought any {thing}, nor was {other} left.",
    }


def twin(draw: random.Random, alike: bool) -> tuple[str, str]:
    """Two questions, which ask the same or do not."""
    thing, fault, wish = draw.choice(_PRODUCTS), draw.choice(_FAULTS.split("|")), draw.choice(_WISHES.split("|"))
    first = f"How do I get {wish} if my {thing} {fault} {draw.choice(_WHEN)}?"
    if alike:
        return first, f"My {thing} {fault}. What should I do to have {wish}?"
    return first, f"Where did {draw.choice(_FIRST)} find the {draw.choice(_THINGS)} of {draw.choice(PLACES)}?"


def enquiry(draw: random.Random) -> tuple[str, str]:
    """A customer's question and the support's answer, always in the same tone."""
    thing, fault, wish = draw.choice(_PRODUCTS), draw.choice(_FAULTS.split("|")), draw.choice(_WISHES.split("|"))
    number = draw.randrange(1000, 9999)
    asked = f"My {thing} ({number}) {fault} {draw.choice(_WHEN)}. Can I have {wish}?"
    return asked, f"Thank you for writing! We will send {wish} for the {thing} {number} to {draw.choice(PLACES)} today."


def translation(draw: random.Random) -> tuple[str, str]:
    """A phrase in English and in Spanish."""
    nouns, kinds = draw.sample(sorted(_NOUNS), 2), draw.sample(sorted(_ADJECTIVES), 2)
    english = f"the {kinds[0]} {nouns[0]} and the {kinds[1]} {nouns[1]}"
    parts = [f"el {_NOUNS[noun]} {_ADJECTIVES[kind]}" for noun, kind in zip(nouns, kinds, strict=True)]
    return english.capitalize() + ".", " y ".join(parts).capitalize() + "."


def chat(draw: random.Random) -> tuple[str, str]:
    """Lines of two people, and a summary."""
    one, other = draw.sample(_FIRST, 2)
    thing, place, when = draw.choice(_PRODUCTS), draw.choice(PLACES), draw.choice(_WHEN)
    lines = [f"{one}: Did you see my {thing}?", f"{other}: You left it in {place} {when}.", f"{one}: Oh no, thanks!"]
    return "\r\n".join(lines), f"{one} left the {thing} in {place}."


def report(draw: random.Random) -> tuple[str, str]:
    """A long article, and its highlights."""
    topic = draw.choice(sorted(TOPICS))
    lines = [news(draw, topic) + "." for _ in range(6)]
    return " ".join(lines), lines[0]


@cache
def manual() -> Sequence[str]:
    """The paragraphs of Python's reference, as ``help`` shows it."""
    from pydoc_data.topics import topics

    found = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    return [text for text in dict.fromkeys(found) if 120 < len(text) < 600 and text[0].isalpha()]


def chapters(draw: random.Random) -> Iterator[str]:
    """Pages of a book without end."""
    while True:
        at = draw.randrange(len(manual()) - 8)
        yield "\n\n".join(manual()[at : at + 8])


SHAPES = ("circle", "square", "cross")


def picture(draw: random.Random, shape: str, side: int = 64) -> tuple[Image.Image, Image.Image]:
    """A shape on noise, and its mask of 0 and 1."""
    noise = np.random.default_rng(draw.randrange(1 << 30)).integers(60, 140, (side, side, 3)).astype(np.uint8)
    image, mask = Image.fromarray(noise), Image.new("L", (side, side), 0)
    size = draw.randrange(side // 3, side // 2)
    left, top = draw.randrange(side - size), draw.randrange(side - size)
    box, colour = (left, top, left + size, top + size), _COLOURS[shape]
    for canvas, ink in ((ImageDraw.Draw(image), colour), (ImageDraw.Draw(mask), 1)):
        if shape == "circle":
            canvas.ellipse(box, fill=ink)
        elif shape == "square":
            canvas.rectangle(box, fill=ink)
        else:
            canvas.line(box, fill=ink, width=8)
            canvas.line((box[2], box[1], box[0], box[3]), fill=ink, width=8)
    return image, mask


_COLOURS = {"circle": (220, 30, 30), "square": (30, 200, 60), "cross": (40, 60, 230)}
_TONES = {"low": 220.0, "middle": 660.0, "high": 1760.0}
RATE = 16000


def sound(draw: random.Random) -> tuple[np.ndarray, str]:
    """Tones of a fifth of a second, and their names."""
    names = [draw.choice(sorted(_TONES)) for _ in range(draw.randrange(2, 6))]
    time = np.arange(RATE // 5) / RATE
    shift = draw.uniform(0.97, 1.03)
    tones = [0.3 * np.sin(2 * np.pi * shift * _TONES[name] * time) for name in names]
    return np.concatenate(tones).astype(np.float32), " ".join(names)


def save_sound(path: Path, samples: np.ndarray) -> None:
    """Write WAV, FLAC or MP3, by the name."""
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE)


def words_of(text: str) -> list[str]:
    """The words of a text and its marks."""
    return re.findall(r"\w+|[^\w\s]", text)
