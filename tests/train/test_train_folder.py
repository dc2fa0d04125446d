"""The run folder: what stands in it, whose it is, and how a stopped run goes on."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trainkit
from PIL import Image
from trainkit import (
    FULL,
    PRODUCT,
    Child,
    at_step,
    files_of,
    read_run,
    resumed_and_whole,
    run_recipe,
    run_until,
    stop_after,
    stopped_copy,
    write_recipe,
)

from peftcli.adapters.proof.verify import RECORD_FILE, verify_adapter
from peftcli.cli.progress import summary
from peftcli.errors import DataError, FolderBusy, Interrupted, StorageError, UsageError
from peftcli.recipe import load_recipe
from peftcli.train.events import Event, Message, Stepped
from peftcli.train.finish import loss_curve
from peftcli.train.runs.identity import changes, identity


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> trainkit.Trained:
    return run_recipe(write_recipe(tmp_path_factory.mktemp("whole")), *FULL)


def assert_same(folder: Path, whole: trainkit.Trained) -> None:
    for name in PRODUCT:
        assert (folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    run, expected = read_run(folder), whole.run
    for key in ("status", "exit_code", "error", "steps", "train_loss", "eval", "parameters"):
        assert run[key] == expected[key], key


# --- what a finished run leaves ---------------------------------------------------------------------------------------


def test_what_stands_in_the_folder(uninterrupted: trainkit.Trained) -> None:
    folder = uninterrupted.folder
    assert {path.name for path in folder.iterdir()} == {
        *PRODUCT, "README.md", "report.html", "report.md",
        "recipe.yaml", "run.json", "task.json", "checkpoints", ".lock"
    }  # fmt: skip
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "peftcli" in (folder / "README.md").read_text()
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000006", "step-000008"]


def test_run_json(uninterrupted: trainkit.Trained) -> None:
    run, recipe = uninterrupted.run, uninterrupted.recipe
    assert run == read_run(uninterrupted.folder)
    assert (run["schema_version"], run["status"], run["exit_code"], run["error"]) == (1, "complete", 0, None)
    assert run["resumable"] is False
    assert run["recipe"]["training"]["learning_rate"] == 5e-3
    assert len(run["recipe_sha256"]) == 64
    assert run["base_model"]["name"] == recipe.base_model.name
    assert len(run["base_model"]["sha256"]) == 64
    train = Path(recipe.dataset.train)
    data = run["data"]
    assert data["files"] == [str(train)]
    assert data["sha256"] == {str(train): hashlib.sha256(train.read_bytes()).hexdigest()}
    assert (data["rows"], data["used"], data["truncated"], data["format"]) == (10, 10, 0, "messages")
    assert data["tokens"] > data["targets"] > 0
    assert sum(data["dropped"].values()) == 0
    assert data["eval"]["rows"] == 3
    assert run["parameters"]["all"] > run["parameters"]["trainable"] > 0
    assert {"python", "torch", "transformers", "peftcli"} <= run["versions"].keys()
    assert (run["device"], run["processes"], run["seeds"]) == ("cpu", 1, {"training": 42})
    assert run["steps"] == {"done": 8, "total": 8}
    assert (run["attempts"][0]["from_step"], run["attempts"][0]["end_step"]) == (0, 8)
    assert run["attempts"][0]["reason"] == "complete"
    assert run["peak_memory_bytes"]["rss"] > 10**7
    assert run["wall_seconds"] > 0
    assert run["tokens_per_second"] > 0
    assert run["gates"] == []
    for artefact in run["artefacts"]:
        content = (uninterrupted.folder / artefact["path"]).read_bytes()
        assert (artefact["bytes"], artefact["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {each["path"] for each in run["artefacts"]}


def test_metrics_hold_one_object_a_step(uninterrupted: trainkit.Trained) -> None:
    entries = uninterrupted.metrics
    assert [entry["step"] for entry in entries] == [0, 1, 2, 4, 6, 8]
    assert entries[0].keys() >= {"epoch", "eval_loss", "eval_perplexity", "eval_token_accuracy"}
    assert entries[-1].keys() >= {"loss", "grad_norm", "learning_rate", "num_targets", "num_tokens", "eval_loss"}
    assert "eval_loss" not in entries[1]


def test_the_resolved_recipe_is_the_recipe(uninterrupted: trainkit.Trained) -> None:
    assert load_recipe(uninterrupted.folder / "recipe.yaml") == uninterrupted.recipe


def test_adapter_config_names_the_base_as_the_recipe_does(uninterrupted: trainkit.Trained) -> None:
    config = json.loads((uninterrupted.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == uninterrupted.recipe.base_model.name
    assert (config["task_type"], config["inference_mode"], config["peft_type"]) == ("CAUSAL_LM", True, "LORA")


def test_old_checkpoints_go(recipe: Path) -> None:
    saved: list[set[str]] = []

    def look(event: Event) -> None:
        if isinstance(event, Message) and event.text.startswith("checkpoint: "):
            saved.append({path.name for path in (recipe.parent / "out/checkpoints").iterdir()})

    run_recipe(
        recipe, "training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=3", on_event=look
    )
    assert saved[-1] == {"step-000006", "step-000007", "step-000008"}


# --- whose folder it is -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
def test_twice_is_once(recipe: Path) -> None:
    first = run_recipe(recipe)
    before = files_of(first.folder)
    again = run_recipe(recipe)
    assert again.run == first.run
    assert again.events == []
    assert files_of(first.folder) == before


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize(
    ("settings", "edit", "named"),
    [
        (["training.learning_rate=1e-3"], None, "training.learning_rate: 0.005 -> 0.001"),
        (["method.r=2"], None, "method.r: 4 -> 2"),
        ([], "train.jsonl", "train.jsonl"),
        ([], "eval.jsonl", "eval.jsonl"),
    ],
)
@pytest.mark.usefixtures("short")
def test_another_recipe_or_data_is_refused(recipe: Path, settings: list[str], edit: str | None, named: str) -> None:
    folder = run_recipe(recipe).folder
    before = files_of(folder)
    if edit:
        with (recipe.parent / edit).open("a") as file:
            file.write(json.dumps(trainkit.MESSAGES[0]) + "\n")
    with pytest.raises(UsageError, match="nothing was changed") as caught:
        run_recipe(recipe, *settings)
    assert named in str(caught.value)
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("{type: causal_lm, metric_code: FOLDER/mine.py:score}", "mine.py"),
        ("{type: text_to_image, class_prompt: a dog, class_data_dir: FOLDER/classes}", "classes/a.png"),
    ],
)
def test_a_file_that_the_task_names_is_part_of_the_run(recipe: Path, task: str, file: str) -> None:
    path = recipe.parent / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("one")
    recipe.write_text(recipe.read_text().replace(", max_length: 128", ""))
    settings = load_recipe(recipe, [f"task={task.replace('FOLDER', str(recipe.parent))}"])
    before = identity(settings, 1)
    path.write_text("two")
    (change,) = changes(before, identity(settings, 1))
    assert change.key.startswith(f"data.{recipe.parent}/")


def test_another_base_model_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(trainkit.base_folder(), base)
    recipe = write_recipe(tmp_path, base)
    run_recipe(recipe)
    shutil.copy(trainkit.base_folder("llama_tied") / "model.safetensors", base / "model.safetensors")
    with pytest.raises(UsageError, match="base_model"):
        run_recipe(recipe)


@pytest.mark.usefixtures("short")
def test_a_moved_folder_is_the_same_run(recipe: Path, tmp_path: Path) -> None:
    first = run_recipe(recipe)
    first.folder.rename(tmp_path / "moved")
    moved = run_recipe(recipe, f"training.output_dir={tmp_path}/moved")
    assert moved.run == first.run
    assert f"merge {tmp_path}/moved " in summary(moved.run, moved.recipe.training.output_dir)


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_refused(recipe: Path, overwrite: bool) -> None:
    folder = recipe.parent / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        run_recipe(recipe, overwrite=overwrite)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("target", ["none", "out", "recipe.yaml"])
def test_an_output_dir_that_is_no_folder(recipe: Path, target: str) -> None:
    (recipe.parent / "out").symlink_to(target)
    with pytest.raises(UsageError, match="is a file" if target == recipe.name else "is a link that leads nowhere"):
        run_recipe(recipe)


@pytest.mark.usefixtures("short")
def test_an_empty_folder_and_what_a_killed_start_leaves_are_welcome(recipe: Path) -> None:
    folder = recipe.parent / "out"
    (folder / "lost+found").mkdir(parents=True)  # a mount point has it
    (folder / ".lock").touch()
    (folder / ".run.json.4711.tmp").write_text('{"schema')
    assert run_recipe(recipe).run["status"] == "complete"
    assert run_recipe(recipe, "method.r=2", overwrite=True).run["status"] == "complete"
    assert (folder / "lost+found").is_dir(), "it is the disk's, and not the old run's"


@pytest.mark.usefixtures("short")
def test_a_folder_in_use(recipe: Path) -> None:
    folder = recipe.parent / "out"
    folder.mkdir()
    with (folder / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FolderBusy):
            run_recipe(recipe)
    assert run_recipe(recipe).run["status"] == "complete"


@pytest.mark.usefixtures("short")
def test_a_run_that_ended_while_this_one_waited_for_the_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decided before the lock is held is decided again after."""
    from peftcli.train.runs.folder import RunFolder

    whole = run_recipe(recipe, f"training.output_dir={recipe.parent}/other")
    lock = RunFolder.lock

    def late(self: RunFolder) -> None:
        shutil.copytree(whole.folder, self.path)
        lock(self)

    monkeypatch.setattr(RunFolder, "lock", late)
    again = run_recipe(recipe)
    assert again.events == []
    assert again.run["status"] == "complete"


