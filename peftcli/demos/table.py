"""The table of demos: one for each task, with its base model, its data, what is asked before and after, and a sentence.

The recipe of a task is ``recipes/<task>.yaml``; in it ``<model>`` and ``<folder>`` are the base model's folder and the
demo's. A new task needs a row here and a recipe there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from peftcli.demos import pictures, sounds, texts

_Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Demo:
    """One row of the table."""

    summary: str
    """What the model learns, after "learns to"."""
    model: str
    """A name in ``models.MODELS``."""
    data: Callable[[Path], None]
    """Writes the data into a folder; the same bytes each time."""
    asks: tuple[Mapping[str, str], ...]
    """Rows that are answered before and after training. In a value, ``<folder>`` is the demo's folder."""
    seconds: int
    """About how long it takes on two cores, without downloads."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Optional packages that it imports -> the extra that brings each."""

    def recipe(self, task: str, model: Path, folder: Path) -> str:
        """Return the text of the recipe."""
        text = (files("peftcli.demos") / "recipes" / f"{task}.yaml").read_text("utf-8")
        for name, path in (("<model>", model), ("<folder>", folder)):
            text = text.replace(name, json.dumps(str(path), ensure_ascii=False)[1:-1])  # it stands in double quotes
        return text


def in_words(answers: Sequence[_Answer]) -> list[str]:
    """Return the answers of ``predict`` in words, one for each row."""
    return [next(say(answer, answers[0]) for key, say in _SAID.items() if key in answer) for answer in answers]


def _similarity(answer: _Answer, first: _Answer) -> str:
    """How similar two texts are: embeddings have the length 1."""
    return f"similarity {sum(a * b for a, b in zip(first['embedding'], answer['embedding'], strict=True)):.2f}"


_SAID: Mapping[str, Callable[[_Answer, _Answer], str]] = {
    "entities": lambda answer, _: (
        ", ".join(f"{each['type']}={each['text']}" for each in answer["entities"]) or "(nothing)"
    ),
    "label": lambda answer, _: f"{answer['label']} ({answer['score']:.0%})",
    "answer": lambda answer, _: f"{answer['answer']} ({answer['score']:.0%})",
    "choice": lambda answer, _: f"{answer['text']} ({answer['scores'][answer['choice']]:.0%})",
    "fills": lambda answer, _: "; ".join(
        ", ".join(f"{each['token']} {each['score']:.0%}" for each in found[:3]) for found in answer["fills"]
    ),
    "reward": lambda answer, _: f"reward {answer['reward']:.2f}",
    "shares": lambda answer, _: ", ".join(f"{name} {share:.0%}" for name, share in answer["shares"].items()),
    "objects": lambda answer, _: (
        ", ".join(
            f"{each['label']} ({each['score']:.0%}) at {[round(part) for part in each['box']]}"
            for each in answer["objects"]
        )
        or "(nothing)"
    ),
    "image": lambda answer, _: str(answer["image"]),
    "embedding": _similarity,
    "score": lambda answer, _: f"score {answer['score']:.2f}",
    "text": lambda answer, _: " ".join(str(answer["text"]).split()) or "(nothing)",
}
"""Key of an answer -> the answer in words; it takes the first row's answer too."""

_BOOKING = "Hello, Naomi speaking, I need a table on Thursday at 8:15 pm for five."

