"""How a run begins in a folder that holds another one, and how it stands."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from trainkit import Child, files_of, read_run, run_recipe, run_until, stop_after

from peftcli.cli.app import main
from peftcli.errors import FolderBusy, Interrupted, OutOfMemory, PeftcliError, ProcessDied, StorageError, UsageError
from peftcli.recipe import load_recipe
from peftcli.system import date
from peftcli.train.events import Event, Ready, Stepped
from peftcli.train.runs import checkpoint
from peftcli.train.runs.folder import RunFolder
from peftcli.train.runs.identity import identity
from peftcli.train.runs.status import read_records, record_failure, status

EVERY_TWO = ("training.save_strategy=steps", "training.save_steps=2")


def stopped(recipe: Path, *settings: str, step: int = 4) -> Path:
    """A run that was stopped; gives its folder."""
    return trainkit.stopped_copy(recipe, settings, step)


# --- --resume ---------------------------------------------------------------------------------------------------------


def test_must_resume_refuses_to_begin_anew(recipe: Path) -> None:
    with pytest.raises(StorageError, match="no run to resume"):
        run_recipe(recipe, resume="must")
    assert not (recipe.parent / "out").exists(), "nothing is made"
    stopped(recipe)
    assert run_recipe(recipe, resume="must").run["attempts"][-1]["from_step"] == 4


def test_must_resume_needs_a_whole_checkpoint(recipe: Path) -> None:
    out = stopped(recipe)
    for path in out.glob("checkpoints/*/optimizer.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(StorageError, match="no whole checkpoint"):
        run_recipe(recipe, resume="must")


def test_never_resume_refuses_a_run_that_can_be_gone_on_with(recipe: Path) -> None:
    out = stopped(recipe)
    before = files_of(out)
    with pytest.raises(UsageError, match="can be resumed; nothing was changed"):
        run_recipe(recipe, resume="never")
    assert files_of(out) == before
    anew = run_recipe(recipe, resume="never", overwrite=True)
    assert [attempt["from_step"] for attempt in anew.run["attempts"]] == [0]
    assert (out / "previous-1/checkpoints/step-000004").is_dir()


@pytest.mark.usefixtures("short")
def test_never_resume_in_a_new_folder_and_a_complete_one(recipe: Path) -> None:
    first = run_recipe(recipe, resume="never")
    assert run_recipe(recipe, resume="never").run == first.run


# --- --allow-change ---------------------------------------------------------------------------------------------------


def test_an_allowed_change_is_noted_and_goes_on(recipe: Path) -> None:
    out = stopped(recipe, *EVERY_TWO)
    with pytest.raises(UsageError, match=r"training\.learning_rate: 0\.005 -> 0\.001") as caught:
        run_recipe(recipe, *EVERY_TWO, "training.learning_rate=1e-3")
    assert "--allow-change training.learning_rate" in str(caught.value)
    done = run_recipe(recipe, *EVERY_TWO, "training.learning_rate=1e-3", allow_change=["training.learning_rate"])
    assert done.run["attempts"][-1]["from_step"] == 4
    assert done.run["exact"] is False
    assert done.run["changes"] == [{"key": "training.learning_rate", "before": 5e-3, "now": 1e-3, "step": 4}]
    assert done.run["recipe"]["training"]["learning_rate"] == 1e-3
    assert any("not exactly that of one recipe" in text for text in done.warnings)
    rates = {entry["step"]: entry["learning_rate"] for entry in done.metrics}
    assert rates[4] == pytest.approx(5e-3 * 5 / 8)
    assert rates[5] == pytest.approx(1e-3 * 4 / 8), "the schedule follows the new rate"
    assert load_recipe(out / "recipe.yaml").training.learning_rate == 1e-3
    again = run_recipe(recipe, *EVERY_TWO, "training.learning_rate=1e-3")
    assert again.run == done.run, "the changed recipe is now the folder's"


BEST = (
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.load_best_model_at_end=true",
    "training.greater_is_better=true",
)
"""With the loss so, the first evaluation is the best."""


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize(
    "change",
    [
        "method.lora_alpha=80",
        "dataset.eval=train.jsonl",
        "training.metric_for_best_model=token_accuracy",
        "training.load_best_model_at_end=true",
    ],
)
def test_the_best_before_a_change_that_makes_its_metrics_untrue_no_longer_counts(recipe: Path, change: str) -> None:
    key, data = change.partition("=")[0], recipe.parent / "train.jsonl"
    settings = (*BEST, f"{key}=false") if key.endswith("at_end") else BEST
    first = "training.eval_on_start=true"
    stopped(recipe, *settings, first, step=5)
    now, allowed = [*BEST, first, change.replace("train.jsonl", str(data))], [key, "data"]

    def fail(event: Event) -> None:
        if isinstance(event, Ready):
            raise StorageError("before a checkpoint is saved")

    with pytest.raises(StorageError):
        run_recipe(recipe, *now, allow_change=allowed, on_event=fail)
    done = run_recipe(recipe, *now)
    assert any(text.endswith("the best evaluation so far, after step 0, no longer counts") for text in done.warnings)
    best = done.run["eval"]["best_step"]
    assert best > 5
    values = {entry["step"]: entry["eval_loss"] for entry in done.metrics if "eval_loss" in entry}
    assert done.run["eval"]["kept"]["eval_loss"] == values[best]
    assert bool(done.run["eval"]["first"]) is key.startswith("training."), "measured of the same model and rows"


@pytest.mark.slow
def test_the_last_adapter_is_kept_where_the_best_is_no_longer_wanted(recipe: Path) -> None:
    stopped(recipe, *BEST, step=5)
    last = "training.load_best_model_at_end"
    done = run_recipe(recipe, *BEST, f"{last}=false", allow_change=[last])
    assert done.run["eval"]["kept"] == done.run["eval"]["last"]
    assert done.weights == run_recipe(recipe, f"training.output_dir={recipe.parent}/whole").weights


def test_less_patience_is_for_the_next_evaluation(recipe: Path) -> None:
    stopped(recipe, *BEST, step=5)
    done = run_recipe(
        recipe, *BEST, "training.early_stopping_patience=1", allow_change=["training.early_stopping_patience"]
    )
    assert done.run["steps"]["done"] == 6


def test_a_file_called_chatml_is_no_template(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    Path("chatml").touch()
    assert "chatml" not in identity(load_recipe(recipe, ["base_model.chat_template=chatml"]), 1).data


@pytest.mark.usefixtures("short")
def test_a_change_before_the_first_checkpoint_leaves_the_run_exact(recipe: Path) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, Ready):
            raise StorageError("before the first step")

    with pytest.raises(StorageError):
        run_recipe(recipe, on_event=fail)
    done = run_recipe(recipe, "training.learning_rate=1e-3", allow_change=["training.learning_rate"])
    assert (done.run["exact"], done.run["changes"], done.warnings) == (True, [], [])
    assert done.run["identity"]["recipe"]["training"]["learning_rate"] == 1e-3
    other = run_recipe(recipe, "training.learning_rate=1e-3", f"training.output_dir={recipe.parent}/other")
    assert done.weights == other.weights


def test_other_data_may_be_allowed(recipe: Path) -> None:
    run_until(4, recipe)
    with (recipe.parent / "train.jsonl").open("a") as file:
        file.write(json.dumps(trainkit.MESSAGES[0]) + "\n")
    done = run_recipe(recipe, allow_change=["data"])
    assert [change["key"] for change in done.run["changes"]] == [f"data.{recipe.parent}/train.jsonl"]
    assert done.run["data"]["rows"] == 11
    assert read_run(recipe.parent / "out")["exact"] is False


def test_more_steps_may_be_allowed_and_fewer_than_done_are_refused(recipe: Path) -> None:
    stopped(recipe)
    with pytest.raises(UsageError, match="has done 4 steps, and the recipe now wants 3"):
        run_recipe(recipe, "training.max_steps=3", allow_change=["training.max_steps"])
    done = run_recipe(recipe, "training.max_steps=10", allow_change=["training.max_steps"])
    assert done.run["steps"] == {"done": 10, "total": 10}


def test_a_checkpoint_whose_optimizer_lacks_an_average_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = checkpoint._optimizer_state

    def lacking(state: Any) -> dict[str, torch.Tensor]:
        found = whole(state)
        found.pop(next(name for name in found if name.endswith(".exp_avg")))
        return found

    monkeypatch.setattr(checkpoint, "_optimizer_state", lacking)
    run_until(4, recipe)
    with pytest.raises(StorageError, match="something that the optimizer remembers is missing"):
        run_recipe(recipe)


def test_a_change_that_does_not_fit_the_checkpoint_changes_nothing(recipe: Path) -> None:
    out = stopped(recipe)
    with pytest.raises(UsageError, match="does not fit this run"):
        run_recipe(recipe, "method.r=2", allow_change=["method"])
    assert read_run(out)["identity"]["recipe"]["method"]["r"] == 4
    assert run_recipe(recipe).run["status"] == "complete", "the run itself goes on"


def test_a_refusal_names_all_that_must_be_allowed(recipe: Path) -> None:
    stopped(recipe)
    other = recipe.parent / "other.jsonl"
    settings = (f"dataset.train={other}", "training.learning_rate=1e-3")
    rows, allowed = (recipe.parent / "train.jsonl").read_bytes(), ["dataset.train", "training.learning_rate"]
    for content, keys in ((rows + rows, ["data", *allowed]), (rows, allowed)):  # a copy is no other data
        other.write_bytes(content)
        with pytest.raises(UsageError) as caught:
            run_recipe(recipe, *settings)
        words = str(caught.value.hint).split("anyway: ")[1].split()
        assert (words[::2], words[1::2]) == (["--allow-change"] * len(keys), keys)
    assert run_recipe(recipe, *settings, allow_change=words[1::2]).run["status"] == "complete"


def test_another_method_cannot_go_on(recipe: Path) -> None:
    stopped(recipe)
    with pytest.raises(UsageError, match=r"data; nothing was changed\n  method.type: 'lora' -> 'ia3'\n") as caught:
        run_recipe(recipe, "method={type: ia3}", "training.learning_rate=5e-3", allow_change=["method"])
    assert "--allow-change" not in str(caught.value.hint)


@pytest.mark.usefixtures("short")
def test_resume_is_looked_at_of_a_complete_run_too(recipe: Path) -> None:
    run_recipe(recipe)
    with pytest.raises(UsageError, match="no such checkpoint"):
        run_recipe(recipe, resume="atuo")


@pytest.mark.usefixtures("short")
def test_a_change_of_a_complete_run_is_refused_even_if_allowed(recipe: Path) -> None:
    run_recipe(recipe)
    with pytest.raises(UsageError, match="a complete run of another recipe") as caught:
        run_recipe(recipe, "training.max_steps=9", allow_change=["training.max_steps"])
    assert f"training.init_adapter_from={recipe.parent / 'out'}" in str(caught.value.hint)
    assert str(caught.value).count("\n") < 6


def test_an_unknown_key_is_refused(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing is called 'training\.learning_rte'") as caught:
        run_recipe(recipe, allow_change=["training.learning_rte"])
    assert "training.learning_rate" in str(caught.value.hint)


@pytest.mark.grid
@pytest.mark.parametrize(
    "setting",
    [
        "training.max_time=3h",
        "training.save_on_signal=null",
        "training.save_total_limit=3",
        "training.save_strategy=epoch",
    ],
)
def test_what_does_not_change_the_result_may_change(recipe: Path, setting: str) -> None:
    stopped(recipe)
    assert run_recipe(recipe, setting).run["exact"] is True


def test_a_checkpoint_of_another_recipe_is_refused(recipe: Path) -> None:
    chosen = stopped(recipe) / "checkpoints/step-000004"
    other = f"training.output_dir={recipe.parent}/other"
    with pytest.raises(UsageError, match="was written with another recipe") as caught:
        run_recipe(recipe, other, "training.learning_rate=1e-3", resume=str(chosen))
    assert "--allow-change recipe" in str(caught.value)
    run = run_recipe(recipe, other, resume=str(chosen)).run
    assert (run["attempts"][-1]["from_step"], run["exact"]) == (4, True)
    third = ("training.learning_rate=1e-3", f"training.output_dir={recipe.parent}/third")
    run = run_recipe(recipe, *third, resume=str(chosen), allow_change=["recipe"]).run
    assert run["exact"] is False
    assert [(change["key"], change["step"]) for change in run["changes"]] == [("recipe", 4)]


# --- --overwrite ------------------------------------------------------------------------------------------------------


def test_overwrite_moves_the_old_run_aside_once_the_new_one_is_complete(recipe: Path) -> None:
    old = run_recipe(recipe)
    (old.folder / "notes.txt").write_text("mine")
    before = files_of(old.folder)
    run_until(3, recipe, "method.r=2", overwrite=True)
    assert {name: content for name, content in files_of(old.folder).items() if ".overwrite/" not in name} == before
    assert status(old.folder)["replacement"] == "interrupted"
    new = run_recipe(recipe, "method.r=2", overwrite=True)
    assert [attempt["from_step"] for attempt in new.run["attempts"]] == [0, 3]
    assert read_run(old.folder)["recipe"]["method"]["r"] == 2
    assert not (old.folder / ".overwrite").exists()
    assert files_of(old.folder / "previous-1") == before
    again = run_recipe(recipe, "method.r=2", overwrite=True)
    assert again.run == new.run, "twice is once"
    run_recipe(recipe, overwrite=True)
    assert {path.name for path in old.folder.glob("previous-*")} == {"previous-1", "previous-2"}


def test_a_run_that_was_to_replace_another_is_begun_anew_for_a_third_recipe(recipe: Path) -> None:
    run_recipe(recipe)
    run_until(3, recipe, "method.r=2", overwrite=True)
    done = run_recipe(recipe, "method.r=3", overwrite=True)
    assert [attempt["from_step"] for attempt in done.run["attempts"]] == [0]
    said = done.warnings
    assert "another run that was to replace it, stopped after step 3, is gone" in said


# --- run.json and the product -----------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.usefixtures("short")
def test_a_complete_run_whose_adapter_is_gone_or_changed_says_so(recipe: Path, name: str) -> None:
    done = run_recipe(recipe)
    path = done.folder / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(StorageError, match="has changed since the run was complete"):
        run_recipe(recipe)
    path.unlink()
    with pytest.raises(StorageError, match="is gone since the run was complete"):
        run_recipe(recipe)


BAD_RUNS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"status": "comp',
    "a list": b"[]",
    "no JSON": b"\xff\xfe",
    "nested": b"[" * 100_000,
    "nothing in it": b"{}",
    "wrong types": b'{"status": 5, "attempts": 3, "identity": []}',
}


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_a_run_json_that_is_none(recipe: Path, kind: str) -> None:
    out = stopped(recipe)
    (out / "run.json").write_bytes(BAD_RUNS[kind])
    before = files_of(out)
    with pytest.raises(StorageError) as caught:
        run_recipe(recipe)
    assert caught.value.file == str(out / "run.json")
    assert f"--resume {out}/checkpoints/step-000004" in str(caught.value.hint)
    assert len(str(caught.value)) < 500
    assert files_of(out) == before


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda run: run.pop(key)


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize(
    "change",
    [
        *map(
            _without,
            ("status", "identity", "attempts", "error", "exit_code", "resumable", "artefacts", "recipe", "data", "day"),
        ),
        lambda run: run.update(day="2026-13-45"),
        lambda run: run.update(wall_seconds=None),
        lambda run: run["base_model"].update(revision=[]),
        lambda run: run.update(attempts=[1]),
        lambda run: run.update(steps={"done": "many"}),
        lambda run: run.update(schema_version=99),
    ],
)
def test_a_run_json_that_lacks_something(recipe: Path, change: Callable[[dict[str, Any]], object]) -> None:
    out = stopped(recipe)
    run = read_run(out)
    change(run)
    (out / "run.json").write_text(json.dumps(run))
    with pytest.raises(PeftcliError) as caught:
        run_recipe(recipe)
    assert caught.value.exit_code == 7


def test_a_pipe_in_the_place_of_run_json(recipe: Path) -> None:
    out = recipe.parent / "out"
    out.mkdir()
    os.mkfifo(out / "run.json")
    with pytest.raises(StorageError, match="not a regular file"):
        run_recipe(recipe)


def test_what_killed_writers_left_is_removed(recipe: Path) -> None:
    out = stopped(recipe)
    (out / ".run.json.4711.tmp").write_text("{")
    (out / "checkpoints/.step-000006.tmp").mkdir()
    (out / "checkpoints/.old-step-000002").mkdir()
    (out / "checkpoints/.old-step-000002/file").write_text("")
    done = run_recipe(recipe)
    assert not [path.name for path in done.folder.rglob(".*") if path.name != ".lock"]


def test_a_bug_leaves_its_traceback_in_train_log(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "correct-horse-9")

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("correct-horse-9")

    monkeypatch.setattr("peftcli.train.read_data.plan_of", broken)
    with pytest.raises(PeftcliError) as caught:
        run_recipe(recipe)
    assert caught.value.exit_code == 1
    path = recipe.parent / "out/train.log"
    assert caught.value.hint == f"the traceback is in {path}"
    log = path.read_text()
    assert "ZeroDivisionError" in log
    assert "plan_of" in log
    assert "correct-horse" not in log
    assert "correct-horse" not in (recipe.parent / "out/run.json").read_text()


# --- the time that a run may take -------------------------------------------------------------------------------------


# --- peftcli status ---------------------------------------------------------------------------------------------------


def test_status_of_runs_that_ended(recipe: Path) -> None:
    out = stopped(recipe)
    found = status(out)
    assert (found["status"], found["exit_code"], found["resumable"], found["pid"]) == ("interrupted", 75, True, None)
    assert found["steps"] == {"done": 4, "total": 8}
    assert found["checkpoints"] == ["step-000004"]
    run_recipe(recipe)
    assert (status(out)["status"], status(out)["resumable"]) == ("complete", False)
    for name in ("step-000009", "step-1000000", "step-000009 (copy)"):
        (out / "checkpoints" / name).mkdir()
    assert status(out)["checkpoints"] == ["step-000004", "step-000009", "step-1000000"]


@pytest.mark.slow
def test_status_of_a_running_and_of_a_killed_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = Child(recipe.parent, "train", recipe, "training.max_steps=100000")
    out = recipe.parent / "out"
    child.until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0)
    found = status(out)
    assert (found["status"], found["pid"]) == ("running", child.process.pid)
    assert found["steps"]["done"] >= 1
    assert main(["status", str(out)]) == 0
    assert f"running, process {child.process.pid}" in capsys.readouterr().out
    child.signal(signal.SIGKILL)
    child.wait()
    found = status(out)
    assert (found["status"], found["exit_code"], found["pid"]) == ("interrupted", 137, None)
    assert main(["status", str(out)]) == 0
    assert "the process ended without recording a reason" in capsys.readouterr().out


def test_status_where_there_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_lock_that_a_process_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.lock()
    handle, variables = folder.give_lock()
    assert handle > 2
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = RunFolder(tmp_path)
    given.lock()
    folder.close()
    assert folder.is_locked(), "it lasts until both have let it go"
    given.close()
    assert not folder.is_locked()


def test_a_lock_that_a_process_was_given_is_taken_again_where_its_file_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = RunFolder(tmp_path), RunFolder(tmp_path)
    folder.lock()
    monkeypatch.setenv(*folder.give_lock()[1].popitem())
    given.lock()
    (tmp_path / ".lock").unlink()
    given.keep_lock()
    assert folder.is_locked()
    given.close()
    assert not folder.is_locked()
    folder.close()


def test_a_folder_that_was_copied_goes_on_elsewhere(recipe: Path) -> None:
    out = stopped(recipe)
    shutil.copytree(out, recipe.parent / "copy")
    done = run_recipe(recipe, f"training.output_dir={recipe.parent}/copy", resume="must")
    assert done.run["recipe"]["training"]["output_dir"] == f"{recipe.parent}/copy"
    assert done.weights == run_recipe(recipe).weights


def test_a_lock_file_that_was_removed_lets_no_other_run_in(recipe: Path) -> None:
    out, others = recipe.parent / "out", list[RunFolder]()

    def remove(event: Event) -> None:
        if isinstance(event, Stepped) and event.result.step == 1:
            (out / ".lock").unlink()
        if isinstance(event, Stepped) and event.result.step == 3:
            with pytest.raises(FolderBusy):
                RunFolder(out).lock()
            (out / ".lock").unlink()
            others.append(RunFolder(out))
            others[0].lock()
            (out / "run.json").write_text("of the other")

    with pytest.raises(FolderBusy, match="another run is using this folder"):
        run_recipe(recipe, *EVERY_TWO, on_event=remove)
    assert (out / "run.json").read_text() == "of the other"
    assert not (out / "checkpoints/step-000004").exists()
    others[0].close()


def test_a_line_of_another_hand_in_metrics_takes_none_away(recipe: Path) -> None:
    out = stopped(recipe)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*lines[:1], "# my note", *lines[1:], '{"step": 4, "lo']))
    assert [entry["step"] for entry in run_recipe(recipe).metrics] == [*range(1, 9)]


# --- more than one way on ---------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_from_an_older_checkpoint_leaves_the_newer_ones(recipe: Path) -> None:
    out = stopped(recipe, *EVERY_TWO, "training.save_total_limit=9", step=7)
    (out / "checkpoints/.left-step-000006").mkdir()
    changed = (*EVERY_TWO, "training.save_total_limit=9", "training.learning_rate=0.001")
    allowed = ["training.learning_rate", "training.save_total_limit"]
    with pytest.raises(Interrupted, match="after step 5"):
        run_recipe(
            recipe,
            *changed,
            resume=str(out / "checkpoints/step-000004"),
            allow_change=allowed,
            on_event=stop_after(5),
        )
    names = [path.name for path in sorted(out.glob("checkpoints/step-*"))]
    assert names == ["step-000002", "step-000004", "step-000005"], "those of the old learning rate are set aside"
    left = {path.name for path in out.glob("checkpoints/.left-*")}
    assert left == {".left-step-000006", ".left-step-000006-2", ".left-step-000007"}
    done = run_recipe(recipe, *changed)
    assert done.run["attempts"][-1]["from_step"] == 5
    rates = [entry["learning_rate"] for entry in done.metrics[4:]]
    assert rates == pytest.approx([0.001 * left / 8 for left in (4, 3, 2, 1)])


def test_a_checkpoint_that_was_set_aside_can_be_resumed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stopped(recipe) / "checkpoints/step-000004"
    monkeypatch.chdir(path.rename(path.with_name(".left-step-000004-2")))
    assert run_recipe(recipe, resume=".").run["attempts"][-1]["from_step"] == 4


def test_the_run_json_in_a_checkpoint_may_be_large(recipe: Path) -> None:
    path = stopped(recipe) / "checkpoints/step-000004"
    manifest = checkpoint.read_manifest(path)
    manifest["run"]["data"]["content"] = ["f" * 64] * 500_000
    (path / "MANIFEST.json").write_bytes(checkpoint._as_json(checkpoint._sealed(manifest)))
    assert checkpoint.find_damage(path) is None


@pytest.mark.slow
def test_a_checkpoint_goes_on_elsewhere_as_its_own_run_would(recipe: Path) -> None:
    dated, rate = recipe.parent / "dated.jinja", "training.learning_rate"
    dated.write_text("{{ strftime_now('%d %b %Y') }}" + trainkit.CHATML)
    settings = (f"base_model.chat_template={dated}",)
    with date.fixed_date("2024-07-26"):
        out = stopped(recipe, *settings)
        with pytest.raises(Interrupted):
            run_recipe(recipe, *settings, f"{rate}=0.001", allow_change=[rate], on_event=stop_after(6))
    path = str(out / "checkpoints/step-000006")
    other = (*settings, f"{rate}=0.001", f"training.output_dir={recipe.parent}/other")
    done = run_recipe(recipe, *other, resume=path)
    assert done.run["day"] == "2024-07-26"
    assert done.run["exact"] is False
    assert [(change["key"], change["step"]) for change in done.run["changes"]] == [(rate, 4)]
    assert [attempt["from_step"] for attempt in done.run["attempts"]] == [6]
    assert done.weights == run_recipe(recipe, *settings, f"{rate}=0.001").weights


def test_other_versions_and_rows_than_those_of_a_checkpoint_are_noted_and_refused(recipe: Path) -> None:
    path, other = stopped(recipe) / "checkpoints/step-000004", f"training.output_dir={recipe.parent}/other"
    manifest = checkpoint.read_manifest(path)
    manifest["run"]["versions"]["torch"], manifest["run"]["data"]["content"] = "1.0", ["of another tokenizer"]
    (path / "MANIFEST.json").write_bytes(checkpoint._as_json(checkpoint._sealed(manifest)))
    with pytest.raises(UsageError, match="is of a run whose rows were encoded otherwise") as caught:
        run_recipe(recipe, other, resume=str(path))
    assert caught.value.file == str(path)
    done = run_recipe(recipe, other, resume=str(path), allow_change=["data"])
    assert [change["key"] for change in done.run["changes"]] == ["versions.torch", "data"]
    assert done.run["exact"] is False


def test_a_checkpoint_whose_run_json_is_of_another_version(recipe: Path) -> None:
    path, other = stopped(recipe) / "checkpoints/step-000004", f"training.output_dir={recipe.parent}/other"
    manifest = checkpoint.read_manifest(path)
    del manifest["run"]["day"]
    (path / "MANIFEST.json").write_bytes(checkpoint._as_json(checkpoint._sealed(manifest)))
    with pytest.raises(StorageError, match=r"was written by another version of peftcli: .*day") as caught:
        run_recipe(recipe, other, resume=str(path))
    assert (caught.value.hint or "").startswith("resume with the version")


def test_a_file_that_cannot_be_read_now_is_no_damage(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peftcli.train.runs.checkpoint as module

    out = stopped(recipe, *EVERY_TWO)
    before = files_of(out / "checkpoints")

    def busy(path: Path) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(module, "sha256", busy)
        with pytest.raises(StorageError, match="Too many open files"):
            run_recipe(recipe, *EVERY_TWO)
    assert files_of(out / "checkpoints") == before
    assert run_recipe(recipe, *EVERY_TWO).run["attempts"][-1]["from_step"] == 4


@pytest.mark.slow
def test_a_checkpoint_of_another_version_is_no_damage(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "asdict", lambda progress: {"step": progress.step})
        with pytest.raises(Interrupted):
            run_recipe(recipe, *EVERY_TWO, on_event=stop_after(4))
    before = files_of(recipe.parent / "out/checkpoints")
    with pytest.raises(StorageError, match="was written by another version of peftcli") as caught:
        run_recipe(recipe, *EVERY_TWO)
    assert str(caught.value.file).endswith("step-000004")
    assert files_of(recipe.parent / "out/checkpoints") == before


@pytest.mark.slow
def test_one_line_a_step_when_a_pending_evaluation_was_made_and_the_run_killed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("training.eval_strategy=steps", "training.eval_steps=2")
    whole = run_recipe(recipe, *settings, f"training.output_dir={recipe.parent}/whole")
    out = _stopped_in_evaluation(recipe, monkeypatch, *settings)
    assert [entry["step"] for entry in trainkit.read_metrics(out)] == [1], "the line of step 2 waits for its evaluation"

    def kill(event: Event) -> None:
        if isinstance(event, Stepped) and event.result.step == 4:
            raise RuntimeError("as good as killed: nothing is saved")

    with pytest.raises(PeftcliError, match="as good as killed"):
        run_recipe(recipe, *settings, on_event=kill)
    done = run_recipe(recipe, *settings)
    assert done.metrics == whole.metrics
    assert (out / "loss.png").read_bytes() == (whole.folder / "loss.png").read_bytes()


def _stopped_in_evaluation(recipe: Path, monkeypatch: pytest.MonkeyPatch, *settings: str, at: int = 1) -> Path:
    """A run that was stopped in its ``at``-th evaluation; gives its folder."""
    import peftcli.train.training_loop as module

    evaluate, calls = module.evaluate, []

    def interrupted(*args: Any, stopping: Callable[[], bool], **options: Any) -> Any:
        calls.append(0)
        asked = 0

        def after_a_batch() -> bool:
            nonlocal asked
            asked += 1
            if len(calls) == at and asked == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return stopping()

        return evaluate(*args, stopping=after_a_batch, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            run_recipe(recipe, *settings)
    return recipe.parent / "out"


def test_requests_for_checkpoints_repeat_an_evaluation_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peftcli.train.training_loop as module

    settings = ("training.eval_strategy=steps", "training.eval_steps=4", "training.eval_on_start=true")
    whole = run_recipe(recipe, *settings, f"training.output_dir={recipe.parent}/whole")
    evaluate, calls = module.evaluate, []

    def requested(*args: Any, stopping: Callable[[], bool], **options: Any) -> Any:
        calls.append(0)
        assert len(calls) < 9, "it never ends"

        def at_each_batch() -> bool:
            os.kill(os.getpid(), signal.SIGUSR2)
            return stopping()

        return evaluate(*args, stopping=at_each_batch, **options)

    monkeypatch.setattr(module, "evaluate", requested)
    done = run_recipe(recipe, *settings)
    assert len(calls) == 1 + 2 + 2, "at the start, and after steps 4 and 8"
    assert done.metrics == whole.metrics
    assert {path.name for path in done.folder.glob("checkpoints/*")} == {"step-000004", "step-000008"}


@pytest.mark.parametrize("at", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            "{type: adalora, init_r: 4, target_r: 2, tinit: 2, tfinal: 2, deltaT: 1, target_modules: all-linear}",
            marks=pytest.mark.slow,
        ),
        "{type: pvera, r: 4, sample_at_inference: true, target_modules: all-linear}",
    ],
    ids=["adalora", "pvera"],
)
def test_adalora_and_methods_that_draw_while_they_evaluate(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, method: str, at: int
) -> None:
    """Stopped amid an evaluation, at half of the run and at its end: the bytes of a run that was not."""
    settings = ("training.eval_strategy=steps", "training.eval_steps=2", "training.per_device_eval_batch_size=1")
    settings = (f"method={method}", *settings)
    whole = run_recipe(recipe, *settings, f"training.output_dir={recipe.parent}/whole")
    _stopped_in_evaluation(recipe, monkeypatch, *settings, at=at)
    done = run_recipe(recipe, *settings)
    assert done.metrics == whole.metrics
    assert done.weights == whole.weights
    config = "adapter_config.json"
    assert (done.folder / config).read_text() == (whole.folder / config).read_text()


def test_steps_cut_to_those_done_are_evaluated(recipe: Path) -> None:
    settings = ("training.eval_strategy=steps", "training.eval_steps=3")
    stopped(recipe, *settings)
    done = run_recipe(recipe, *settings, "training.max_steps=4", allow_change=["training.max_steps"])
    assert [entry["step"] for entry in done.metrics] == [1, 2, 3, 4]
    assert "eval_loss" in done.metrics[-1]
    assert done.run["eval"]["last"]["eval_loss"] == done.metrics[-1]["eval_loss"]


def test_a_change_allows_no_other_rows(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stopped(recipe)
    run = read_run(out)
    run["data"]["content"] = ["of another tokenizer"]
    (out / "run.json").write_text(json.dumps(run))
    with pytest.raises(UsageError, match=r"encoded otherwise: .*, transformers or peftcli has changed"):
        run_recipe(recipe, "training.learning_rate=0.001", allow_change=["training.learning_rate"])
    changed = run_recipe(recipe, allow_change=["data"]).run["changes"]
    assert [change["key"] for change in changed] == ["data"]


def test_rows_are_rendered_as_on_the_day_that_the_run_began(recipe: Path) -> None:
    dated = recipe.parent / "dated.jinja"
    dated.write_text("{{ strftime_now('%d %b %Y') }}" + trainkit.CHATML)
    settings = (f"base_model.chat_template={dated}",)
    with date.fixed_date("2024-07-26"):
        whole = run_recipe(recipe, *settings, f"training.output_dir={recipe.parent}/whole")
        stopped(recipe, *settings)
    with date.fixed_date("2024-07-27"):
        done = run_recipe(recipe, *settings)
        other = run_recipe(recipe, *settings, f"training.output_dir={recipe.parent}/other")
    assert done.run["day"] == "2024-07-26"
    assert done.weights == whole.weights
    assert other.weights != whole.weights


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [("device", "cuda", "cpu"), ("bf16", True, False), ("versions.torch", "1.0", torch.__version__)],
)
def test_another_device_precision_or_version_is_noted(recipe: Path, key: str, before: object, now: object) -> None:
    out = stopped(recipe)
    run = read_run(out)
    (run["versions"] if "." in key else run)[key.removeprefix("versions.")] = before
    (out / "run.json").write_text(json.dumps(run))
    done = run_recipe(recipe).run
    assert done["changes"] == [{"key": key, "before": before, "now": now, "step": 4}]
    assert (done["exact"], (done["versions"] | done)[key.removeprefix("versions.")]) == (False, now)


def test_a_killed_attempt_ended_at_its_last_checkpoint(recipe: Path) -> None:
    out = stopped(recipe, *EVERY_TWO, "training.save_total_limit=9", step=5)
    run = read_run(out)
    del run["attempts"][-1]["end_step"], run["attempts"][-1]["reason"]
    (out / "run.json").write_text(json.dumps(run))
    done = run_recipe(recipe, *EVERY_TWO, resume=str(out / "checkpoints/step-000002"))
    assert [(each["from_step"], each["end_step"]) for each in done.run["attempts"]] == [(0, 5), (2, 8)]
    assert [each["reason"] for each in done.run["attempts"]] == ["killed", "complete"]
    assert done.run["wall_seconds"] > run["wall_seconds"] > 0


def test_a_checkpoint_that_was_to_be_replaced_is_found_again(recipe: Path) -> None:
    out = stopped(recipe)
    (out / "checkpoints/step-000004").rename(out / "checkpoints/.replaced-step-000004")
    assert run_recipe(recipe).run["attempts"][-1]["from_step"] == 4


def test_a_pid_that_is_gone_is_not_running_though_another_holds_the_folder(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(recipe)
    run = read_run(out) | {"status": "running", "pid": 4_194_999}
    (out / "run.json").write_text(json.dumps(run))
    holder = RunFolder(out)
    holder.lock()
    assert status(out)["status"] == "interrupted"
    assert main(["status", str(out)]) == 0
    assert "the process ended without recording a reason" in capsys.readouterr().out
    run["pid"] = os.getpid()
    (out / "run.json").write_text(json.dumps(run))
    assert status(out)["status"] == "running"
    assert main(["status", str(out)]) == 0
    assert f"running, process {os.getpid()}" in capsys.readouterr().out
    holder.close()


def test_a_look_at_the_lock_makes_no_run_busy(tmp_path: Path) -> None:
    looking = (tmp_path / ".lock").open("a")
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.2, looking.close).start()
    folder = RunFolder(tmp_path)
    folder.lock()
    folder.close()


def test_a_log_that_nobody_reads_any_more_ends_no_training(recipe: Path) -> None:
    assert Child(recipe.parent, "train", recipe, before=_nobody_reads).wait() == 0
    assert read_run(recipe.parent / "out")["status"] == "complete"


def _nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 2)


@pytest.mark.slow  # imports everything
def test_nor_does_it_when_python_ends(recipe: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "peftcli", "train", str(recipe)],
        stderr=write, stdout=subprocess.PIPE, check=False, env=trainkit.subprocess_environment(),
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 0
    assert read_run(recipe.parent / "out")["status"] == "complete"


# --- what a launcher says of its processes ----------------------------------------------------------------------------


def test_the_launcher_tells_what_its_processes_could_not(recipe: Path) -> None:
    out = stopped(recipe)
    folder = RunFolder(out)
    before = read_records(folder)
    record_failure(folder, OutOfMemory("not enough memory"), before)
    assert read_run(out)["exit_code"] == 75, "nothing was started since"
    run = read_run(out) | {"status": "failed", "exit_code": 10, "error": None, "pid": 1}
    (out / "run.json").write_text(json.dumps(run))
    for error in (ProcessDied("process 1 of 2 was killed by SIGKILL"), OutOfMemory("not enough memory")):
        record_failure(folder, error, before)
        assert (read_run(out)["status"], read_run(out)["exit_code"]) == ("failed", error.exit_code)
        assert read_run(out)["error"] == error.as_dict()
