"""Text to image: what a row becomes, what is predicted and made once, and that diffusers makes the same pictures."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainkit
from diffusionkit import LARGE, SIDE, picture_files, pipeline_base
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from taskkit import CASES
from trainkit import Child, Trained, ranks, run_recipe

from peftcli.adapters.combine import combine_adapters
from peftcli.adapters.push import _contents
from peftcli.core.inject import disabled
from peftcli.data.rows import Place, Row, Table
from peftcli.data.store import Example
from peftcli.errors import DataError, ModelError, PeftcliError
from peftcli.models import diffusion
from peftcli.models.open import open_base
from peftcli.schema import BaseModel, Quantization, Source
from peftcli.tasks import TASKS
from peftcli.tasks.base import PredictOptions
from peftcli.tasks.text_to_image import TextToImage

NAME = "text_to_image"
MAKING = {"num_inference_steps": 2}


def open_task(kind: str = "sd", base: Path | None = None, **settings: Any) -> Any:
    opened = open_base(BaseModel(name=str(base or pipeline_base(kind))))
    return TASKS[NAME].open(TASKS[NAME].settings(**MAKING | settings), opened)


def encoded(task: Any, rows: Sequence[dict[str, Any]]) -> list[Any]:
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    reader = task.read(Table(Source(train=""), "rows", columns))
    return task.encode([Row(row, Place("rows.jsonl", at)) for at, row in enumerate(rows, 1)], reader)


def examples(task: Any, rows: Sequence[dict[str, Any]]) -> list[Example]:
    return [example for outcome in encoded(task, rows) for example in outcome.examples]


def loaded(task: Any) -> Any:
    return task.base.model("DiffusionPipeline", torch.float32, **task.model_options()).model


def captioned() -> list[dict[str, Any]]:
    return [{"image": str(path), "text": f"picture {at}"} for at, path in enumerate(picture_files(12))]


@pytest.fixture
def dreambooth(tmp_path: Path) -> Callable[..., Trained]:
    """A run on a folder of pictures, whose prompt the recipe says."""
    for path in picture_files(12)[:4]:
        (tmp_path / "dog").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "dog")

    def run(*overrides: str, name: str = "out") -> Trained:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"""\