# --- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_goes_on(
    recipe: Path, uninterrupted: trainkit.Trained, number: int, code: int
) -> None:
    with pytest.raises(Interrupted, match="after step 5 of 8") as caught:
        run_recipe(recipe, *FULL, on_event=at_step(5, send(number)))
    assert caught.value.exit_code == code
    assert "same command" in str(caught.value.hint)
    folder = recipe.parent / "out"
    run = read_run(folder)
    assert (run["status"], run["exit_code"], run["resumable"], run["steps"]["done"]) == ("interrupted", code, True, 5)
    assert (run["attempts"][0]["end_step"], run["attempts"][0]["reason"]) == (5, "interrupted")
    assert run["wall_seconds"] > 0
    assert not (folder / "adapter_model.safetensors").exists()
    done = run_recipe(recipe, *FULL)
    assert [event.result.step for event in done.events if isinstance(event, Stepped)] == [6, 7, 8]
    assert [attempt["from_step"] for attempt in done.run["attempts"]] == [0, 5]
    assert done.run["wall_seconds"] > run["wall_seconds"]
    assert_same(folder, uninterrupted)


@pytest.mark.slow
def test_a_resumed_run_in_bfloat16_is_verified_by_the_same_record_and_to_the_bit(recipe: Path) -> None:
    settings = (*FULL, "training.verify=true", "training.bf16=true")
    done, whole = resumed_and_whole(recipe, *settings, step=5)
    assert (done.folder / RECORD_FILE).read_bytes() == (whole.folder / RECORD_FILE).read_bytes()
    assert verify_adapter(str(done.folder))["difference"] == 0


