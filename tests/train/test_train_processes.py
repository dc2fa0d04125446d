"""Several training processes, started by peftcli, torchrun, accelerate, or by hand."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trainkit
from trainkit import Child, read_metrics, read_run, run_recipe

from peftcli.cli.app import main
from peftcli.train.devices.launch import HangDetector, _Group, first_error, peftcli_command

HALF = ("training.per_device_train_batch_size=2", "training.eval_strategy=epoch")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def group(
    folder: Path, *args: object, count: int = 2, before: dict[int, Callable[[], None]] | None = None
) -> list[Child]:
    """``peftcli ARGS`` as processes that know of one another, as a launcher starts them."""
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    return [
        Child(folder, *args, env={**shared, "RANK": str(n), "LOCAL_RANK": str(n)}, before=(before or {}).get(n))
        for n in range(count)
    ]


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [entry[key] for entry in read_metrics(folder) if key in entry]


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("method", [None, trainkit.PROMPT_TUNING], ids=["lora", "prompt_tuning"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_give_the_series_of_one(recipe: Path, method: str | None, accumulation: int) -> None:
    settings = [*([method] if method else []), "training.eval_strategy=epoch", "training.eval_on_start=true"]
    one = run_recipe(recipe, *settings)
    size = 4 // 2 // accumulation
    two = recipe.parent / "two"
    children = group(
        recipe.parent,
        "train",
        recipe,
        *settings,
        f"training.output_dir={two}",
        f"training.per_device_train_batch_size={size}",
        f"training.gradient_accumulation_steps={accumulation}",
    )
    assert [child.wait() for child in children] == [0, 0]
    assert losses(two) == pytest.approx(one.losses, rel=1e-5)
    assert losses(two, "eval_loss") == pytest.approx(losses(one.folder, "eval_loss"), rel=1e-5)
    assert losses(two, "grad_norm") == pytest.approx(losses(one.folder, "grad_norm"), rel=1e-4)
    assert read_run(two)["processes"] == 2
    assert (children[1].out, children[1].err.count("step")) == ("", 0), "only process 0 speaks"


@pytest.mark.slow
def test_three_processes_and_rows_that_do_not_divide(recipe: Path) -> None:
    """Global batches of 6, 4, ... rows over three processes of two: some micro-batches are empty."""
    settings = ("training.eval_strategy=epoch", "training.max_steps=4", "training.gradient_checkpointing=true")
    one = run_recipe(recipe, *settings, "training.per_device_train_batch_size=9")
    three = recipe.parent / "three"
    children = group(
        recipe.parent,
        "train",
        recipe,
        *settings,
        f"training.output_dir={three}",
        "training.per_device_train_batch_size=3",
        count=3,
    )
    assert [child.wait() for child in children] == [0, 0, 0]
    assert losses(three) == pytest.approx(one.losses, rel=1e-5)


@pytest.mark.slow
def test_a_failed_gate_of_two_processes(recipe: Path) -> None:
    children = group(recipe.parent, "train", recipe, *HALF, "gates.eval_loss=<= 0.001")
    assert children[0].wait() == 12
    assert children[1].wait() == 0
    assert "eval_loss" in children[0].err
    assert (recipe.parent / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize("strategy", ["replicate", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_stop_and_resume(recipe: Path, strategy: str) -> None:
    settings = (*HALF, "method.lora_dropout=0.2", f"launch.strategy={strategy}", "training.seed=4294967295")
    whole = recipe.parent / "whole"
    assert [c.wait() for c in group(recipe.parent, "train", recipe, *settings, f"training.output_dir={whole}")] == [
        0,
        0,
    ]
    children = group(recipe.parent, "train", recipe, *settings, before={1: _stop_in_step_4})
    assert [child.wait() for child in children] == [75, 75], "both learn of the signal that one of them got"
    run = read_run(recipe.parent / "out")
    assert (run["status"], run["steps"]["done"]) == ("interrupted", 4)
    manifest = recipe.parent / "out/checkpoints/step-000004"
    assert len(list(manifest.glob("random-*.safetensors"))) == 2
    children = group(recipe.parent, "train", recipe, *settings)
    assert [child.wait() for child in children] == [0, 0]
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (recipe.parent / "out" / name).read_bytes() == (whole / name).read_bytes()


def _stop_in_step_4() -> None:
    _in_step_4(lambda: os.kill(os.getpid(), signal.SIGTERM))


def _die_in_step_4() -> None:
    _in_step_4(lambda: os.kill(os.getpid(), signal.SIGKILL))


def _in_step_4(action: Callable[[], None]) -> None:
    from peftcli.train.plan import Plan

    micro_batches = Plan.micro_batches

    def watched(self: Plan, step: int, process: int) -> list[list[int]]:
        if step == 3:
            action()
        return micro_batches(self, step, process)

    Plan.micro_batches = watched  # type: ignore[method-assign]


def test_another_number_of_processes_is_refused(recipe: Path) -> None:
    run_recipe(recipe)
    children = group(recipe.parent, "train", recipe)
    assert children[0].wait() == 2
    assert "processes: 1 -> 2" in children[0].err
    children[1].signal(signal.SIGKILL)
    children[1].wait()


def test_the_others_end_when_one_dies(recipe: Path) -> None:
    children = group(recipe.parent, "train", recipe, *HALF, before={1: _die_in_step_4})
    assert children[1].wait() == -signal.SIGKILL
    assert children[0].wait() == 10
    run = read_run(recipe.parent / "out")
    assert (run["status"], run["exit_code"], run["error"]["kind"]) == ("failed", 10, "ProcessDied")


def _note_copies() -> None:
    """Write which of the base model's weights were copied before the first step: pages of its file are shared."""
    from peftcli.train import setup as module

    load, prepare = module.load_base, module.prepare
    there = set[int]()

    def loaded(recipe: Any, task: Any) -> Any:
        found = load(recipe, task)
        there.update(value.data_ptr() for value in found.model.parameters())
        return found

    def prepared(model: Any, config: Any, recipe: Any, plan: Any, accelerator: Any) -> Any:
        found = prepare(model, config, recipe, plan, accelerator)
        weights = {name: value for name, value in model.named_parameters() if "lora_" not in name}
        copied = [name for name, value in weights.items() if value.data_ptr() not in there]
        Path(recipe.training.output_dir).with_name(f"copied-{accelerator.process_index}").write_text(str(copied))
        return found

    module.load_base, module.prepare = loaded, prepared