base_model: {pipeline_base("sd")}
task: {{type: text_to_image, instance_prompt: a photo of sks dog, num_inference_steps: 2}}
method: {{type: lora, r: 4, lora_alpha: 8}}
dataset: {{train: {tmp_path}/dog}}
training: {{max_steps: 2, learning_rate: 1e-2, per_device_train_batch_size: 2, bf16: false, save_strategy: "no"}}
"""
        )
        return run_recipe(path, f"training.output_dir={tmp_path}/{name}", *overrides)

    return run


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_a_picture_and_its_prompt(tmp_path: Path) -> None:
    path = str(picture_files(12)[0])
    Image.new("RGB", (20, 40)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(Path(path).read_bytes()[:60])
    rows = [
        {"image": path, "text": " a red dog "},
        {"image": path, "text": ""},
        {"image": str(tmp_path / "small.png"), "text": "small"},
        {"image": str(tmp_path / "broken.png"), "text": "broken"},
        {"image": path, "text": 3},
    ]
    plain, dreambooth = encoded(open_task(), rows), encoded(open_task(instance_prompt="a photo of sks dog"), rows)
    prompts = [each.examples[0].arrays["prompt"] for each in (*plain[:3], *dreambooth[:3])]
    assert prompts == ["a red dog", "", "small", "a red dog", "a photo of sks dog", "small"]
    assert [each.flags for each in plain[:3]] == [0, 2, 1], "no caption, a small picture"
    assert [each.flags for each in dreambooth[:3]] == [0, 0, 1]
    assert [str(each.message) for each in plain[3:]] == [
        f"row 4: {tmp_path}/broken.png: the picture cannot be read: image file is truncated",
        "row 5: expected a text, found 3",
    ]


@pytest.mark.parametrize(("kind", "longest"), [("sd", 77), ("sdxl", 77), ("sd3", 256), ("flux", 512)])
def test_a_caption_that_no_encoder_reads_to_its_end_is_found(kind: str, longest: int) -> None:
    task, path = open_task(kind), str(picture_files(12)[0])
    # each letter is a token, and two more are added
    rows = [{"image": path, "text": "a" * count} for count in (longest - 2, longest - 1)]
    assert [each.flags & 4 for each in encoded(task, rows)] == [0, 4]


@pytest.mark.parametrize(
    ("key", "value"), [("class_data_dir", "dogs"), ("num_class_images", 5), ("prior_loss_weight", 0.5)]
)
def test_settings_of_class_pictures_need_a_class_prompt(key: str, value: Any) -> None:
    with pytest.raises(DataError, match=r"task\.class_prompt, which is missing") as caught:
        open_task(**{key: value})
    assert caught.value.key == f"task.{key}"
    assert open_task(class_prompt="a dog", **{key: value})


def test_a_class_picture_that_is_no_file_is_an_error_of_data(tmp_path: Path) -> None:
    (tmp_path / "dog.png").mkdir()
    task = open_task(class_prompt="a dog", class_data_dir=str(tmp_path))
    with pytest.raises(DataError, match="is a folder, and no file") as caught:
        task.begin(torch.nn.Module(), False)
    assert caught.value.file == str(tmp_path / "dog.png")


def test_rows_without_prompts_need_one_of_the_recipe() -> None:
    rows = [{"image": str(picture_files(12)[0])}]
    with pytest.raises(DataError, match="no column 'text' or 'caption' or 'prompt'"):
        encoded(open_task(), rows)
    assert len(examples(open_task(instance_prompt="a dog"), rows)) == 1


def test_a_picture_is_scaled_and_cut(tmp_path: Path) -> None:
    pixels = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    pixels[:, SIDE // 2 : SIDE] = 255  # the left half of the middle
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    row = {"image": str(tmp_path / "wide.png"), "text": "half"}

    def seen(draw: int = 1, **settings: Any) -> tuple[torch.Tensor, list[int], bool]:
        task = open_task(**settings)
        [example] = examples(task, [row])
        example.draw = draw
        batch = task.collate([example], training=True)
        return batch["pictures"][0].read(), batch["sizes"][0].tolist(), batch["pictures"][0].key is not None

    middle, sizes, kept = seen()
    assert sizes == [SIDE, 2 * SIDE, 0, SIDE // 2, SIDE, SIDE], "what Stable Diffusion XL is told of a picture"
    assert kept, "it is the same at each step"
    assert (middle[:, :, : SIDE // 2] == 1).all()
    assert (middle[:, :, SIDE // 2 :] == -1).all()
    flips = [seen(draw, random_flip=True) for draw in range(8)]
    assert {bool((each == middle).all()) for each, _, _ in flips} == {True, False}
    assert {bool((each == middle.flip(2)).all()) for each, _, _ in flips} == {True, False}
    cuts = [seen(draw, center_crop=False) for draw in range(8)]
    assert len({where[3] for _, where, _ in cuts}) > 4
    assert all(kept for _, _, kept in flips)
    assert not any(kept for _, _, kept in cuts)


# --- what is predicted ------------------------------------------------------------------------------------------------


def test_the_scheduler_says_what_is_predicted() -> None:
    import diffusers

    clean, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.5])
    alphas = diffusers.DDPMScheduler().alphas_cumprod[torch.tensor([100, 500])][:, None, None, None]
    noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    targets = {
        "epsilon": noise,
        "v_prediction": alphas.sqrt() * noise - (1 - alphas).sqrt() * clean,
        "sample": clean,
    }
    for kind, target in targets.items():  # of whichever class, by its settings
        found = diffusion.noise_of(diffusers.EulerDiscreteScheduler(prediction_type=kind))(clean, noise, times)
        torch.testing.assert_close(found[0], noisy)
        assert found[1].tolist() == [100, 500]
        torch.testing.assert_close(found[2], target)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = diffusion.noise_of(flow)(clean, noise, times)
    sigmas = (found[1] / 1000)[:, None, None, None]
    torch.testing.assert_close(found[0], (1 - sigmas) * clean + sigmas * noise)
    torch.testing.assert_close(found[2], noise - clean)
    assert found[1][1] == pytest.approx(750, abs=2), "half of the way, as the shift has it"
    with pytest.raises(ModelError, match="flow_prediction"):
        diffusion.noise_of(diffusers.EulerDiscreteScheduler(prediction_type="flow_prediction"))
    for other in (diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler):
        with pytest.raises(ModelError, match=other.__name__):
            diffusion.noise_of(other())


def test_noise_hangs_on_the_draw_alone_and_evaluation_draws_the_same_each_time() -> None:
    task = open_task()
    model = loaded(task)
    first, second = examples(task, captioned()[:2])
    first.draw = second.draw = 7

    def error(*each: Example) -> list[float]:
        batch = task.collate(each, training=True)
        found = model(**{name: value for name, value in batch.items() if name != "_weights"})
        return (found.sample - found.target).square().mean((1, 2, 3)).tolist()

    alone, together = error(first), error(second, first)
    assert alone[0] == pytest.approx(together[1], rel=1e-5)
    first.draw = 8
    assert error(first) != pytest.approx(alone, rel=1e-3)
    first.draw = 0
    model.eval()
    totals = [task.loss(model, task.collate([first], training=False)).total.item() for _ in range(2)]
    assert totals[0] == totals[1]


@pytest.mark.grid
@pytest.mark.parametrize("settings", [{}, {"random_flip": True}, {"train_text_encoder": True}], ids=str)
def test_what_nothing_changes_is_computed_once(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    task = open_task(**settings)
    model, counts = loaded(task), {"pictures": 0, "prompts": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(model.pipeline.vae, "encode", counted("pictures", model.pipeline.vae.encode))
    monkeypatch.setattr(model.pipeline, "encode_prompt", counted("prompts", model.pipeline.encode_prompt))
    rows = examples(task, captioned()[:3])
    for draw in range(1, 4):
        for each in rows:
            each.draw = draw
        task.loss(model, task.collate(rows, training=True))
    assert counts == {
        "pictures": 5 if settings.get("random_flip") else 3,  # two of them mirrored, too
        "prompts": 3,  # each, or each step's batch
    }


# --- prior preservation -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_priors_are_made_once_and_kept_by_model_prompt_and_seed(
    dreambooth: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = list[tuple[str, int]]()
    real = diffusion.DiffusionModel.pictures

    def pictures(model: Any, prompts: Sequence[str], seeds: Sequence[int], *args: Any, **options: Any) -> Any:
        made.extend(zip(prompts, seeds, strict=True))
        return real(model, prompts, seeds, *args, **options)

    monkeypatch.setattr(diffusion.DiffusionModel, "pictures", pictures)
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    prior = ("task.class_prompt=a photo of a dog", "task.num_class_images=2")
    plain, first = dreambooth(name="plain"), dreambooth(*prior)
    assert made == [("a photo of a dog", 0), ("a photo of a dog", 1)]
    files = sorted((tmp_path / "cache/pictures").rglob("*.png"))
    assert [path.name for path in files] == ["0.png", "1.png"]
    again = dreambooth(*prior, "task.num_class_images=3", "method.init_lora_weights=false", name="more")
    assert made[2:] == [("a photo of a dog", 2)], "by the base model, whatever the adapter begins with"
    dreambooth("task.class_prompt=a photo of a cat", "task.num_class_images=1", name="cat")
    assert made[3:] == [("a photo of a cat", 0)]
    assert first.losses[0] > plain.losses[0] * 1.5, "they count beside the pictures"
    half = dreambooth(*prior, "task.prior_loss_weight=0.5", name="half").losses[0]
    assert half - plain.losses[0] == pytest.approx((first.losses[0] - plain.losses[0]) / 2, rel=1e-4)
    own = dreambooth("task.class_prompt=a dog", f"task.class_data_dir={files[0].parent}", name="own")
    assert len(made) == 4, "the folder's are taken"
    assert own.losses[0] != plain.losses[0]
    assert again.run["status"] == "complete"


@dataclass(frozen=True)
class SlowPriors:
    """What a process notes of the pictures that it makes; the second one begins when there is one already."""

    cache: Path
    noted: Path

    def __call__(self) -> None:
        make, find = TextToImage._make, TextToImage._class_pictures

        def noting(task: Any, model: Any, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
            (self.noted / f"{os.environ['RANK']} makes {seeds[0]}").touch(exist_ok=False)
            return make(task, model, prompts, seeds)

        def waiting(task: Any, model: Any, prompt: str) -> Any:
            while os.environ["RANK"] == "1" and not [*self.cache.rglob("*.png")]:
                time.sleep(0.01)
            return find(task, model, prompt)

        TextToImage._make, TextToImage._class_pictures = noting, waiting


@pytest.mark.slow
def test_two_processes_make_each_prior_once_and_train_on_the_same(
    dreambooth: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prior = ("task.class_prompt=a photo of a dog", "task.num_class_images=5")
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "of one"))
    one = dreambooth(*prior, name="one")
    (noted := tmp_path / "noted").mkdir()
    cache, two = tmp_path / "of two", tmp_path / "two"
    settings = (*prior, f"training.output_dir={two}", "training.per_device_train_batch_size=1")
    children = [
        Child(tmp_path, "train", tmp_path / "recipe.yaml", *settings, env=each, before=SlowPriors(cache, noted))
        for each in ranks(PEFTCLI_CACHE=str(cache))
    ]
    assert [child.wait() for child in children] == [0, 0], children[0].err
    assert sorted(path.name for path in noted.iterdir()) == [f"{seed % 2} makes {seed}" for seed in (0, 2, 4, 1, 3)]
    same = [
        sorted(path.read_bytes() for path in tmp_path.glob(f"{name}/pictures/*/*.png")) for name in ("of one", "of two")
    ]
    assert same[0] == same[1]
    losses = [entry["loss"] for entry in trainkit.read_metrics(two) if "loss" in entry]
    assert losses == pytest.approx(one.losses, rel=1e-4)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run whose layers differ in rank and strength, which evaluates and makes pictures."""
    recipe = CASES[NAME].write(tmp_path_factory.mktemp("run"))
    return run_recipe(
        recipe,
        "method.rank_pattern={to_v: 2}",
        "task.sample_prompts=[a red dog]",
        "training.eval_strategy=steps",
        "training.eval_steps=3",
    )


