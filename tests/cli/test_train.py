from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainkit
from trainkit import Child, read_run, write_recipe

from peftcli.cli.progress import Progress
from peftcli.errors import Diverged, Interrupted
from peftcli.train.events import RowsRead

ESCAPE = "\x1b"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    trainkit.reset_accelerate()
    return write_recipe(tmp_path)


def test_the_answer_is_on_stdout_and_the_log_on_stderr(cli: Callable, recipe: Path) -> None:
    ran = cli("train", recipe, "training.eval_strategy=steps", "training.eval_steps=4", "training.eval_on_start=true")
    assert ran.code == 0
    folder = recipe.parent / "out"
    run = read_run(folder)
    assert ran.out.startswith("done: 8 steps in 0:0")
    assert f"{run['train_loss']:.4f}" in ran.out
    first, kept = run["eval"]["first"]["eval_loss"], run["eval"]["kept"]["eval_loss"]
    assert f"\n  eval_loss          {first:>10.4f}{kept:>10.4f}\n" in ran.out
    for command in ("generate", "merge", "push"):
        assert f"peftcli {command} {folder}" in ran.out
    lines = ran.err.splitlines()
    assert [line for line in lines if line.startswith("step 8/8  epoch 2.67  loss ")]
    assert [line for line in lines if line.startswith("evaluation after step 8: eval_loss ")]
    assert "training 3,712 of 38,432 parameters (9.66 %)" in lines
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert f"  adapter     {folder} (3,712 parameters, 9.66 %; {size / 1000:.1f} kB)" in ran.out.splitlines()
    assert ESCAPE not in ran.out + ran.err
    assert "\r" not in ran.err


def test_json_is_one_object_the_content_of_run_json(cli: Callable, recipe: Path) -> None:
    ran = cli("train", recipe, "--json")
    assert json.loads(ran.out) == read_run(recipe.parent / "out")
    assert "step 8/8" in ran.err
    again = cli("train", recipe, "--json")
    assert again.code == 0
    assert json.loads(again.out) == json.loads(ran.out)


def test_a_number_of_rows_is_shown_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.cli.progress._ROWS_INTERVAL", 0.0)
    progress = Progress()
    for count, done in ((1, False), (200, False), (200, True)):
        progress.show(RowsRead("a.jsonl", count, done))
    assert capsys.readouterr().err == "a.jsonl: 1 row read\na.jsonl: 200 rows read\n"


def test_quiet(cli: Callable, recipe: Path) -> None:
    ran = cli("train", recipe, "--quiet", trainkit.PROMPT_TUNING)
    assert ran.err == ""
    assert ran.out.startswith("done: 8 steps")
    assert "(160 parameters, 0.459 %; 760 bytes)" in ran.out


def test_quiet_shows_warnings(cli: Callable, recipe: Path) -> None:
    settings = ("training.save_strategy=steps", "training.save_steps=2")
    # a run that fails at its last step, whose newest checkpoint is then damaged
    (recipe.parent / "train.jsonl").rename(recipe.parent / "all.jsonl")
    shutil.copy(recipe.parent / "all.jsonl", recipe.parent / "train.jsonl")
    child = Child(recipe.parent, "train", recipe, *settings, before=_die_before_the_end)
    assert child.wait() == 1
    (recipe.parent / "out/checkpoints/step-000008/schedule.json").write_text("{}")
    ran = cli("train", recipe, *settings, "--quiet")
    assert ran.code == 0
    assert ran.err.startswith("warning: step-000008 is damaged")
    assert ran.err.count("\n") == 1


def _die_before_the_end() -> None:
    from peftcli.train import run

    def broken(*_: object) -> None:
        raise RuntimeError("no more")

    run.finish = broken


def test_a_finished_run_says_so(cli: Callable, recipe: Path) -> None:
    cli("train", recipe)
    again = cli("train", recipe)
    assert again.code == 0
    assert again.out.startswith("done: 8 steps")
    assert again.err == f"{recipe.parent}/out is complete already; nothing was done\n"


def test_resume_says_where_it_goes_on(cli: Callable, recipe: Path) -> None:
    settings = ("training.save_strategy=steps", "training.save_steps=3")
    assert Child(recipe.parent, "train", recipe, *settings, before=_die_before_the_end).wait() == 1
    ran = cli("train", recipe, *settings)
    assert "8 steps on cpu with 1 thread, as the environment says; resuming after step 8" in ran.err