@pytest.mark.grid
@pytest.mark.parametrize("bf16", ["false", "true"])
def test_processes_share_the_pages_of_the_base_models_file(bf16: str, recipe: Path) -> None:
    children = group(
        recipe.parent, "train", recipe, f"training.bf16={bf16}", before=dict.fromkeys((0, 1), _note_copies)
    )
    assert [child.wait() for child in children] == [0, 0], children[0].err
    assert [(recipe.parent / f"copied-{number}").read_text() for number in (0, 1)] == ["[]", "[]"]


def test_the_launcher_and_the_recipe_must_agree(recipe: Path) -> None:
    children = group(recipe.parent, "train", recipe, "launch.num_processes=3")
    assert [child.wait() for child in children] == [2, 2]
    assert "wants 3 processes, the launcher started 2" in children[0].err
    assert not (recipe.parent / "out").exists()


def test_one_started_where_several_were_asked_for(recipe: Path) -> None:
    """What ``accelerate launch --cpu --num_processes 2`` leaves in the environment."""
    env = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    child = Child(recipe.parent, "train", recipe, env=env)
    assert child.wait() == 2
    assert "--multi_gpu" in child.err


def test_a_process_imports_nothing_from_the_current_folder(tmp_path: Path) -> None:
    for name in ("random.py", "runpy.py", "peftcli/__main__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit(77)")
    command = peftcli_command(["chek"])
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: No such command 'chek'.")


# --- real launchers ---------------------------------------------------------------------------------------------------


def launch(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=240,
        env=trainkit.subprocess_environment(),
    )