def picture(pipeline: Any) -> np.ndarray:
    draw = torch.Generator().manual_seed(3)
    made = pipeline("a red dog", num_inference_steps=2, height=SIDE, width=SIDE, generator=draw, output_type="np")
    return made.images[0]


def ours(folder: Path) -> np.ndarray:
    from peftcli.adapters.load import apply_adapter, find_adapter

    source = find_adapter(str(folder))
    found = open_base(source.base).model("", torch.float32, **source.recorded_options)
    with disabled(found.model):
        plain = picture(found.model.pipeline)
    apply_adapter(found, source)
    made = picture(found.model.pipeline)
    assert np.abs(made - plain).max() > 0.01, "the adapter shows"
    return made


def test_a_run_learns_and_evaluation_makes_the_sample_pictures(run: Trained) -> None:
    assert run.losses[-1] < run.losses[0]
    assert run.run["eval"]["last"]["eval_loss"] == run.run["eval"]["best"]["eval_loss"]
    assert run.run["eval"]["best_step"] == 6
    names = [path.name for path in sorted((run.folder / "samples").iterdir())]
    assert names == ["step-000003-0.png", "step-000006-0.png"]
    first, last = (np.asarray(Image.open(run.folder / "samples" / name), np.int64) for name in names)
    assert first.shape == (SIDE, SIDE, 3)
    assert np.abs(first - last).max() > 0
    page = (run.folder / "report.html").read_text()
    pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="a red dog, step ([36])">', page)
    assert [step for _, step in pictures] == ["3", "6"]
    shown = Image.open(io.BytesIO(base64.b64decode(pictures[1][0])))
    assert np.corrcoef(np.asarray(shown).ravel(), last.ravel())[0, 1] > 0.6
    assert "Samples" not in (run.folder / "report.md").read_text()


