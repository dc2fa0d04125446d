"""Speech recognition with CTC models: letters, the loss of any batch, rows that do not fit, long clips by windows."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from classifierkit import table_of
from safetensors.torch import load, save_file
from soundkit import RATE, clip, hearing_base, outcomes, tone, tone_rows, whisper_base
from taskkit import CASES
from trainkit import run_recipe, scratch

from peftcli.adapters.predict import load_predictor
from peftcli.cli.app import main
from peftcli.errors import DataError, ModelError
from peftcli.models.open import open_base
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions, in_batches, with_trained_head
from peftcli.tasks.ctc import BLANK, WORDS
from peftcli.tasks.scores import scores_on

LETTERS = [BLANK, WORDS, *sorted({*"lowhigh"})]


def open_task(base: Path | None = None, **settings: Any) -> Any:
    row = TASKS["speech_recognition"]
    opened = open_base(BaseModel(name=str(base or hearing_base("wav2vec2"))))
    task = row.open(row.settings(**settings), opened)
    if task.needs_scan:
        table, rows = table_of(tone_rows())
        task = row.open(task.scan([(table, iter(rows))]), opened)
    return task


def model_of(task: Any) -> Any:
    torch.manual_seed(0)
    return task.base.model("AutoModelForCTC", torch.float32, **task.model_options()).model.eval()


@functools.cache
def finetuned(letters: tuple[str, ...] = (*" EHOTLWIG",), pad: int = 0) -> Path:
    """A base model that writes letters already, as wav2vec2-base-960h does; ``pad``: the place of its blank."""
    folder = scratch() / f"finetuned-{len(letters)}-{pad}"
    names = ["<s>", "</s>", "<unk>", *(each.replace(" ", "|") for each in letters)]
    names.insert(pad, "[PAD]")
    words = scratch() / f"vocab-{pad}.json"
    words.write_text(json.dumps({name: number for number, name in enumerate(names)}))
    config = transformers.AutoConfig.from_pretrained(hearing_base("wav2vec2"))
    config.vocab_size, config.pad_token_id = len(names), pad
    torch.manual_seed(0)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    transformers.AutoFeatureExtractor.from_pretrained(hearing_base("wav2vec2")).save_pretrained(folder)
    transformers.Wav2Vec2CTCTokenizer(str(words), pad_token="[PAD]").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["wav2vec2", "wav2vec2-group", "hubert", "w2v-bert"])
def test_the_loss_is_the_models_own_and_that_of_its_parts(kind: str) -> None:
    task = open_task(hearing_base(kind))
    model, examples = model_of(task), [each.examples[0] for each in outcomes(task, tone_rows())]
    assert task.vocabulary == LETTERS
    assert [each.num_targets for each in examples[:3]] == [3, 4, 8]
    batch = task.collate(examples[:1], training=True)
    own = model(**{name: value for name, value in batch.items() if name[0] != "_"}, labels=batch["_labels"])
    model.config.ctc_loss_reduction = "sum"
    assert task.loss(model, batch).total.item() == pytest.approx(own.loss.item(), rel=1e-5)
    whole = task.loss(model, task.collate(examples, training=True)).total.item()
    parts = sum(task.loss(model, task.collate([each], training=True)).total.item() for each in examples)
    apart = 1e-2 if kind == "wav2vec2-group" else 1e-5  # its norm hears the silence that pads
    assert whole == pytest.approx(parts, rel=apart)


@pytest.mark.parametrize("kind", ["wav2vec2", "w2v-bert"])
def test_a_clip_alone_and_in_a_batch_has_the_same_text(kind: str) -> None:
    task = open_task(hearing_base(kind))
    model, rows = model_of(task), table_of([{"audio": row["audio"]} for row in tone_rows()])[1]
    together, alone = (list(task.predict(model, rows, PredictOptions(batch_size=size))) for size in (6, 1))
    assert together == alone
    assert any(each["text"] for each in alone)


def test_what_a_model_of_sixteen_bits_says_is_recorded() -> None:
    task = open_task(hearing_base("w2v-bert"))
    model = model_of(task)
    expected = scores_on(model, task.probe(), bf16=False)
    found = scores_on(model.to(torch.bfloat16), task.probe(), bf16=True)
    assert (found - expected).abs().max() < 0.1 * expected.std()


def test_texts_are_those_of_transformers_tokenizer() -> None:
    task = open_task()
    outputs = torch.randint(len(LETTERS), (50,), generator=torch.Generator().manual_seed(0)).tolist()
    assert task.text_of(outputs) == " ".join(task.tokenizer.decode(outputs).split())
    low, o, w = (LETTERS.index(each) for each in "low")
    assert task.text_of([0, low, low, 0, low, o, 1, 1, 0, 1, w, w]) == "llo w"


def test_letters_are_found_given_or_those_of_the_base_model() -> None:
    assert open_task(vocabulary=["a", "b"]).vocabulary == [BLANK, WORDS, "a", "b"]
    with pytest.raises(DataError, match="expected single letters, found 'ch'"):
        open_task(vocabulary=["ch"])
    for pad in (0, 12):
        task = open_task(finetuned(pad=pad))
        assert task.found == "vocabulary: 8 letters of the base model: E H O T L W I G"
        assert task.blank == pad
        assert task.model_options() == {"vocab_size": 13, "pad_token_id": pad}
        loaded = task.base.model("AutoModelForCTC", torch.float32, **task.model_options())
        assert (with_trained_head(loaded, task).initialised, task.outputs_are_new) == ((), False)
    (found,) = outcomes(task, tone_rows()[:1])
    assert found.examples[0].arrays["text"] == "LOW", "which has no lower case"


def test_a_head_for_as_many_other_letters_is_trained() -> None:
    task = open_task(finetuned(), vocabulary=[*"lowhigabcde"])
    loaded = task.base.model("AutoModelForCTC", torch.float32, **task.model_options())
    assert len(task.vocabulary) == task.base.config.vocab_size
    found = with_trained_head(loaded, task)
    assert found.initialised == ("lm_head.weight", "lm_head.bias")
    assert "was made for other labels, and is trained too" in str(found.note)


def test_rows_that_cannot_be_written_are_errors_of_their_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio, short = tone_rows()[0]["audio"], clip(tmp_path / "short.wav", tone()[: RATE // 4])
    task = open_task()
    texts = ["l" * 6, "l" * 7, "lo" * 6, "lo" * 6 + "l"]  # for the 12 frames of a quarter of a second
    found = outcomes(task, [{"audio": short, "text": text} for text in texts])
    assert [isinstance(each, DataError) for each in found] == [False, True, False, True], "between two is a blank"
    assert "text: needs 13 frames, and 0.25 s of sound give the model 12" in str(found[3])
    (unknown,) = outcomes(task, [{"audio": audio, "text": "low, higher"}])
    assert "has letters that the vocabulary lacks: , e r" in str(unknown)
    recipe = CASES["letters of sounds"].write(tmp_path)
    for row in ({"audio": short, "text": "low low low low"}, {"audio": audio, "text": "low!"}):
        (tmp_path / "eval.jsonl").write_text(json.dumps(row) + "\n")
        assert main(["train", str(recipe)]) == 3
        assert "eval.jsonl:1: text: " in capsys.readouterr().err
        assert not (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("base", "settings", "says"),
    [
        (hearing_base, {"language": "en"}, "task.language: is a setting of models that write tokens"),
        (hearing_base, {"num_beams": 2}, "task.num_beams: is a setting of models that write tokens"),
        (lambda _: whisper_base(), {"vocabulary": ["a"]}, "task.vocabulary: is a setting of CTC models"),
    ],
)
def test_settings_of_another_kind_of_model_are_refused(base: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        open_task(base("wav2vec2"), **settings)


def test_a_long_clip_is_heard_by_windows(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(hearing_base("wav2vec2"))
    config.num_hidden_layers = 0  # no frame hears what is seconds away
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "base")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "base")
    task = open_task(tmp_path / "base")
    model, noise = model_of(task), np.random.default_rng(0).normal(0, 0.1, 70 * RATE + 77).astype(np.float32)
    with torch.no_grad():
        model.lm_head.weight *= 20
    rows = table_of(
        [
            {"audio": clip(tmp_path / f"{seconds}.wav", noise[: int(seconds * RATE)])}
            for seconds in (5, 28, 28.01, 47.9, 48.1, 70.1)
        ]
    )[1]
    examples = [
        task._encode_sound(row, task.read(table_of([{"audio": "", "text": ""}])[0])).examples[0] for row in rows
    ]
    whole = in_batches(examples, 1, lambda some: task._outputs(model, map(task._samples, some)))
    heard = list[int]()
    model.register_forward_pre_hook(
        lambda _, args, given: heard.append(given["input_values"].shape[1]), with_kwargs=True
    )
    answers = list(task.predict(model, rows, PredictOptions()))
    assert [each["text"] for each in answers] == [task.text_of(each) for each in whole]
    assert [len([*task._windows(model, each)]) for each in examples[2:]] == [len(each) for each in whole[2:]]
    assert max(heard) == 28 * RATE
    assert len({each["text"] for each in answers}) == 6


def test_a_model_with_adapters_of_languages_trains(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(hearing_base("wav2vec2"))
    config.adapter_attn_dim, config.do_stable_layer_norm, config.vocab_size = 4, True, 3
    several = transformers.Wav2Vec2ForCTC(config)
    several.save_pretrained(tmp_path / "several")
    one = {name: value.data.clone() for name, value in several._get_adapters().items()}
    letters = {each: number for number, each in enumerate([BLANK, WORDS, *"ghilowä"])}
    one |= {"lm_head.weight": torch.randn(len(letters), 32), "lm_head.bias": torch.zeros(len(letters))}
    save_file(one, tmp_path / "several/adapter.deu.safetensors")
    (tmp_path / "vocab.json").write_text(json.dumps({"deu": letters, "eng": {BLANK: 0, WORDS: 1, "a": 2}}))

    base = tmp_path / "base"  # as the page says
    options = {"target_lang": "deu", "ignore_mismatched_sizes": True}
    transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path / "several", **options).save_pretrained(base)
    transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), target_lang="deu").save_pretrained(base)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(base)
    assert open_task(base).found == "vocabulary: 7 letters of the base model: g h i l o w ä"
    run = run_recipe(CASES["letters of sounds"].write(tmp_path), f"base_model={base}")
    trained = {part for name in load(run.weights) for part in name.split(".")}
    assert ("linear_1" in trained, "lm_head" in trained) == (True, False)


def test_an_adapter_goes_on_with_its_letters_alone(tmp_path: Path) -> None:
    recipe = CASES["letters of sounds"].write(tmp_path)
    first = run_recipe(recipe)
    again = (f"training.init_adapter_from={first.folder}", f"training.output_dir={tmp_path}/again")
    with pytest.raises((DataError, ModelError), match=r"task\.vocabulary"):
        run_recipe(recipe, *again, "task={type: speech_recognition, vocabulary: [g, h, i, l, w, o]}")
    run_recipe(recipe, *again)


def test_an_adapter_of_another_tool_writes_the_letters_of_its_base_model(tmp_path: Path) -> None:
    run = run_recipe(CASES["letters of sounds"].write(tmp_path), f"base_model={finetuned()}")
    rows, answers = table_of([{"audio": tone_rows()[0]["audio"]}])[1], []
    for _ in range(2):
        answers.append(load_predictor(str(run.folder)).answer(rows))
        for name in ("task.json", "run.json"):
            (run.folder / name).unlink(missing_ok=True)
    assert answers[0] == answers[1]
    assert answers[0][0]["text"].isupper()
