"""Telephone numbers as the touch tones of ITU-T Q.23, which every telephone makes: two sines a digit."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SEED = 0
RATE = 8000
ROWS, COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
"""Frequencies in hertz; the keys are 1 2 3, 4 5 6, 7 8 9, * 0 #."""
DIGITS = 4


def touch_tones(folder: Path) -> None:
    """Clips of four tones each, with noise, and their digits: train.jsonl and eval.jsonl. No number is in both."""
    import numpy as np

    draw = np.random.default_rng(SEED)
    numbers = [f"{number:0{DIGITS}}" for number in draw.permutation(10**DIGITS)]
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    for part, chosen in (("train", numbers[:480]), ("eval", numbers[480:512])):
        rows = []
        for number in chosen:
            file = f"clips/{number}.wav"
            _write(folder / file, tones(number, draw))
            rows.append(json.dumps({"audio": file, "text": " ".join(number)}) + "\n")
        (folder / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
    _write(folder / "asked.wav", tones(numbers[512], draw))


def touch_keys(folder: Path) -> None:
    """Clips of one tone each, with noise, in folders of their keys: train/KEY/000.wav and eval/KEY/000.wav."""
    import numpy as np

    draw = np.random.default_rng(SEED)
    for part, count in (("train", 16), ("eval", 4)):
        for key in "0123456789":
            (folder / part / key).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                _write(folder / part / key / f"{number:03}.wav", tones(key, draw))


def tones(number: str, draw: np.random.Generator) -> np.ndarray:
    """Dial a number: samples in [-1, 1]."""
    import numpy as np

    parts = [np.zeros(RATE // 5)]
    for digit in number:
        row, column = divmod((int(digit) - 1) % 11, 3)
        time = np.arange(int(RATE * draw.uniform(0.2, 0.3))) / RATE
        tone = np.sin(2 * np.pi * ROWS[row] * time) + np.sin(2 * np.pi * COLUMNS[column] * time)
        parts += [tone * draw.uniform(0.2, 0.4), np.zeros(int(RATE * draw.uniform(0.1, 0.2)))]
    sound = np.concatenate(parts)
    return (sound + draw.normal(0, 0.01, len(sound))).clip(-1, 1)


def _write(path: Path, sound: np.ndarray) -> None:
    with wave.open(str(path), "wb") as clip:
        clip.setnchannels(1)
        clip.setsampwidth(2)
        clip.setframerate(RATE)
        clip.writeframes((sound * 32767).astype("<i2").tobytes())