@pytest.mark.parametrize("header", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_diffusers_makes_the_same_picture(run: Trained, tmp_path: Path, header: bool) -> None:
    """With the config in the file's header, and for readers that do not look there."""
    import diffusers

    path = run.folder / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["lora_adapter_metadata"])
        names = list(file.keys())
    assert all(name.startswith("unet.") and name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    assert described["unet.lora_alpha"] == described["unet.r"] == 4
    assert described["unet.alpha_pattern"] == described["unet.rank_pattern"] == {"to_v": 2}
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_base("sd"))
    if not header:
        save_file(load_file(path), path := tmp_path / "plain.safetensors", {"format": "pt"})
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    np.testing.assert_allclose(picture(pipeline), ours(run.folder), atol=1e-5)


def test_combined_and_pushed_every_file_says_the_same(run: Trained, tmp_path: Path, cli: Callable[..., str]) -> None:
    """Diffusers' file holds the combined weights, and each part's config names the base model on the hub."""
    import diffusers

    said = cli("combine", f"{run.folder}=0.5", "--output", tmp_path / "half")
    assert f"next:\n  peftcli predict {tmp_path}/half " in said
    assert "<" not in said, "the example is that of the recipe"
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_base("sd"))
    pipeline.load_lora_weights(tmp_path / "half")
    np.testing.assert_allclose(picture(pipeline), ours(tmp_path / "half"), atol=1e-5)
    pushed = _contents(tmp_path / "half", "me/mine", "acme/base")
    for name in ("adapter_config.json", "unet/adapter_config.json"):
        assert json.loads(pushed[name])["base_model_name_or_path"] == "acme/base"  # type: ignore[arg-type]