DEMOS: dict[str, Demo] = {
    "causal_lm": Demo(
        summary="read a booking out of a message, and to answer with JSON and nothing else",
        model="SmolLM2-135M-Instruct",
        data=texts.booking_forms,
        asks=({"prompt": _BOOKING},),
        seconds=100,
    ),
    "distillation": Demo(
        summary="put a system prompt into an adapter: answer without it as the model does after it",
        model="SmolLM2-135M-Instruct",
        data=texts.booking_forms,
        asks=(
            {"prompt": _BOOKING},
            {"prompt": "This is Omar. We are three and would like to come on Sunday at 7 pm, if you have a table."},
        ),
        seconds=120,
    ),
    "seq2seq_lm": Demo(
        summary="write German dates as 2024-03-09; it knows English ones",
        model="tiny-t5",
        data=texts.dates,
        asks=({"prompt": "24. Dezember 2031"}, {"prompt": "3. Okt. 1990"}),
        seconds=60,
    ),
    "sequence_classification": Demo(
        summary="tell from its message which class an error of Python has",
        model="all-MiniLM-L6-v2",
        data=texts.error_messages,
        asks=({"text": "expected str, not ..."}, {"text": "the socket is closed already"}, {"text": "... is negative"}),
        seconds=45,
        packages={"sklearn": "metrics"},
    ),
    "token_classification": Demo(
        summary="mark names, numbers of people, days and times in messages",
        model="all-MiniLM-L6-v2",
        data=texts.booking_entities,
        asks=({"text": _BOOKING},),
        seconds=30,
        packages={"seqeval": "metrics", "sklearn": "metrics"},
    ),
    "question_answering": Demo(
        summary="find the answer to a question in a message",
        model="all-MiniLM-L6-v2",
        data=texts.booking_questions,
        asks=(
            {"question": "Who books a table?", "context": _BOOKING},
            {"question": "How many people come?", "context": _BOOKING},
        ),
        seconds=90,
    ),
    "feature_extraction": Demo(
        summary="embed descriptions of functions close to their code",
        model="all-MiniLM-L6-v2",
        data=texts.code_search,
        asks=(
            {"text": "Return the extension of a file."},
            {"text": "def f(path): return path.rsplit('.', 1)[-1]"},
            {"text": "def f(path): return open(path).read()"},
        ),
        seconds=60,
    ),
    "masked_lm": Demo(
        summary="find masked words in the first lines of docstrings; it knows Python's language reference",
        model="all-MiniLM-L6-with-masks",
        data=texts.summaries,
        asks=({"text": "[MASK] the extension of a file."}, {"text": "Raise an [MASK] if the file is [MASK]."}),
        seconds=90,
    ),
    "multiple_choice": Demo(
        summary="choose which of several sentences says what a function does",
        model="all-MiniLM-L6-v2",
        data=texts.choices,
        asks=(
            {
                "question": "def f(path):\n    return path.rsplit('.', 1)[-1]",
                "choices": '["Close the connection.", "Return the extension of a file.", "Sort the names."]',
            },
        ),
        seconds=60,
    ),
    "audio_classification": Demo(
        summary="tell by its tone which key of a telephone is pressed",
        model="whisper-tiny.en",
        data=sounds.touch_keys,
        asks=({"audio": "<folder>/eval/3/000.wav"}, {"audio": "<folder>/eval/8/001.wav"}),
        seconds=270,
        packages={"soundfile": "audio", "soxr": "audio", "sklearn": "metrics"},
    ),
    "speech_recognition": Demo(
        summary="write down the numbers that touch tones dial",
        model="whisper-tiny.en",
        data=sounds.touch_tones,
        asks=({"audio": "<folder>/asked.wav"},),
        seconds=270,
        packages={"soundfile": "audio", "soxr": "audio", "jiwer": "audio"},
    ),
    "image_classification": Demo(
        summary="tell ten letters apart, in fonts that it has not seen",
        model="tiny-resnet",
        data=pictures.letters,
        asks=({"image": "<folder>/eval/A/000.png"}, {"image": "<folder>/eval/K/001.png"}),
        seconds=30,
        packages={"PIL": "vision", "sklearn": "metrics"},
    ),
    "image_text_to_text": Demo(
        summary="say in words which of ten letters a picture shows, in fonts that it has not seen",
        model="SmolLM2-135M-with-eyes",
        data=pictures.letters_in_words,
        asks=tuple({"image": f"<folder>/eval/{name}.png", "prompt": pictures.QUESTION} for name in ("A/000", "K/001")),
        seconds=240,
        packages={"PIL": "vision"},
    ),
    "semantic_segmentation": Demo(
        summary="find hearts, diamonds and clubs in pictures, pixel by pixel",
        model="tiny-segformer",
        data=pictures.scenes,
        asks=({"image": "<folder>/eval/000.png"},),
        seconds=45,
        packages={"PIL": "vision"},
    ),
    "object_detection": Demo(
        summary="find hearts, diamonds and clubs in pictures, each with its box",
        model="tiny-rt-detr",
        data=pictures.boxed_scenes,
        asks=({"image": "<folder>/eval/000.png"},),
        seconds=100,
        packages={"PIL": "vision", "scipy": "vision"},
    ),
    "text_to_image": Demo(
        summary="make pictures of hearts, from 20 pictures; it knows stars, umbrellas and other signs",
        model="tiny-diffusion",
        data=pictures.hearts,
        asks=({"text": "a photo of a heart"},),
        seconds=60,
        packages={"diffusers": "diffusion", "PIL": "diffusion"},
    ),
    "preference": Demo(
        summary="reply with the facts in few words instead of politely and at length",
        model="SmolLM2-135M-Instruct",
        data=texts.booking_replies,
        asks=({"prompt": _BOOKING},),
        seconds=120,
    ),
    "grpo": Demo(
        summary="read a booking out of a message as JSON, from rewards alone: it sees no right answer",
        model="SmolLM2-135M-Instruct",
        data=texts.booking_schemas,
        asks=({"messages": json.dumps(texts.after_example(_BOOKING))},),
        seconds=660,
        packages={"jsonschema": "metrics"},
    ),
    "reranker": Demo(
        summary="find the message that says exactly what a booking says",
        model="all-MiniLM-L6-v2",
        data=texts.booking_searches,
        asks=(
            {"query": "Naomi, five people, Thursday, 8:15 pm", "document": _BOOKING},
            {"query": "Naomi, five people, Friday, 8:15 pm", "document": _BOOKING},
            {"query": "Naomi, two people, Thursday, 8:15 pm", "document": _BOOKING},
        ),
        seconds=240,
    ),
    "reward": Demo(
        summary="score how well a sentence describes a function",
        model="all-MiniLM-L6-v2",
        data=texts.docstrings,
        asks=(
            {"prompt": "def f(path):\n    return path.rsplit('.', 1)[-1]", "completion": "Return a file's extension."},
            {"prompt": "def f(path):\n    return path.rsplit('.', 1)[-1]", "completion": "Close the connection."},
        ),
        seconds=60,
    ),
}