@pytest.mark.parametrize(
    "method",
    [
        trainkit.PROMPT_TUNING,
        *(
            pytest.param(f"method={{type: lora, r: 4, lora_dropout: 0.1, {setting}}}", marks=pytest.mark.slow)
            for setting in (
                "monteclora_config: {num_samples: 2}",
                "kasa_config: {}",
                "velora_config: {num_groups: 4, init_type: batch_average_once}",
                'alora_invocation_tokens: "<|im_start|>assistant\\n"',
            )
        ),
    ],
)
def test_other_methods_resume_too(recipe: Path, method: str) -> None:
    done, whole = resumed_and_whole(recipe, method)
    assert done.weights == whole.weights


@pytest.mark.slow
def test_the_best_adapter_so_far_survives_a_stop(recipe: Path) -> None:
    settings = (*FULL, "training.greater_is_better=true", "training.eval_on_start=false")
    done, whole = resumed_and_whole(recipe, *settings, step=5)
    assert whole.run["eval"]["best_step"] == 2, "the best must lie before the stop"
    assert_same(done.folder, whole)


def test_a_signal_at_the_last_step_lets_the_run_end(recipe: Path) -> None:
    assert run_recipe(recipe, on_event=stop_after(8)).run["status"] == "complete"


def while_loading(event: Event) -> None:
    if isinstance(event, Message):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_before_the_first_step(recipe: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        run_recipe(recipe, on_event=while_loading)
    assert caught.value.exit_code == 143
    run = read_run(recipe.parent / "out")
    assert (run["status"], run["resumable"]) == ("interrupted", False)


def test_a_signal_before_the_first_step_of_a_resumed_run(recipe: Path, uninterrupted: trainkit.Trained) -> None:
    folder = stopped_copy(recipe, FULL, 5)
    attempts = read_run(folder)["attempts"]
    with pytest.raises(Interrupted) as caught:
        run_recipe(recipe, *FULL, on_event=while_loading)
    assert caught.value.exit_code == 75, "the checkpoint of step 5 still stands"
    run = read_run(folder)
    assert (run["resumable"], run["steps"]["done"], run["attempts"]) == (True, 5, attempts)
    assert_same(run_recipe(recipe, *FULL).folder, uninterrupted)


@pytest.mark.usefixtures("short")
def test_train_leaves_the_signal_handlers_as_they_were(recipe: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_recipe(recipe)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("short")
def test_training_in_another_thread(recipe: Path) -> None:
    """Only a main thread can handle signals; a notebook or a server may have another."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(run_recipe(recipe).run["status"]))
    thread.start()
    thread.join(60)
    assert done == ["complete"]


# --- killed -----------------------------------------------------------------------------------------------------------


def test_a_second_signal_ends_at_once(recipe: Path) -> None:
    """The first is noted, and waits for the end of a step that takes for ever."""
    noted = recipe.parent / "noted"
    child = Child(recipe.parent, "train", recipe, before=partial(_endless_second_step, noted))
    child.until(noted.with_name("stuck").exists)
    child.signal(signal.SIGTERM)
    child.until(noted.exists)
    child.process.join(1)  # a second signal that comes sooner is an echo of the first
    assert child.process.is_alive()
    child.signal(signal.SIGTERM)
    assert child.wait() == 143


def _endless_second_step(noted: Path) -> None:
    import time

    from peftcli.system.signals import Stop
    from peftcli.train.plan import Plan

    note, ends_epoch = Stop.on_stop_signal, Plan.global_batch

    def tell(self: Stop, *signal: Any) -> None:
        note(self, *signal)
        noted.touch()

    def stuck(self: Plan, step: int) -> list[int]:
        while step == 1:
            noted.with_name("stuck").touch()
            time.sleep(0.05)
        return ends_epoch(self, step)

    Stop.on_stop_signal, Plan.global_batch = tell, stuck  # type: ignore[method-assign]


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def stopped(recipe: Path) -> Path:
    """A run with checkpoints of steps 3 and 5; gives the folder of the checkpoints."""
    return stopped_copy(recipe, FULL, 5) / "checkpoints"


def damages(done: trainkit.Trained) -> list[str]:
    return [text for text in done.warnings if "damaged" in text]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda folder: flip(folder / "optimizer.safetensors"),
    "one bit of the adapter": lambda folder: flip(folder / "adapter_model.safetensors"),
    "cut short": lambda folder: os.truncate(folder / "random-00000.safetensors", 10),
    "a file is missing": lambda folder: (folder / "progress.json").unlink(),
    "a file too many": lambda folder: (folder / "extra").write_text(""),
    "no manifest": lambda folder: (folder / "MANIFEST.json").unlink(),
    "an empty manifest": lambda folder: (folder / "MANIFEST.json").write_text("[]"),
    "a manifest of something else": lambda folder: (folder / "MANIFEST.json").write_text('{"files": [1]}'),
    "a folder for a file": lambda folder: ((folder / "progress.json").unlink(), (folder / "progress.json").mkdir()),
    "a link": lambda folder: (
        shutil.copy(folder / "progress.json", folder.parent / "elsewhere"),
        (folder / "progress.json").unlink(),
        (folder / "progress.json").symlink_to(folder.parent / "elsewhere"),
    ),
    "a pipe": lambda folder: ((folder / "progress.json").unlink(), os.mkfifo(folder / "progress.json")),
}


@pytest.mark.grid
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(recipe: Path, uninterrupted: trainkit.Trained, kind: str) -> None:
    checkpoints = stopped(recipe)
    DAMAGES[kind](checkpoints / "step-000005")
    done = run_recipe(recipe, *FULL)
    (warning,) = damages(done)
    assert "step-000005 is damaged" in warning
    assert (checkpoints / ".damaged-step-000005").is_dir()
    assert done.run["attempts"][-1]["from_step"] == 3
    assert_same(done.folder, uninterrupted)


def test_without_a_whole_checkpoint_it_begins_again(recipe: Path, uninterrupted: trainkit.Trained) -> None:
    for folder in stopped(recipe).iterdir():
        flip(folder / "optimizer.safetensors")
    done = run_recipe(recipe, *FULL)
    assert len(damages(done)) == 2
    assert done.run["attempts"][-1]["from_step"] == 0
    assert_same(done.folder, uninterrupted)


def test_resume_from_a_chosen_checkpoint(recipe: Path, uninterrupted: trainkit.Trained) -> None:
    checkpoints = stopped(recipe)
    done = run_recipe(recipe, *FULL, resume=str(checkpoints / "step-000003"))
    assert done.run["attempts"][-1]["from_step"] == 3
    assert_same(done.folder, uninterrupted)


def test_resume_from_a_damaged_checkpoint_of_choice(recipe: Path) -> None:
    chosen = stopped(recipe) / "step-000003"
    flip(chosen / "adapter_model.safetensors")
    with pytest.raises(StorageError, match=r"adapter_model\.safetensors has changed"):
        run_recipe(recipe, *FULL, resume=str(chosen))


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk(recipe: Path, uninterrupted: trainkit.Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, calls = os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += Path(f"/proc/self/fd/{handle}").readlink().is_relative_to(recipe.parent / "out")
        if calls[0] > 24:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        run_recipe(recipe, *FULL)
    monkeypatch.undo()
    assert caught.value.hint == "free space, then run the same command again"
    assert caught.value.exit_code == 7
    assert str(caught.value.file).startswith(str(recipe.parent / "out"))
    folder = recipe.parent / "out"
    assert not list(folder.rglob(".*.tmp"))
    assert not (folder / "adapter_model.safetensors").exists()
    done = run_recipe(recipe, *FULL)
    assert done.run["attempts"][-1]["from_step"] in (3, 6)
    assert_same(folder, uninterrupted)


def test_a_place_that_cannot_be_written(recipe: Path) -> None:
    with pytest.raises(StorageError) as caught:
        run_recipe(recipe, "training.output_dir=/proc/peftcli/out")
    assert caught.value.exit_code == 7


def test_a_name_of_data_that_the_system_refuses_is_a_data_error(recipe: Path) -> None:
    with pytest.raises(DataError, match="File name too long"):
        run_recipe(recipe, f"dataset.train={'a' * 300}")


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
def test_a_run_that_stopped_at_its_data_begins_anew_once_the_data_is_mended(recipe: Path) -> None:
    rows = recipe.parent / "train.jsonl"
    good = rows.read_text()
    rows.write_text(good + "{broken\n")
    with pytest.raises(DataError) as caught:
        run_recipe(recipe)
    assert (caught.value.file, caught.value.line) == (str(rows), 11)
    run = read_run(recipe.parent / "out")
    assert (run["status"], run["exit_code"]) == ("failed", 3)
    assert (run["error"]["kind"], run["error"]["line"]) == ("DataError", 11)
    rows.write_text(good)
    assert run_recipe(recipe).run["status"] == "complete"


@pytest.mark.usefixtures("short")
def test_bad_rows_are_skipped_counted_and_listed(recipe: Path) -> None:
    rows = recipe.parent / "train.jsonl"
    rows.write_text(rows.read_text() + '{"messages": 5}\n{broken\n')
    with (recipe.parent / "eval.jsonl").open("a") as held:
        held.write("{broken\n")
    done = run_recipe(recipe, "dataset.on_bad_row=skip")
    assert (done.run["data"]["rows"], done.run["data"]["used"], done.run["data"]["skipped"]) == (12, 10, 2)
    assert any("bad_rows" in text for text in done.warnings)
    assert any("bad_rows" in text and "evaluation rows" in text for text in done.warnings)
    listed = [json.loads(line) for line in (done.folder / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["rows"], entry["file"], entry["line"]) for entry in listed] == [
        ("train", str(rows), 11),
        ("train", str(rows), 12),
        ("eval", f"{recipe.parent}/eval.jsonl", 4),
    ]
    assert "expected a list of turns" in listed[0]["message"]


@pytest.mark.usefixtures("short")
def test_data_that_would_be_trained_wrongly_stops_the_run_unless_it_is_allowed(recipe: Path) -> None:
    with pytest.raises(DataError, match="answers_cut") as caught:
        run_recipe(recipe, "dataset.max_length=30")
    assert "dataset.allow: [answers_cut]" in str(caught.value)
    done = run_recipe(recipe, "dataset.max_length=30", "dataset.allow=[answers_cut]")
    assert done.run["status"] == "complete"
    found = {(each["name"], each["split"]): each["level"] for each in done.run["data"]["findings"]}
    assert found["answers_cut", "train"] == "error"
    assert any("answers_cut" in text for text in done.warnings)


@pytest.mark.usefixtures("short")
def test_held_out_rows_are_not_trained_on(recipe: Path) -> None:
    done = run_recipe(recipe, "dataset.eval=null", "dataset.eval_fraction=0.3", "training.eval_strategy=epoch")
    data = done.run["data"]
    assert (data["used"], data["eval"]["used"]) == (7, 3)
    assert "eval_loss" in done.run["eval"]["last"]


def test_a_mix_gives_each_dataset_its_share(recipe: Path) -> None:
    folder = recipe.parent
    mix = f"[{{train: {folder}/train.jsonl, weight: 1}}, {{train: {folder}/eval.jsonl, weight: 3}}]"
    done = run_recipe(recipe, "dataset.train=null", f"dataset.mix={mix}")
    assert [part["used"] for part in done.run["data"]["sources"]] == [10, 3]
    assert any(f"{folder}/eval.jsonl is seen" in text for text in done.warnings)


@pytest.mark.usefixtures("short")
def test_a_model_of_texts_and_conversations_is_asked_in_conversations(recipe: Path) -> None:
    folder = recipe.parent
    trainkit.write_rows(folder / "texts.jsonl", [{"text": "the old mill"}, {"text": "a river"}])
    mix = f"[{{train: {folder}/texts.jsonl}}, {{train: {folder}/train.jsonl}}]"
    assert run_recipe(recipe, "dataset.train=null", f"dataset.mix={mix}").run["data"]["format"] == "messages"


def test_a_dataset_of_a_mix_that_gives_nothing_is_refused(recipe: Path) -> None:
    folder = recipe.parent
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A", "train": False}]}
    trainkit.write_rows(folder / "silent.jsonl", [silent])
    mix = f"[{{train: {folder}/train.jsonl, weight: 1}}, {{train: {folder}/silent.jsonl, weight: 1}}]"
    with pytest.raises(DataError, match="zero trained tokens: all 1 rows") as caught:
        run_recipe(recipe, "dataset.train=null", f"dataset.mix={mix}")
    assert caught.value.file == str(folder / "silent.jsonl")


def test_a_run_whose_rows_are_encoded_otherwise_is_not_gone_on_with(recipe: Path, tmp_path: Path) -> None:
    """The chat template of the base model's folder is no part of the recipe, the data or the weights."""
    base = shutil.copytree(trainkit.base_folder(), tmp_path / "base")
    recipe.write_text(recipe.read_text().replace(str(trainkit.base_folder()), str(base)))
    run_until(5, recipe, *FULL)
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|>the "))
    before = files_of(recipe.parent / "out")
    with pytest.raises(UsageError, match="encoded otherwise"):
        run_recipe(recipe, *FULL)
    assert files_of(recipe.parent / "out") == before


def test_held_out_bad_rows_of_a_mix_are_named(recipe: Path) -> None:
    folder = recipe.parent
    (folder / "bad.jsonl").write_text('{"messages": 5}\n' * 3)
    mix = f"[{{train: {folder}/train.jsonl}}, {{train: {folder}/bad.jsonl}}]"
    with pytest.raises(DataError, match="none of the"):
        run_recipe(
            recipe, "dataset.train=null", f"dataset.mix={mix}", "dataset.eval=null", "dataset.eval_fraction=0.2",
            "dataset.on_bad_row=skip",
        )  # fmt: skip


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize(
    ("kind", "task", "at", "max_length", "method", "positions"),
    [
        ("gpt2", "causal_lm", 9, 900, {}, 256),
        ("gpt2", "causal_lm", 12, 900, {}, 256),
        ("bart", "seq2seq_lm", 9, 900, {}, 64),
        ("gpt2", "causal_lm", 9, 256, {"type": "prompt_tuning", "num_virtual_tokens": 5}, 251),
        ("gpt2", "causal_lm", 9, 256, {"type": "prefix_tuning"}, 236),
        ("bart", "seq2seq_lm", 9, 900, {"type": "prompt_tuning", "num_virtual_tokens": 5}, 64),
        ("bart", "seq2seq_lm", 9, 900, {"type": "prefix_tuning", "num_virtual_tokens": 5}, 59),
    ],
    ids=["training row", "evaluation row", "target", "virtual tokens", "prefix", "target without them", "with prefix"],
)
def test_examples_longer_than_the_models_positions_are_refused(
    tmp_path: Path, kind: str, task: str, at: int, max_length: int, method: dict[str, Any], positions: int
) -> None:
    rows = [*trainkit.PROMPTS[:at], {"prompt": "Say much.", "completion": " winter" * 300}, *trainkit.PROMPTS[at:]]
    recipe = write_recipe(tmp_path, trainkit.base_folder(kind, chat=False), rows)
    with pytest.raises(DataError, match=f"and the base model {positions} positions") as caught:
        run_recipe(
            recipe, f"dataset.max_length={max_length}", f"task={task}", *([f"method={method}"] if method else [])
        )
    assert caught.value.key == "dataset.max_length"
    assert caught.value.hint.startswith(f"set dataset.max_length: {positions}, or less; ")


def test_the_curve_has_whole_steps_and_the_main_metric_beside_the_loss() -> None:
    lines = [{"step": 0, "eval_loss": 2.0, "eval_accuracy": 0.1}, {"step": 1, "loss": 1.0}]
    lines += [{"step": 2, "loss": 0.5, "eval_loss": 0.7, "eval_accuracy": 0.9}]
    sizes = {}
    for metric in ("loss", "accuracy", "macro_f1"):  # the last was not measured
        image = Image.open(io.BytesIO(loss_curve(lines, "lora, a task", metric)))
        sizes[metric] = image.size
    assert sizes == {"loss": (700, 400), "accuracy": (1100, 400), "macro_f1": (700, 400)}