def test_combining_says_that_the_base_model_is_needed(run: Trained, tmp_path: Path) -> None:
    adapter = shutil.copytree(run.folder, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    lost = {**config, "base_model_name_or_path": str(tmp_path / "lost")}
    (adapter / "adapter_config.json").write_text(json.dumps(lost))
    with pytest.raises(ModelError, match="combining adapters of text_to_image needs their base model"):
        combine_adapters([str(adapter)], [0.5], tmp_path / "half")
    assert not (tmp_path / "half").exists()


@pytest.mark.slow
def test_peft_reads_the_folder_of_each_part(run: Trained) -> None:
    import diffusers
    import peft

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_base("sd"))
    pipeline.unet = peft.PeftModel.from_pretrained(pipeline.unet, run.folder / "unet")
    np.testing.assert_allclose(picture(pipeline), ours(run.folder), atol=1e-5)


def test_the_merged_pipeline_is_a_whole_one(run: Trained, cli: Callable, tmp_path: Path) -> None:
    import diffusers

    told = cli("merge", run.folder, "--output", tmp_path / "merged", "--quiet")
    assert "in 3 files, float32\n" in told
    assert f"load it with DiffusionPipeline.from_pretrained('{tmp_path}/merged')" in told
    merged = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(picture(merged), ours(run.folder), atol=1e-4)