def test_peftcli_starts_the_processes_itself(recipe: Path) -> None:
    measured = ("training.eval_strategy=epoch", "training.eval_on_start=true")
    one = run_recipe(recipe, *measured, f"training.output_dir={recipe.parent}/one")
    settings = (*HALF, *measured, "launch.num_processes=2", "--json")
    launcher = Child(recipe.parent, "train", recipe, *settings, before=_start_forked_processes)
    assert launcher.wait() == 0, launcher.err
    assert losses(recipe.parent / "out") == pytest.approx(one.losses, rel=1e-5)
    assert losses(recipe.parent / "out", "eval_loss") == pytest.approx(losses(one.folder, "eval_loss"), rel=1e-5)
    assert losses(recipe.parent / "out", "grad_norm") == pytest.approx(losses(one.folder, "grad_norm"), rel=1e-4)
    assert json.loads(launcher.out)["processes"] == 2
    assert "2 x cpu" in launcher.err


class Forked:
    """In the place of ``subprocess.Popen`` of a command of ours: a fork, which need not import everything anew."""

    def __init__(self, words: list[str], *, env: dict[str, str], stdout: Any, pass_fds: list[int], **_: bool):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.clear()
            os.environ.update(env)
            os.dup2(os.open(os.devnull, os.O_WRONLY) if stdout == subprocess.DEVNULL else stdout.fileno(), 1)
            code = main(words[3:])
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode


def _start_forked_processes() -> None:
    from peftcli.train.devices import launch as module

    module.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]


