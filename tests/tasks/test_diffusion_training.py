"""What training of text_to_image can do to its pictures, captions and steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusionkit import picture_files, pipeline_base
from PIL import Image
from taskkit import CASES, EDITED
from trainkit import resumed_and_whole, run_recipe, write_rows

from peftcli.data.rows import Place, Row, Table
from peftcli.data.store import Example
from peftcli.errors import DataError
from peftcli.models import diffusion
from peftcli.models.open import open_base
from peftcli.schema import BaseModel, Source
from peftcli.tasks import TASKS
from peftcli.tasks.text_to_image import bucket_sizes

SHAPES = ((32, 32), (32, 64), (32, 32), (64, 32))
"""Heights and widths."""


def open_task(kind: str = "sd", **settings: Any) -> Any:
    base = open_base(BaseModel(name=str(pipeline_base(kind))))
    return TASKS["text_to_image"].open(TASKS["text_to_image"].settings(resolution=32, **settings), base)


def examples(task: Any, paths: Sequence[Path], draw: int = 0) -> list[Example]:
    rows = [Row({"image": str(path), "text": path.stem}, Place("rows.jsonl", at)) for at, path in enumerate(paths, 1)]
    reader = task.read(Table(Source(train=""), "rows", ("image", "text")))
    found = [example for outcome in task.encode(rows, reader) for example in outcome.examples]
    for example in found:
        example.draw = draw
    return found


def loaded(task: Any) -> Any:
    return task.base.model("DiffusionPipeline", torch.float32).model


# --- min-SNR ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_those_of_the_paper(kind: str) -> None:
    """The loss of the clean picture, weighed by min(SNR, gamma), as a loss of what is predicted."""
    import diffusers

    noise = diffusion.noise_of(diffusers.DDPMScheduler(prediction_type=kind))
    assert isinstance(noise, diffusion.Discrete)
    steps = torch.tensor([0, 100, 500, 999])
    alphas = noise.scheduler.alphas_cumprod[steps].double()
    ratio = alphas / (1 - alphas)
    assert ratio[0] > 5 > ratio[2]
    clean, drawn = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    noisy, _, target = noise(clean, drawn, (steps + 0.5) / 1000)
    off = target + 0.1  # and the clean picture that it implies
    root, rest = (each.sqrt()[:, None, None, None] for each in (alphas, 1 - alphas))
    implied = {
        "epsilon": (noisy - rest * off) / root,
        "v_prediction": root * noisy - rest * off,
        "sample": off,
    }[kind]
    expected = ratio.clamp(max=5) * (implied - clean).square().mean((1, 2, 3))
    found = noise.weights(steps, 5.0) * (off - target).square().mean((1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_min_snr_weighs_training_alone() -> None:
    paths = picture_files(12)[:2]
    plain, weighed = open_task(), open_task(snr_gamma=1e-3)
    model = loaded(plain)
    losses = {}
    for training in (True, False):
        model.train(training)
        each = [task.collate(examples(task, paths, draw=3), training=training) for task in (plain, weighed)]
        losses[training] = [
            task.loss(model, batch).total.item() for task, batch in zip((plain, weighed), each, strict=True)
        ]
    assert losses[True][1] < 0.9 * losses[True][0]
    assert losses[False][1] == losses[False][0], "evaluations stay comparable"


def test_min_snr_of_a_flow_is_refused() -> None:
    with pytest.raises(DataError, match="FluxPipeline predicts a flow") as caught:
        open_task("flux", snr_gamma=5.0)
    assert caught.value.key == "task.snr_gamma"


# --- captions ---------------------------------------------------------------------------------------------------------


def test_a_share_of_captions_is_left_out() -> None:
    task, [path] = open_task(caption_dropout=0.25), picture_files(12)[:1]
    prompts = [task.collate(examples(task, [path], draw), training=True)["prompts"][0] for draw in range(1, 401)]
    again = [task.collate(examples(task, [path], draw), training=True)["prompts"][0] for draw in range(1, 401)]
    assert prompts == again, "drawn by seed, step and row"
    assert 75 < prompts.count("") < 125
    assert {*prompts} == {"", path.stem}
    assert task.collate(examples(task, [path]), training=False)["prompts"] == [path.stem]


# --- buckets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "step"), [(512, 8), (1024, 16), (1024, 32), (32, 2)])
def test_buckets_have_the_area_of_the_square(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes
    assert {size[::-1] for size in sizes} == {*sizes}
    assert (2 * resolution, resolution // 2) in sizes
    assert len({*sizes}) == len(sizes)
    assert all(side % step == 0 for size in sizes for side in size)
    areas = np.array([width * height / resolution**2 for width, height in sizes])
    assert areas.max() <= 1
    assert areas.min() > 0.85


def test_pictures_keep_their_shape() -> None:
    task = open_task(buckets=True, class_prompt="a thing")
    found = examples(task, picture_files(12, SHAPES)[:4], draw=1)
    batch = task.collate(found, training=True)
    assert [tuple(each.read().shape[1:]) for each in batch["pictures"]] == [(32, 32), (22, 44), (32, 32), (44, 22)]
    assert batch["sizes"][1].tolist()[4:] == [22, 44]
    task.priors = [task.collate(found[:1], training=True)["pictures"][0].read.stored]
    pictures = task.collate(found[1:2], training=True)["pictures"]
    assert [tuple(each.read().shape[1:]) for each in pictures] == [(22, 44)] * 2, "a prior's is that beside it"


def test_a_loss_of_several_sizes_is_the_sum_of_those_of_each() -> None:
    task = open_task(buckets=True)
    found = examples(task, picture_files(12, SHAPES)[:4], draw=1)
    model = loaded(task).train()
    alone = sum(task.loss(model, task.collate([each], training=True)).total for each in found)
    together = task.loss(model, task.collate(found, training=True)).total
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_batches_of_a_run_have_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    predict = diffusion.DiffusionModel.predict

    def record(model: Any, noisy: Any, steps: Any, given: Any) -> Any:
        seen.append((model.training, {tuple(size) for size in given["sizes"][:, 4:].tolist()}, len(noisy)))
        return predict(model, noisy, steps, given)

    monkeypatch.setattr(diffusion.DiffusionModel, "predict", record)
    recipe = CASES["pictures of several shapes"].write(tmp_path)
    done = run_recipe(recipe, "training.verify=false", "training.compare_with_base=false")
    trained = [each for each in seen if each[0]]
    assert {len(sizes) for _, sizes, _ in seen} == {1}
    assert {next(iter(sizes)) for _, sizes, _ in trained} == {(32, 32), (22, 44), (44, 22)}
    assert len(trained) == done.run["steps"]["done"], "no batch is computed in parts"


# --- latents on disk --------------------------------------------------------------------------------------------------


def test_latents_are_kept_by_model_picture_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path))
    encoded, moments = [], diffusion.DiffusionModel._moments

    def record(model: Any, picture: diffusion.Picture) -> Any:
        encoded.append(picture)
        return moments(model, picture)

    monkeypatch.setattr(diffusion.DiffusionModel, "_moments", record)
    paths = picture_files(12)[:3]

    def count(kind: str = "sd", **settings: Any) -> tuple[int, float]:
        task, before = open_task(kind, **settings), len(encoded)
        model = loaded(task).train()
        task.begin(model, False)
        total = task.loss(model, task.collate(examples(task, paths, draw=1), training=True)).total.item()
        return len(encoded) - before, total

    first = count(cache_latents=True)
    assert first == (3, count()[1]), "nothing else changes"
    assert count(cache_latents=True) == (0, first[1])
    assert count("v", cache_latents=True)[0] == 0, "the same autoencoder in another pipeline"
    assert count("sdxl", cache_latents=True)[0] == 3
    files = sorted(tmp_path.glob("latents/*/*.safetensors"))
    assert len(files) == 6
    for each in files:
        each.write_bytes(each.read_bytes()[:50])
    assert count(cache_latents=True) == first, "a damaged file is made again"
    assert count(cache_latents=True)[0] == 0


def test_latents_of_random_crops_are_not_kept() -> None:
    with pytest.raises(DataError, match=r"task\.center_crop: false draws a new crop") as caught:
        open_task(cache_latents=True, center_crop=False)
    assert caught.value.key == "task.cache_latents"


# --- editing ----------------------------------------------------------------------------------------------------------


def edits(task: Any, paths: Sequence[Path]) -> list[Example]:
    names = ("input_image", "instruction", "target")
    rows = [Row(dict(zip(names, (str(paths[0]), "do it", str(path)), strict=True)), Place("a", 1)) for path in paths]
    reader = task.read(Table(Source(train=""), "rows", names))
    return [example for outcome in task.encode(rows, reader) for example in outcome.examples]


def test_an_edit_is_cut_as_its_source() -> None:
    task, paths = open_task("flux_kontext", random_flip=True, center_crop=False), picture_files(12)[:2]
    [same, _] = edits(task, paths)
    for same.draw in range(1, 9):
        batch = task.collate([same], training=True)
        assert (batch["sources"][0].read() == batch["pictures"][0].read()).all(), "at the same place, mirrored together"
    assert [part.source for part in task.show(same).parts[:2]] == [str(paths[0])] * 2


def test_what_is_edited_decides_what_is_predicted() -> None:
    task, paths = open_task("flux_kontext"), picture_files(12)[:2]
    model = loaded(task).eval()
    [_, example] = edits(task, paths)
    batch = task.collate([example], training=False)
    assert (batch["sources"][0].read() != batch["pictures"][0].read()).any()
    batch["times"] = torch.tensor([0.5])
    inputs = {name: value for name, value in batch.items() if name != "_weights"}
    given, other = model(**inputs), model(**{**inputs, "sources": batch["pictures"]})
    torch.testing.assert_close(given.target, other.target)
    assert (given.sample - other.sample).abs().max() > 1e-3


@pytest.mark.slow
def test_edits_are_resumed_exactly_and_predicted(tmp_path: Path, cli: Callable[..., str]) -> None:
    resumed, whole = resumed_and_whole(EDITED.write(tmp_path), "training.eval_strategy=steps", "training.eval_steps=3")
    assert resumed.losses == whole.losses
    assert resumed.run["eval"]["last"] == whole.run["eval"]["last"]
    asked = write_rows(
        tmp_path / "asked.jsonl", [{"source": str(path), "text": "do it", "seed": 1} for path in picture_files(12)[:2]]
    )
    cli("predict", whole.folder, "--input", asked, "--output", tmp_path / "answers.jsonl")
    one, other = (json.loads(line)["image"] for line in (tmp_path / "answers.jsonl").read_text().splitlines())
    assert Image.open(one).tobytes() != Image.open(other).tobytes()


def test_an_editing_model_makes_no_pictures_without_a_source() -> None:
    for name, value in (("class_prompt", "a dog"), ("sample_prompts", ["a dog"])):
        with pytest.raises(DataError, match="FluxKontextPipeline edits them") as caught:
            open_task("flux_kontext", **{name: value})
        assert caught.value.key == f"task.{name}"
