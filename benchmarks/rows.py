"""The rows that the benchmarks train on: real text, of the quickstart's functions and docstrings, no two rows alike.

| kind | rows |
| --- | --- |
| unequal | chats of 42 to 512 tokens, short ones as frequent as in chat data; all with the template's system prompt |
| unlike | the same with a system prompt of its own each, so that hardly two rows start alike |
| equal | those of at least 199 tokens, cut there: no padding, and hardly two start alike |
| short | docstrings and first lines of functions, as plain text of at most 40 tokens |
| long | functions in a row, as plain text of 2,048 tokens, each row beginning at another function |

A round trains some of them: batches taken at equal distances from all rows in the order of their length, so that
grouping by length finds the batches that it would find among all of them, and then shuffled.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import TOKENIZER, WORK

SOURCE = Path("configs/quickstart/train.jsonl")
COUNT, BATCH = 400, 4
"""Rows of a kind, and of a batch."""
SHORTEST, LONGEST, EQUAL, SHORT, LONG = 42, 512, 199, 40, 2048
LENGTHS = {"unequal": LONGEST, "unlike": LONGEST, "equal": EQUAL, "short": SHORT, "long": LONG}
"""Kind -> ``max_length``."""
PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the model's chat template writes where a chat has no system prompt."""
_GOLDEN = (math.sqrt(5) - 1) / 2

Turn = dict[str, str]


def rows(kind: str, round: int, batches: int) -> list[dict[str, Any]]:
    """Return the rows of a round, each with ``row``, ``input_ids`` and ``labels`` (-100: no target)."""
    path = WORK / f"rows-{kind}.json"
    if not path.exists():
        subprocess.run([sys.executable, __file__, kind], check=True)
    by_length = sorted(json.loads(path.read_text()), key=lambda row: len(row["input_ids"]))
    first = (round + 0.5) * _GOLDEN % 1
    places = [int((at + first) / batches * (len(by_length) // BATCH)) * BATCH for at in range(batches)]
    chosen = [row for place in places for row in by_length[place : place + BATCH]]
    random.Random(round).shuffle(chosen)
    return chosen


def num_targets(row: dict[str, Any]) -> int:
    """Return how many tokens of a row are predicted."""
    return sum(label != -100 for label in row["labels"][1:])


def _encoded(kind: str) -> list[dict[str, Any]]:
    """The rows of a kind, as transformers' tokenizer and peftcli's loss mask make them."""
    from transformers import AutoTokenizer

    from peftcli.tasks.text.chat import chat_template, encode_marked, mark_chat
    from peftcli.tasks.text.formats import ChatExample

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    made: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in _texts(kind) if kind in ("short", "long") else _chats(tokenizer, kind):
        if "text" in row:
            ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
            labels = ids
        else:
            marked = mark_chat(ChatExample(row["messages"], None), chat_template(tokenizer), "answers")
            (encoded,) = encode_marked([marked], tokenizer)
            ids, labels = list(encoded.input_ids), list(encoded.labels)
            if ids != tokenizer.apply_chat_template(row["messages"], return_dict=False):
                raise SystemExit("the token ids are not those of the chat template")
        length = LENGTHS[kind]
        found = {"row": row, "input_ids": ids[:length], "labels": labels[:length]}
        fits = len(ids) >= length if kind in ("equal", "long") else len(ids) <= length
        if fits and num_targets(found):
            made[tuple(found["input_ids"])] = found
        if len(made) == COUNT:
            break
    return list(made.values())


def _functions() -> list[tuple[str, str, str]]:
    """Question, docstring and code of each function."""
    found = []
    for line in SOURCE.read_text(encoding="utf-8").splitlines():
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        found.append((question, answer, question.split("```python\n")[1].removesuffix("\n```")))
    return found


def _chats(tokenizer: Any, kind: str) -> Iterator[dict[str, list[Turn]]]:
    """Turns joined until a length is reached: functions asked for, and their docstrings, some in capitals."""
    generator, functions = random.Random(0), _functions()
    pool = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for number, (question, answer, code) in enumerate(functions)
        for asked, said in [
            (f"Write it: {answer}", code),
            (answer, f"```python\n{code}\n```"),
            (question, answer) if number % 2 else (answer, answer.upper()),
        ]
    ]

    def length(messages: list[Turn]) -> int:
        return len(tokenizer.apply_chat_template(messages, return_dict=False))

    def system(text: str) -> list[Turn]:
        return [{"role": "system", "content": text}]

    sizes = [length(system("") + turn) - length(system("")) for turn in pool]
    while True:
        messages = system(PROMPT if kind == "unequal" else generator.choice(functions)[1])
        shortest = EQUAL if kind == "equal" else SHORTEST
        wanted = math.exp(generator.uniform(math.log(shortest), math.log(LONGEST)))
        size = length(messages)
        for at in generator.sample(range(len(pool)), 60):
            if size + sizes[at] <= wanted:
                messages, size = messages + pool[at], size + sizes[at]
        if size >= max(shortest, 0.85 * wanted):
            yield {"messages": messages}


def _texts(kind: str) -> Iterator[dict[str, str]]:
    functions = _functions()
    if kind == "short":
        lines = [text for _, answer, code in functions for text in (answer, code.splitlines()[0])]
        yield from ({"text": line} for line in dict.fromkeys(lines))
        return
    code = [code for *_, code in functions]
    yield from ({"text": "\n\n\n".join([*code[at:], *code[:at]][:80])} for at in range(len(code)))


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / f"rows-{sys.argv[1]}.json").write_text(json.dumps(_encoded(sys.argv[1])))