LAUNCHERS = {
    "peftcli": ("peftcli",),
    "torchrun": ("torch.distributed.run", "--nproc_per_node", 2, "--standalone", "-m", "peftcli"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "-m", "peftcli"),
    "accelerate, fsdp": (
        *("accelerate.commands.launch", "--use_fsdp", "--fsdp_version", 2, "--fsdp_reshard_after_forward", "true"),
        *("--num_processes", 2, "-m", "peftcli"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_real_launchers(recipe: Path, launcher: str) -> None:
    one = run_recipe(recipe, "training.eval_strategy=epoch", f"training.output_dir={recipe.parent}/one")
    own = ["launch.num_processes=2"] if launcher == "peftcli" else []
    done = launch(*LAUNCHERS[launcher], "train", recipe, *HALF, *own)
    assert done.returncode == 0, done.stderr
    assert losses(recipe.parent / "out") == pytest.approx(one.losses, rel=1e-5)
    record = read_run(recipe.parent / "out")
    assert record["processes"] == 2
    assert record["recipe"]["launch"]["strategy"] == ("fsdp" if "fsdp" in launcher else "replicate")


@pytest.mark.slow
def test_accelerate_that_starts_one_of_two_is_refused(recipe: Path) -> None:
    done = launch("accelerate.commands.launch", "--cpu", "--num_processes", 2, "-m", "peftcli", "train", recipe)
    assert done.returncode != 0
    assert "started one" in done.stderr
    assert not (recipe.parent / "out").exists()


@pytest.mark.slow
def test_the_exit_code_of_a_process_survives(recipe: Path) -> None:
    (recipe.parent / "train.jsonl").write_text("{broken\n")
    done = launch("peftcli", "train", recipe, "launch.num_processes=2", "--json")
    assert done.returncode == 3, done.stderr
    assert done.stdout.count('"kind": "DataError"') == 1


class Started:
    """``peftcli train`` with two processes, going on for long."""

    def __init__(self, recipe: Path):
        self.folder = recipe.parent / "out"
        self.launcher = subprocess.Popen(
            [sys.executable, "-m", "peftcli", "train", str(recipe), "launch.num_processes=2", *HALF, "--json",
             "training.max_steps=1000000", "training.eval_strategy=no"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=trainkit.subprocess_environment(),
        )  # fmt: skip

    def until_it_trains(self) -> None:
        deadline = time.monotonic() + 240
        metrics = self.folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert self.launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def processes(self) -> list[int]:
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text()
        return [int(word) for word in children.split()]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waited for counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@pytest.mark.slow
def test_a_signal_while_the_processes_import(recipe: Path) -> None:
    started = Started(recipe)
    deadline = time.monotonic() + 240
    while len(started.processes()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.launcher.send_signal(signal.SIGTERM)
    _, err = started.launcher.communicate(timeout=240)
    assert started.launcher.returncode == 143, err


@linux
@pytest.mark.slow
def test_a_launcher_that_is_killed_while_the_processes_import_leaves_no_orphans(recipe: Path) -> None:
    started = Started(recipe)
    while len(started.processes()) < 2:
        time.sleep(0.05)
    pids = started.processes()
    started.launcher.kill()
    started.launcher.communicate(timeout=240)
    deadline = time.monotonic() + 240
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@linux
@pytest.mark.slow
def test_a_second_signal_to_the_launcher_ends_all_at_once(recipe: Path) -> None:
    started = Started(recipe)
    started.until_it_trains()
    pids = started.processes()
    os.kill(pids[1], signal.SIGSTOP)  # so that the first signal cannot be answered
    started.launcher.send_signal(signal.SIGTERM)
    time.sleep(1)
    os.kill(pids[1], signal.SIGCONT)
    started.launcher.send_signal(signal.SIGTERM)
    _, err = started.launcher.communicate(timeout=240)
    assert started.launcher.returncode in (75, 143), err
    assert all(gone(pid) for pid in pids)


@pytest.mark.slow
def test_two_machines_share_the_run_folder(recipe: Path) -> None:
    one = run_recipe(recipe, "training.eval_strategy=epoch", f"training.output_dir={recipe.parent}/one")
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "peftcli", "train", str(recipe), *HALF, "launch.num_processes=1",
             "launch.num_machines=2", f"launch.machine_rank={rank}", f"launch.main_process_port={port}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=trainkit.subprocess_environment(),
        )
        for port in [free_port()]
        for rank in (0, 1)
    ]  # fmt: skip
    for machine in machines:
        _, err = machine.communicate(timeout=240)
        assert machine.returncode == 0, err
    assert losses(recipe.parent / "out") == pytest.approx(one.losses, rel=1e-5)
    assert read_run(recipe.parent / "out")["processes"] == 2


def test_a_process_that_is_aborted_after_its_work_has_not_failed(tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text("null")
    assert first_error(tmp_path, {0: -signal.SIGABRT}, 2, []) is None
    error = first_error(tmp_path, {0: -signal.SIGABRT, 1: -signal.SIGABRT}, 2, [])
    assert error is not None
    assert "process 1 of 2 was killed by SIGABRT" in error.message


@pytest.mark.parametrize(("reported", "failed"), [("null", False), ("", True)])
def test_a_process_that_has_done_its_work_need_not_end(
    reported: str, failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcli.train.devices.launch._GRACE_SECONDS", 0.5)
    group = _Group(tmp_path, None)
    for number, code in enumerate(("import time; time.sleep(60)", "")):
        if number == 1 or reported:
            (tmp_path / f"{number}.json").write_text("null")
        group.processes.append(subprocess.Popen([sys.executable, "-c", code]))
    error = group.wait()
    assert ("process 1 of 2 ended before the others" in str(error)) is failed
    assert failed or error is None
    assert group.processes[0].returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the detector reads /proc")
def test_a_group_is_busy_while_what_its_processes_have_started_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.train.devices.launch._IDLE_BEFORE", 0.0)
    code = "print(flush=True)\nwhile True: pass"
    for _ in range(2):  # a process that has started a worker that has started a compiler
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        detector = HangDetector()
        found = [(detector.find_hang({0: process.pid}, training=False), time.sleep(1.1))[0] for _ in range(2)]
        os.killpg(process.pid, signal.SIGKILL)
    assert found == [None, None]


@pytest.mark.skipif(sys.platform != "linux", reason="the detector reads /proc")
@pytest.mark.parametrize("measuring", [True, False])
def test_a_group_that_measures_may_wait(measuring: bool) -> None:
    now = time.monotonic()
    detector = HangDetector(busy=now - 60, seen=(now - 2, float("inf"), 2**62))  # nobody computes, or reads and writes
    found = detector.find_hang({0: os.getpid()}, training=True, measuring=measuring)
    assert (found is None) is measuring
