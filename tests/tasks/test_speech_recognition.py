"""Speech recognition: sounds of every kind come out right, and Whisper's tokens are where it expects them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import trainkit
import transformers
from classifierkit import table_of
from soundkit import (
    LANGUAGES,
    POSITIONS,
    RATE,
    SECONDS,
    clip,
    moonshine_base,
    outcomes,
    speech_task,
    tone,
    tone_rows,
    whisper_base,
)
from taskkit import CASES
from trainkit import at_step, run_recipe

from peftcli.adapters.predict import load_predictor
from peftcli.cli.app import main
from peftcli.data.rows import Row
from peftcli.data.sources import open_source
from peftcli.errors import DataError, Interrupted, ModelError
from peftcli.models.open import open_base
from peftcli.schema import BaseModel, Source
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions
from peftcli.tasks.pipelines import answers_of_both
from peftcli.tasks.sounds import samples_of
from peftcli.tasks.speech_recognition import TASK

FORMATS = {"wav": {"subtype": "PCM_24"}, "flac": {}, "ogg": {"subtype": "VORBIS"}, "mp3": {}}


def model_of(task: Any, kind: str = "several") -> Any:
    found = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(whisper_base(kind)).eval()
    task.fit_model(found, None)
    return found


def batch_of(task: Any, values: Any = None, *, training: bool = True) -> dict[str, Any]:
    rows = values or tone_rows()[:3]
    return task.collate([each.examples[0] for each in outcomes(task, rows)], training=training)


def decoder_inputs(model: Any, call: Callable[[], Any]) -> torch.Tensor:
    """What the decoder reads first, while something is called."""
    seen = list[torch.Tensor]()
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        call()
    hook.remove()
    return seen[0]


def ids(*names: str) -> list[int]:
    known = transformers.AutoTokenizer.from_pretrained(whisper_base()).get_vocab()
    return [known[f"<|{name}|>"] for name in names]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rate", [8000, 44100])
def test_sounds_of_each_format_rate_and_channel(tmp_path: Path, kind: str, rate: int) -> None:
    stereo = np.stack([tone(440.0, 1.0, rate), 0 * tone(440.0, 1.0, rate)], axis=1)
    path = clip(tmp_path / f"a.{kind}", stereo, rate, **FORMATS[kind])
    task = speech_task()
    sound = samples_of(outcomes(task, [{"audio": path, "text": "a"}])[0].examples[0], task.rate)
    assert len(sound) == pytest.approx(RATE, rel=0.1)
    assert np.abs(np.fft.rfft(sound, RATE)).argmax() == pytest.approx(440, abs=2)
    assert np.abs(sound).max() == pytest.approx(0.25, rel=0.15)  # half of one channel


@pytest.mark.parametrize("column", ["text", "sentence", "transcription"])
def test_a_folder_with_metadata(tmp_path: Path, column: str) -> None:
    clip(tmp_path / "clips/a.wav", tone())
    with (tmp_path / "clips/metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", column], ["a.wav", "one tone"]])
    rows = [row for row in open_source(Source(train=str(tmp_path / "clips"))).rows() if isinstance(row, Row)]
    task, table = speech_task(), table_of([row.values for row in rows])[0]
    (outcome,) = task.encode(rows, task.read(table))
    assert outcome.examples[0].arrays["text"] == "one tone"
    assert outcome.size == 50


def test_what_cannot_be_heard_is_an_error_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    nothing, nan = clip(tmp_path / "nothing.wav", tone()[:0]), tmp_path / "nan.wav"
    soundfile.write(nan, np.full(100, np.nan, np.float32), RATE, subtype="FLOAT")
    cut = tmp_path / "cut.wav"
    cut.write_bytes(Path(clip(tmp_path / "whole.wav", tone())).read_bytes()[:-999])
    values = [tmp_path / "text.wav", nothing, nan, tmp_path / "missing.wav", cut]
    found = outcomes(
        speech_task(), [{"audio": str(each), "text": "a"} for each in values] + [{"audio": 3, "text": "a"}]
    )
    for each, words in zip(
        found,
        ["cannot be read as WAV", "no samples", "not numbers", "no such file", "is cut off: it has", "a sound"],
        strict=True,
    ):
        assert isinstance(each, DataError)
        assert words in each.message
    assert [each.line for each in found] == [1, 2, 3, 4, 5, 6]
    whole = {"array": (tone() * 2**15).astype(np.int16), "sampling_rate": RATE}
    (unscaled,) = outcomes(speech_task(), [{"audio": whole, "text": "a"}])
    assert "samples up to 16384; those of a sound are from -1 to 1" in str(unscaled)
    (blank,) = outcomes(speech_task(), [{"audio": tone_rows()[0]["audio"], "text": " "}])
    assert "expected a text" in str(blank)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (transformers.LasrCTCConfig(), ".* is of type lasr_ctc, of which it is not known how many frames it labels"),
        (transformers.CanaryConfig(), ".* is of type canary, which this task does not train"),
        (transformers.VoxtralConfig(), ".* is of type voxtral, which this task does not train"),
    ],
)
def test_a_model_that_answers_in_another_way_is_refused(config: Any, says: str, tmp_path: Path) -> None:
    folder, row = shutil.copytree(whisper_base(), tmp_path / "base"), TASKS["speech_recognition"]
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=f"^base_model: {says}"):
        row.open(row.settings(), open_base(BaseModel(name=str(folder))))


def test_the_decoder_starts_once_and_its_end_counts() -> None:
    task = speech_task()
    model, batch = model_of(task), batch_of(task)
    assert "input_ids" not in batch
    start, language, mode, no_times, end = ids("startoftranscript", "en", "transcribe", "notimestamps", "endoftext")
    assert model.config.pad_token_id == model.config.eos_token_id == end
    read = decoder_inputs(model, lambda: model(**batch))
    assert read[:, :4].tolist() == [[start, language, mode, no_times]] * 3
    assert (read == start).sum() == 3
    assert [(row == end).sum() for row in batch["labels"]] == [1, 1, 1], "the end counts, padding does not"
    assert (batch["labels"][:, -1] == -100).any()
    with torch.no_grad():
        mine, own = task.loss(model.train(), batch).total, model(**batch).loss  # the tiny model has no dropout
    assert float(mine) == pytest.approx(float(own) * int((batch["labels"] >= 0).sum()), rel=1e-5)


def test_labels_are_those_of_whispers_own_tokenizer() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper_base("english"))
    expected = tokenizer("low").input_ids
    assert expected[0] == ids("startoftranscript")[0]
    (outcome,) = outcomes(speech_task("english"), tone_rows()[:1])
    assert outcome.examples[0].arrays["labels"] == expected[1:]


@pytest.mark.parametrize("kind", ["several", "old"])
@pytest.mark.parametrize("language", ["german", "de"])
def test_language_and_mode_of_training_are_those_of_answers(kind: str, language: str) -> None:
    task = speech_task(kind, language=language, mode="translate", timestamps=True)
    assert task.prefix == ids("de", "translate")
    model = model_of(task, kind)
    inputs = {name: value for name, value in task.probe().items() if name != "decoder_input_ids"}
    read = decoder_inputs(model, lambda: model.generate(**inputs))
    assert read.tolist() == [ids("startoftranscript", "de", "translate")] * 2


def test_a_model_of_one_language_has_no_token_for_it() -> None:
    task = speech_task("english")
    assert task.prefix == ids("notimestamps")
    model = model_of(task, "english")
    inputs = {name: value for name, value in task.probe().items() if name != "decoder_input_ids"}
    assert decoder_inputs(model, lambda: model.generate(**inputs))[0].tolist() == ids(
        "startoftranscript", "notimestamps"
    )
    assert speech_task("english", language="en").prefix == task.prefix
    for settings, key in (({"language": "de"}, "task.language"), ({"mode": "translate"}, "task.mode")):
        with pytest.raises(DataError, match="English alone") as error:
            speech_task("english", **settings).fingerprint()
        assert error.value.key == key
    with pytest.raises(DataError, match=f"knows {len(LANGUAGES)} languages"):
        speech_task(language=None).fingerprint()
    with pytest.raises(DataError, match="no language 'klingon'"):
        speech_task(language="klingon").fingerprint()


def _prompt(text: str) -> torch.Tensor:
    found: torch.Tensor = transformers.AutoProcessor.from_pretrained(whisper_base()).get_prompt_ids(text, "pt")
    return found


def test_a_prompt_is_read_before_each_answer_as_in_training() -> None:
    task, plain = speech_task(prompt="high low"), speech_task()
    model, batch, prompt = model_of(task), batch_of(task), _prompt("high low")
    start = [*prompt.tolist(), *ids("startoftranscript", "en", "transcribe", "notimestamps")]
    read = decoder_inputs(model, lambda: model(**batch))
    assert read[:, : len(start)].tolist() == [start] * 3
    unprompted = batch_of(plain)["labels"]
    assert batch["labels"].tolist() == [[-100] * len(prompt) + row for row in unprompted.tolist()], "and does not count"
    counts = batch["labels"][:, :-1] >= 0
    assert torch.equal(read[:, 1:][counts], batch["labels"][:, :-1][counts])

    rows = table_of([{"audio": row["audio"]} for row in tone_rows()[:3]])[1]
    seen = decoder_inputs(model, lambda: list(task.predict(model, rows, PredictOptions())))
    assert seen.tolist() == [start] * 3
    tokens = model.generate(input_features=batch["input_features"], prompt_ids=prompt)
    expected = [task.tokenizer.decode(each, skip_special_tokens=True).strip() for each in tokens]
    answers = [each["text"] for each in task.predict(model, rows, PredictOptions())]
    assert answers == expected
    assert answers != [each["text"] for each in plain.predict(model, rows, PredictOptions())]
    assert all("high low" not in each for each in answers)


@pytest.mark.slow
def test_the_prompt_of_training_is_that_of_each_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, generate = list[Any](), transformers.WhisperForConditionalGeneration.generate

    def watched(*args: Any, **options: Any) -> Any:
        given.append(options.get("prompt_ids"))
        return generate(*args, **options)

    monkeypatch.setattr(transformers.WhisperForConditionalGeneration, "generate", watched)
    recipe = CASES["speech_recognition"].write(tmp_path)
    prompt = 'high "low"'
    recipe.write_text(recipe.read_text().replace("'language': 'en'", f"'language': 'en', 'prompt': '{prompt}'"))
    done = run_recipe(recipe, "training.eval_strategy=steps", "training.eval_steps=6")
    assert done.losses[-1] < done.losses[0]
    assert json.loads((done.folder / "task.json").read_text())["settings"]["prompt"] == prompt
    before, card = len(given), (done.folder / "README.md").read_text()
    exec(card.split("```python\n")[1].split("```")[0].replace("path/to/this/adapter", str(done.folder)), {})
    assert len(given) > before, "by the card's example"
    commands = [
        ["evaluate", str(recipe), "--adapter", str(done.folder)],
        ["predict", str(done.folder), tone_rows()[0]["audio"]],
    ]
    for command in commands:
        trainkit.reset_accelerate()
        before = len(given)
        assert main(command) == 0, capsys.readouterr().err
        assert len(given) > before
    assert all(torch.equal(each, _prompt(prompt)) for each in given)


@pytest.mark.slow
def test_a_pipeline_that_gets_the_prompt_answers_as_predict(tmp_path: Path) -> None:
    found = list[Any]()
    for task in (speech_task(), speech_task(prompt="high low")):
        model = model_of(task)
        task.save(tmp_path)
        found.append(answers_of_both(task.name, task, model, model, tmp_path, {}))
    (plain, same), (ours, theirs) = found
    assert (plain, ours) == (same, theirs)
    assert plain != ours


@pytest.mark.slow
def test_a_long_clip_reads_the_prompt_in_each_part(tmp_path: Path) -> None:
    task, read = speech_task(prompt="low"), list[list[int]]()
    model, prompt = model_of(task), _prompt("low").tolist()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0][0].tolist()))
    rows = table_of([{"audio": clip(tmp_path / "long.wav", tone(440.0, 2.5 * SECONDS))}])[1]
    list(task.predict(model, rows, PredictOptions()))
    firsts = [each for each in read if len(each) > 1]
    assert len(firsts) >= 3
    assert all(each[: len(prompt)] == prompt for each in firsts)


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_is_refused() -> None:
    longest = POSITIONS // 2 - 1
    task = speech_task(prompt="a" * (longest - 2))  # the token before it and a blank count
    assert len(task.fingerprint()["prompt"]) == longest
    for text, words in (("a" * (longest - 1), f"has {longest + 1} tokens"), ("<|en|> a", "names a special token")):
        with pytest.raises(DataError, match=words) as error:
            speech_task(prompt=text).fingerprint()
        assert error.value.key == "task.prompt"
    audio, room = tone_rows()[0]["audio"], POSITIONS - longest - len(task.prefix) - 1
    fits, long = outcomes(task, [{"audio": audio, "text": "a" * count} for count in (room, room + 1)])
    model = model_of(task)
    model(**task.collate(fits.examples, training=True))
    assert f"the model can say {POSITIONS - longest}, beside the {longest} of task.prompt" in str(long)


def test_a_transcript_that_is_too_long_is_found_before_training() -> None:
    audio = tone_rows()[0]["audio"]
    fits, long = outcomes(speech_task(), [{"audio": audio, "text": "a" * n} for n in (POSITIONS - 4, POSITIONS - 3)])
    assert len(fits.examples[0].arrays["labels"]) == POSITIONS
    assert isinstance(long, DataError)
    assert str(long).startswith(f"a.jsonl:2: text: has {POSITIONS + 1} tokens; the model can say {POSITIONS}")


def test_times_in_texts_are_a_setting() -> None:
    audio, text = tone_rows()[0]["audio"], "<|0.00|> low<|0.50|>"
    (timed,) = outcomes(speech_task(timestamps=True), [{"audio": audio, "text": text}])
    start, end = ids("0.00", "0.50")
    assert [each for each in timed.examples[0].arrays["labels"] if each >= start] == [start, end]
    (plain,) = outcomes(speech_task(timestamps=True), [{"audio": audio, "text": "low"}])
    (mixed,) = outcomes(speech_task(), [{"audio": audio, "text": text}])
    assert "has no times" in str(plain)
    assert "has times" in str(mixed)
    task = speech_task(timestamps=True)
    (answer,) = task.predict(model_of(task), table_of([{"audio": audio}])[1], PredictOptions())
    assert set(answer) == {"text", "chunks"}
    assert "<|" not in answer["text"]


def test_sounds_are_masked_in_training_alone() -> None:
    task, heard = speech_task("masked"), list[torch.Tensor]()
    model = model_of(task, "masked")
    model.get_encoder().conv1.register_forward_pre_hook(lambda _, args: heard.append(args[0].clone()))
    with torch.no_grad():
        task.loss(model, batch_of(task, training=False))
        assert torch.equal(heard[0], batch_of(task)["input_features"])
        task.loss(model.train(), batch_of(task))
    assert not torch.equal(heard[-1], heard[0])


@pytest.mark.slow
def test_a_masked_run_is_resumed_byte_for_byte(tmp_path: Path) -> None:
    recipe = CASES["speech_recognition"].write(tmp_path)
    settings = (f"base_model={whisper_base('masked')}", "training.save_strategy=steps", "training.save_steps=3")
    whole = run_recipe(recipe, *settings, f"training.output_dir={tmp_path}/whole")
    with pytest.raises(Interrupted):
        run_recipe(recipe, *settings, on_event=at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    np.random.random(5)
    assert run_recipe(recipe, *settings).weights == whole.weights


def test_error_rates() -> None:
    task, sums = speech_task(), {"loss": np.array(6.0)}

    def rates(pairs: list[tuple[str, str]], **settings: Any) -> list[float]:
        found = speech_task(**settings).metrics(sums, pairs, 3)
        assert found["loss"] == 2.0
        return [found["wer"], found["cer"]]

    assert rates([("one two", "one two"), ("Three.", "Three.")]) == [0, 0]
    assert rates([("one two", "one"), ("Three.", "three")]) == pytest.approx([2 / 3, 6 / 13])
    assert rates([("Colour, 2!", "color two")], normalize_text=True)[0] == pytest.approx(0.5)  # without the spellings
    assert rates([("今天天气很好。", "今天天气不好")], normalize_text=True, language="zh") == pytest.approx([1 / 6] * 2)
    assert rates([("<|0.00|> one<|0.50|>", "one")]) == [0, 0]
    assert rates([("one", "a b c")])[0] == 3
    assert task.lower_is_better == ("loss", "wer", "cer")


def test_a_clip_that_is_longer_than_the_model_hears_is_predicted_whole(tmp_path: Path) -> None:
    task, heard = speech_task(), list[int]()
    model = model_of(task)
    model.get_encoder().conv1.register_forward_pre_hook(lambda _, args: heard.append(len(args[0])))
    long = clip(tmp_path / "long.wav", tone(440.0, 2.5 * SECONDS))
    rows = table_of([{"audio": long}, tone_rows()[0], tone_rows()[1]])[1]
    answers = list(task.predict(model, rows, PredictOptions(batch_size=2)))
    assert [list(each) for each in answers] == [["text"]] * 3
    assert heard[0] == 2, "the others share a batch"
    assert len(heard) >= 4, "and three parts follow"
    (alone,) = task.predict(model, rows[1:2], PredictOptions())
    assert alone == answers[1]


def test_times_of_a_long_clip_are_those_of_the_whole(tmp_path: Path) -> None:
    task = speech_task(timestamps=True)
    model, known = model_of(task), task.tokenizer.get_vocab()
    said = [
        [*ids("0.50"), known["l"], *ids("1.00", "endoftext")],
        [*ids("1.40"), known["h"], *ids("1.80", "endoftext")],
    ]
    starts = len(task.prefix) + 1

    def say(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - starts
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, said[0][at]] = 0
        if at + 1 == len(said[0]):
            said.pop(0)
        return chosen

    generate = model.generate
    model.generate = lambda **options: generate(**options, logits_processor=[say])
    rows = table_of([{"audio": clip(tmp_path / "long.wav", tone(440.0, 2.0 * SECONDS))}])[1]
    (answer,) = task.predict(model, rows, PredictOptions())
    assert answer["chunks"] == [
        {"timestamp": [0.5, 1.0], "text": "l"},
        {"timestamp": [SECONDS + 1.4, SECONDS + 1.8], "text": "h"},
    ]


def test_beams() -> None:
    task = speech_task(num_beams=3)
    seen = decoder_inputs(model := model_of(task), lambda: task.loss(model, batch_of(task, training=False)))
    assert len(seen) == 3
    rows = list[int]()
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with torch.no_grad():
        task.loss(model, batch_of(task, training=False))
    assert max(rows) == 9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> trainkit.Trained:
    return run_recipe(CASES["speech_recognition"].write(tmp_path_factory.mktemp("speech")))


@pytest.mark.slow
def test_the_adapter_with_the_fewest_wrong_words_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([0.9, 0.2, 0.5])
    monkeypatch.setattr(TASK, "metrics", lambda *_: {"loss": 1.0, "wer": next(rates)})
    best = ("training.metric_for_best_model=eval_wer", "training.load_best_model_at_end=true")
    steps = ("strategy=steps", "steps=2")
    both = [f"training.{kind}_{each}" for kind in ("eval", "save") for each in steps]
    found = run_recipe(CASES["speech_recognition"].write(tmp_path), *best, *both, "training.max_steps=6").run["eval"]
    assert (found["best_step"], found["kept"]["eval_wer"]) == (4, 0.2)


def test_transformers_pipeline_answers_as_predict(run: trainkit.Trained, tmp_path: Path) -> None:
    folder, audio = run.folder, tone_rows()[1]["audio"]
    trainkit.reset_accelerate()
    assert main(["merge", str(folder), "--output", str(tmp_path / "merged")]) == 0
    task = speech_task()
    kept = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert (kept["language"], kept["task"]) == ("en", "transcribe")
    assert json.loads((folder / "task.json").read_text())["settings"]["language"] == "en"
    merged = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "merged")
    task.fit_model(merged, None)
    (expected,) = task.predict(merged.eval(), table_of([{"audio": audio}])[1], PredictOptions())
    sound = {"raw": soundfile.read(audio, dtype="float32")[0], "sampling_rate": RATE}
    for name in (tmp_path / "merged", folder):
        recognise = transformers.pipeline(
            "automatic-speech-recognition", model=str(name), tokenizer=str(folder), feature_extractor=str(folder)
        )
        settings = transformers.GenerationConfig.from_pretrained(folder)
        found = recognise(dict(sound), generate_kwargs={"generation_config": settings} if name == folder else {})
        assert found["text"].strip() == expected["text"]


def test_inspect_shows_lengths_and_finds_what_cannot_be_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = CASES["speech_recognition"].write(tmp_path)
    more = [
        {"audio": clip(tmp_path / "long.wav", tone(440.0, SECONDS + 0.5)), "text": "long"},
        {"audio": clip(tmp_path / "silent.wav", 1e-4 * tone()), "text": "hush"},
    ]
    trainkit.write_rows(tmp_path / "train.jsonl", [*tone_rows(), *more])
    assert main(["inspect", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    named = {each["name"]: each for each in found["findings"]}
    assert named["clips_too_long"]["rows"] == [f"{tmp_path}/train.jsonl:{len(tone_rows()) + 1}"]
    assert named["silent_clips"]["rows"] == [f"{tmp_path}/train.jsonl:{len(tone_rows()) + 2}"]
    assert found["audit"]["train"]["rows"] == len(tone_rows()) + 2
    assert main(["inspect", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "0.50 s" in out
    assert "low" in out


def test_answers_may_be_as_long_as_the_decoder_reads(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(moonshine_base(), tmp_path / "base"))
    config = json.loads((folder / "generation_config.json").read_text())
    del config["max_length"]
    (folder / "generation_config.json").write_text(json.dumps(config))
    row = TASKS["speech_recognition"]
    task = row.open(row.settings(), open_base(BaseModel(name=str(folder))))
    assert task.generation.max_length == task.base.config.max_position_embeddings


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    recipe = CASES["speech_recognition"].write(tmp_path)
    base = (f"base_model={moonshine_base()}", "task={type: speech_recognition, language: null}")
    done = run_recipe(recipe, *base, "training.eval_strategy=steps", "training.eval_steps=4")
    assert done.losses[-1] < done.losses[0]
    assert {"eval_wer", "eval_cer"} <= set(done.run["eval"]["last"])
    predictor = load_predictor(str(done.folder))
    answers = predictor.answer(table_of([{"audio": row["audio"]} for row in tone_rows()[:3]])[1])
    assert [list(each) for each in answers] == [["text"]] * 3
    refused = f"training.output_dir={tmp_path}/refused"
    with pytest.raises(DataError, match="setting of Whisper models"):
        run_recipe(recipe, *base[:1], refused)
    with pytest.raises(DataError, match="setting of Whisper models") as error:
        run_recipe(recipe, base[0], "task={type: speech_recognition, language: null, prompt: low}", refused)
    assert error.value.key == "task.prompt"
