"""Audio classification: every kind of model hears, clips of any rate and length come out right, folders are classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifierkit import table_of
from soundkit import RATE, SECONDS, clip, hearing_base, outcomes, tone, tone_rows, whisper_base

from peftcli.cli.app import main
from peftcli.data.rows import Row
from peftcli.data.sources import open_source
from peftcli.errors import DataError
from peftcli.models.open import open_base
from peftcli.recipe import load_recipe
from peftcli.schema import BaseModel, Source
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions

LABELS = {"labels": ["low", "high"], "problem_type": "single_label"}


def open_task(kind: str = "wav2vec2", **settings: Any) -> Any:
    folder = whisper_base() if kind == "whisper" else hearing_base(kind)
    row = TASKS["audio_classification"]
    return row.open(row.settings(**LABELS | settings), open_base(BaseModel(name=str(folder))))


def model_of(task: Any) -> Any:
    torch.manual_seed(0)
    loaded = task.base.model("AutoModelForAudioClassification", torch.float32, **task.model_options())
    assert {name.partition(".")[0] for name in loaded.initialised} == {"classifier", "projector"} & {
        name.partition(".")[0] for name, _ in loaded.model.named_parameters()
    }
    return loaded.model.eval()


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "ast", "w2v-bert", "whisper"])
def test_each_kind_of_model_says_the_same_of_a_clip_alone_and_in_a_batch(kind: str) -> None:
    task = open_task(kind)
    model, rows = model_of(task), table_of([{"audio": row["audio"]} for row in tone_rows()])[1]
    together, alone = (
        [answer["scores"] for answer in task.predict(model, rows, PredictOptions(batch_size=size))] for size in (6, 1)
    )
    assert [sum(each.values()) for each in alone] == pytest.approx([1.0] * len(rows))
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=2e-4)


def test_clips_of_any_rate_and_length(tmp_path: Path) -> None:
    stereo = clip(tmp_path / "stereo.wav", np.stack([tone(440.0, 1.0, 44100)] * 2, axis=1), 44100)
    short, silent = clip(tmp_path / "short.wav", tone()[:30]), clip(tmp_path / "silent.wav", 0 * tone())
    task = open_task(max_seconds=0.4)
    found = outcomes(task, [{"audio": each, "label": "low"} for each in (stereo, short, silent)])
    assert [each.flags for each in found] == [1, 0, 1 | 2]
    assert [each.examples[0].size for each in found] == [40, 1, 40]
    batch = task.collate([each.examples[0] for each in found], training=True)
    assert batch["input_values"].shape == (3, round(0.4 * RATE))
    assert batch["attention_mask"].sum(dim=1).tolist() == [round(0.4 * RATE), RATE // 4, round(0.4 * RATE)]
    assert torch.isfinite(task.loss(model_of(task).train(), batch).total)


def test_a_clip_that_is_longer_than_whisper_hears_is_cut(tmp_path: Path) -> None:
    (found,) = outcomes(
        open_task("whisper"), [{"audio": clip(tmp_path / "a.wav", tone(440.0, SECONDS + 1.0)), "label": "low"}]
    )
    assert (found.flags, found.examples[0].size) == (1, 100 * SECONDS)


def test_folders_are_classes_and_bad_files_are_errors_of_their_row(tmp_path: Path) -> None:
    clip(tmp_path / "low/1.wav", tone())
    clip(tmp_path / "high/1.wav", tone(880.0))
    (tmp_path / "high/2.wav").write_text("no sound")
    rows = [row for row in open_source(Source(train=str(tmp_path))).rows() if isinstance(row, Row)]
    task, table = open_task(), table_of([row.values for row in rows])[0]
    good, bad, other = task.encode(rows, task.read(table))
    assert [task.label_text(each.examples[0]) for each in (good, other)] == ["high", "low"]
    assert isinstance(bad, DataError)
    assert "2.wav: cannot be read as WAV" in bad.message


def test_init_recognises_folders_of_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, pitch in (("low", 220.0), ("high", 880.0)):
        for number in range(8):
            clip(tmp_path / f"sounds/{name}/{number}.wav", tone(pitch, 0.5 + number / 100))
    recipe = tmp_path / "recipe.yaml"
    command = ["init", str(tmp_path / "sounds"), "--base", str(whisper_base()), "--output", str(recipe)]
    assert main(command) == 0, capsys.readouterr().err
    assert load_recipe(recipe).task == {"type": "audio_classification"}