def test_predict_writes_pictures(run: Trained, cli: Callable, tmp_path: Path) -> None:
    rows = [{"text": "a red dog"}, {"text": "a red dog", "seed": 1.0}, {"text": "a blue cat", "seed": 1}]
    asked = trainkit.write_rows(tmp_path / "asked.jsonl", rows)
    cli("predict", run.folder, "--input", asked, "--output", tmp_path / "answers.jsonl", "--batch-size", 2)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    folder = tmp_path / "answers.jsonl.images"
    expected = [(str(folder / f"0000{at}.png"), rows[at - 1]["text"], 1) for at in (1, 2, 3)]
    assert [(each["image"], each["prompt"], each["seed"]) for each in answers] == expected
    first, same, other = (Image.open(each["image"]) for each in answers)
    assert first.size == (SIDE, SIDE)
    assert first.tobytes() == same.tobytes() != other.tobytes(), "a picture hangs on prompt and seed alone"
    for bad in ({"text": "a dog", "seed": "one"}, {"text": None}):
        trainkit.write_rows(asked, [{"text": "a dog", "seed": None}, bad])
        refused = cli("predict", run.folder, "--input", asked, "--output", tmp_path / "others.jsonl", code=3)
        assert f"asked.jsonl:2: {[*bad][-1]}: " in refused


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, str(2**64), 1.7, float("inf"), True, "one", [1]], ids=str)
def test_a_seed_is_a_whole_number_that_torch_takes(tmp_path: Path, seed: Any) -> None:
    task = open_task()
    task._make = lambda _, prompts, seeds: [Image.new("RGB", (4, 4)) for _ in prompts]
    row, options = Row({"text": "a dog", "seed": seed}, Place("a.jsonl", 1)), PredictOptions(beside=tmp_path / "a")
    with pytest.raises(DataError, match="expected a whole number") as caught:
        next(task.predict(torch.nn.Linear(1, 1), [row], options))
    assert caught.value.key == "seed"


@pytest.mark.slow
def test_an_adapter_of_another_method_has_no_file_of_diffusers(tmp_path: Path) -> None:
    import diffusers
    import peft

    recipe = CASES[NAME].write(tmp_path)
    done = run_recipe(recipe, "method={type: loha, r: 2, alpha: 4}", "training.learning_rate=0.05")
    assert not (done.folder / "pytorch_lora_weights.safetensors").exists()
    assert "PeftModel.from_pretrained" in (done.folder / "README.md").read_text()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_base("sd"))
    pipeline.unet = peft.PeftModel.from_pretrained(pipeline.unet, done.folder / "unet")
    np.testing.assert_allclose(picture(pipeline), ours(done.folder), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", *LARGE])
def test_checkpointed_activations_change_nothing(tmp_path: Path, kind: str) -> None:
    recipe, texts = CASES[NAME].write(tmp_path), str(kind not in LARGE).lower()
    settings = (f"base_model={pipeline_base(kind)}", f"task.train_text_encoder={texts}", "task.resolution=32")
    plain = run_recipe(recipe, *settings)
    saved = run_recipe(
        recipe, *settings, "training.gradient_checkpointing=true", f"training.output_dir={tmp_path}/saved"
    )
    assert saved.losses == pytest.approx(plain.losses, rel=1e-5)
    assert plain.losses[-1] != plain.losses[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_the_base_model_cannot_do_is_refused() -> None:
    for match, change in {
        "must be a multiple of 2, not 33": lambda: open_task(resolution=33).fingerprint(),
        "is not a pipeline of diffusers": lambda: open_task(base=trainkit.base_folder()).fingerprint(),
        "not quantised here": lambda: open_base(
            BaseModel(name=str(pipeline_base("sd")), quantization=Quantization(type="nf4"))
        ),
    }.items():
        with pytest.raises(PeftcliError, match=match):
            change()


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("_class_name", "KandinskyPipeline", "is a pipeline of the kind 'KandinskyPipeline'; known: StableDiffusion"),
        ("unet", ["my_unet", "MyUNet"], "a class of diffusers or transformers is wanted"),
        ("unet", ["diffusers", "NoSuchUNet"], "diffusers has no class 'NoSuchUNet'"),
    ],
)
def test_a_pipeline_of_other_code_is_refused(tmp_path: Path, key: str, value: Any, match: str) -> None:
    folder = shutil.copytree(pipeline_base("sd"), tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {key: value}))
    with pytest.raises(ModelError, match=match):
        loaded(open_task(base=folder))


@pytest.mark.parametrize("damage", ["pickle", "missing"])
def test_weights_are_whole_safetensors(tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(pipeline_base("sd"), tmp_path / "base")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    if damage == "pickle":
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    else:
        tensors = load_file(weights)
        tensors.pop("conv_in.bias")
        save_file(tensors, weights, {"format": "pt"})
    match = "can run code when it is read" if damage == "pickle" else "conv_in.bias is missing"
    with pytest.raises(ModelError, match=match):
        loaded(open_task(base=folder))