def test_a_recipe_that_is_named_twice_trains_no_two_runs_together(
    cli: Callable, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    for again in ("recipe.yaml", "./recipe.yaml"):
        ran = cli("train", "recipe.yaml", again, "--together")
        assert (ran.code, ran.err.splitlines()[0]) == (2, "error: recipe.yaml: is named twice")


@pytest.mark.parametrize("diverges", [0, 1])
def test_each_error_of_runs_together_is_told_once(
    cli: Callable, recipe: Path, monkeypatch: pytest.MonkeyPatch, diverges: int
) -> None:
    def ended(recipes: dict[str, Any], *_: Any) -> dict[str, Any]:
        found: list[Any] = [Interrupted("stopped", exit_code=75), {"gates": []}]
        found.insert(diverges, Diverged("the loss is not finite"))
        return dict(zip(recipes, found, strict=True))

    monkeypatch.setattr("peftcli.train.together.start_together", ended)
    paths = [recipe.rename(recipe.parent / "a.yaml")]
    for name in ("b", "c"):
        paths.append(recipe.parent / f"{name}.yaml")
        paths[-1].write_text(paths[0].read_text().replace("out\n", f"{name}\n"))
    ran = cli("train", *paths, "--together", "--json")
    assert ran.code == 9
    assert json.loads(ran.out)["error"]["message"] == "the loss is not finite"
    assert [ran.err.count(text) for text in ("stopped", "the loss is not finite")] == [1, 1]
    dry = cli("train", *paths[:2], "--together", "--dry-run", "training.output_dir=same")
    assert (dry.code, "training.output_dir: is also that of" in dry.err) == (2, True)
    dry = cli("train", *paths[:2], "--together", "--dry-run", "launch.num_processes=2")
    assert (dry.code, "--together trains in one process" in dry.err) == (2, True)
    dry = cli("train", *paths[:2], "--together", "--dry-run", "launch.strategy=auto")
    assert (dry.code, "launch.strategy: auto is not for recipes that are trained together" in dry.err) == (2, True)


@pytest.mark.slow  # imports torch and matplotlib anew
def test_matplotlib_says_nothing_of_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    code = "from peftcli.train.finish import loss_curve; loss_curve([{'step': 1, 'loss': 1.0}])"
    environment = {**os.environ, "HOME": "/proc/none", "TMPDIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stderr == ""


def test_dry_run_changes_nothing(cli: Callable, recipe: Path) -> None:
    words = ("train", recipe, "--dry-run", "training.max_steps=-1", "training.num_train_epochs=2")
    ran = cli(*words, "--json")
    assert ran.code == 0
    shown = json.loads(ran.out)
    assert shown["parameters"] == {"trainable": 3712, "all": 38432}
    assert shown["steps"] == 6
    assert (shown["data"]["used"], shown["data"]["eval"]["used"]) == (10, 3)
    read = cli(*words).out
    assert "\n  method      lora, 3,712 of 38,432 parameters (9.66 %)\n" in read
    assert "\n  task        causal_lm, 6 steps of 4 rows\n" in read
    assert read.endswith(f"next:\n  peftcli train {recipe} training.max_steps=-1 training.num_train_epochs=2\n")
    assert not (recipe.parent / "out").exists()


def test_dry_run_under_a_launcher(cli: Callable, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in trainkit.ranks()[1].items():
        monkeypatch.setenv(name, value)
    ran = cli("train", recipe, "--dry-run")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    settings = ("training.max_steps=-1", "training.num_train_epochs=2")
    shown = json.loads(cli("train", recipe, "--dry-run", "--json", *settings).out)
    assert (shown["steps"], shown["memory"]["processes"]) == (4, 2)


def test_memory_that_is_not_known(cli: Callable, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("needs values")

    monkeypatch.setattr("peftcli.train.memory.estimate._estimate", fail)
    line = "memory: not known for this model\n"
    dry = cli("train", recipe, "--dry-run", "--json")
    assert (json.loads(dry.out)["memory"], line in dry.err, "needs values" in dry.err) == (None, True, False)
    assert cli("check", "--deep", recipe).out.endswith(f"ok: {recipe}\n{line}")
    assert "RuntimeError: needs values" in cli("check", "--deep", recipe, "--debug").err


def test_dry_run_of_a_recipe_that_would_fail(cli: Callable, recipe: Path) -> None:
    ran = cli("train", recipe, "--dry-run", "method.target_modules=[q_porj]")
    assert ran.code == 4
    assert "q_proj" in ran.err
    (recipe.parent / "train.jsonl").write_text("{")
    ran = cli("train", recipe, "--dry-run", "method.target_modules=[q_porj]")
    assert ran.code == 3
    assert "train.jsonl:1: " in ran.err
    assert "q_proj" in ran.err
    assert cli("check", recipe, "--deep").code == 3


@pytest.mark.parametrize(("gate", "code"), [("<= 100", 0), ("<= 0.01", 12)])
def test_gates(cli: Callable, recipe: Path, gate: str, code: int) -> None:
    ran = cli("train", recipe, "training.eval_strategy=epoch", f"gates.eval_loss={gate}", "--json")
    assert ran.code == code
    run = json.loads(ran.out)
    assert (run["status"], run["exit_code"], run["gates"][0]["passed"]) == ("complete", code, code == 0)
    assert (recipe.parent / "out/adapter_model.safetensors").exists()
    assert ("error: gates" in ran.err) == (code == 12)
    again = cli("train", recipe, "training.eval_strategy=epoch", f"gates.eval_loss={gate}")
    assert again.code == code
    assert f"eval_loss {gate}: {'passed' if code == 0 else 'FAILED'}" in again.out


def test_failures(cli: Callable, recipe: Path, tmp_path: Path) -> None:
    def fails(code: int, said: str, *args: str) -> None:
        trainkit.reset_accelerate()
        ran = cli("train", *args)
        assert ran.code == code, ran.err
        assert said in ran.err
        assert "Traceback" not in ran.err
        assert ran.out == ""

    fails(2, "did you mean", str(recipe), "training.learning_rat=1")
    fails(2, "no such file", str(recipe), "dataset.train=nowhere.jsonl")
    fails(2, "nowhere.yaml", str(tmp_path / "nowhere.yaml"))
    fails(4, "is not a model folder", str(recipe), "base_model=.")
    fails(5, "HF_HUB_OFFLINE is set", str(recipe), "base_model=acme/tiny", f"training.output_dir={tmp_path}/hub")
    fails(4, "q_proj", str(recipe), "method.target_modules=[q_porj]", f"training.output_dir={tmp_path}/typo")
    fails(2, "no such checkpoint", str(recipe), "--resume", "nowhere", f"training.output_dir={tmp_path}/resume")
    (tmp_path / "train.jsonl").write_text('{"text": 1}\n')
    fails(3, "train.jsonl:1", str(recipe), f"training.output_dir={tmp_path}/data")


def test_a_failure_as_json(cli: Callable, recipe: Path) -> None:
    (recipe.parent / "train.jsonl").write_text("{broken\n")
    ran = cli("train", recipe, "--json")
    error = json.loads(ran.out)["error"]
    assert (ran.code, error["exit_code"], error["kind"], error["line"]) == (3, 3, "DataError", 1)


def test_what_a_terminal_shows(recipe: Path) -> None:
    controller, terminal = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=_read, args=(controller, shown))
    reader.start()
    settings = ("training.eval_strategy=steps", "training.eval_steps=4")
    env = {"TERM": "xterm-256color", "COLUMNS": "120"}
    child = Child(recipe.parent, "train", recipe, *settings, terminal=os.ttyname(terminal), env=env)
    assert child.wait() == 0
    os.close(terminal)
    reader.join(10)
    text = b"".join(shown).decode()
    assert ESCAPE in text
    assert "8/8" in text
    assert "step 8/8" not in text, "the bar stands instead of the lines"
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "evaluation after step 4: eval_loss" in plain
    assert "done: 8 steps" in plain
    hide, show = f"{ESCAPE}[?25l", f"{ESCAPE}[?25h"
    assert text.count(hide) == text.count(show), "the cursor comes back"


def _read(controller: int, shown: list[bytes]) -> None:
    while True:
        try:
            block = os.read(controller, 4096)
        except OSError:  # the terminal was closed
            return
        if not block:
            return
        shown.append(block)
