"""A sweep ends the best of its runs with the bits of that run alone, whatever stops it on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trainkit
from jsonschema import Draft202012Validator
from trainkit import read_run

from peftcli.cli.app import main
from peftcli.errors import Diverged, Interrupted, OutOfMemory, UsageError
from peftcli.output_schemas import output_schema
from peftcli.recipe import load_recipe
from peftcli.train.events import Event, Message
from peftcli.train.runs.record import ErrorRecord
from peftcli.train.sweep.halving import HALF, QUARTER, Halving, TimeUp
from peftcli.train.sweep.proposals import require_optuna
from peftcli.train.sweep.record import Measurement, SweepRecord, TrialRecord, error_of
from peftcli.train.sweep.runs import Runs
from peftcli.train.sweep.space import Range, Settings, read_space
from peftcli.train.sweep.start import SweepOptions, sweep

PRODUCT = ("adapter_config.json", "adapter_model.safetensors")
RATES = "training.learning_rate=1e-3,5e-3,2e-2"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """One with dropout, evaluations and checkpoints of its own."""
    path = trainkit.write_recipe(tmp_path)
    more = "eval_strategy: steps\n  eval_steps: 3\n  save_strategy: steps\n  save_steps: 3"
    text = path.read_text().replace("r: 4,", "r: 4, lora_dropout: 0.2,").replace('eval_strategy: "no"', more)
    path.write_text(text.replace('  save_strategy: "no"\n', ""))
    return path


def swept(
    recipe: Path, *words: str, on_event: Callable[[Event], None] = lambda event: None, **more: Any
) -> SweepRecord:
    trainkit.reset_accelerate()
    record, _ = sweep(SweepOptions(recipe, words, **more), on_event)
    Draft202012Validator(output_schema("sweep")).validate(record.as_dict())
    return record


def _kill_at_a_measurement() -> None:
    """Kill this process once it has recorded two measurements."""
    measure, done = Runs._measure, list[str]()

    def then_kill(self: Runs, trial: TrialRecord, share: float) -> None:
        measure(self, trial, share)
        done.append(trial.name)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    Runs._measure = then_kill  # type: ignore[method-assign]


def alone(recipe: Path, name: str, folder: Path) -> Path:
    """The run that a recipe of a sweep makes by itself."""
    made = folder / f"{name}-alone"
    trainkit.run_recipe(recipe.parent / f"out-sweep/{name}.yaml", f"training.output_dir={made}")
    return made


def assert_same(first: Path, second: Path) -> None:
    for name in PRODUCT:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


# --- whole sweeps -----------------------------------------------------------------------------------------------------


def test_the_winner_is_the_adapter_of_its_recipe_alone(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainkit.reset_accelerate()
    assert main(["sweep", str(recipe), RATES, "--json"]) == 0
    record, folder = json.loads(capsys.readouterr().out), tmp_path / "out-sweep"
    assert record == json.loads((folder / "sweep.json").read_text())
    Draft202012Validator(output_schema("sweep")).validate(record)
    winner = record["winner"]
    steps = {run["name"]: [run["steps"], run["verdict"]] for run in record["runs"]}
    assert sorted(steps.values()) == [
        [2, "stopped at 1/4"], [4, "second seed"], [4, "second seed"], [4, "stopped at 1/2"], [8, "winner"],
    ]  # fmt: skip
    assert_same(folder / winner, alone(recipe, winner, tmp_path))
    assert read_run(folder / winner)["status"] == "complete"
    stopped = next(name for name, (_, verdict) in steps.items() if verdict == "stopped at 1/4")
    run = read_run(folder / stopped)
    assert (run["status"], run["resumable"], run["steps"]["done"]) == ("interrupted", True, 2)
    assert run["error"]["message"] == "ended by the sweep: stopped at 1/4"
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert main(["sweep", str(recipe), RATES]) == 0  # there is nothing to do
    shown = capsys.readouterr()
    assert "complete already" in shown.err
    assert f"winner: {winner}" in shown.out
    assert "a second seed changes it by up to" in shown.out


def test_killed_after_each_rung_it_goes_on(recipe: Path, tmp_path: Path) -> None:
    """A kill leaves what was measured, and nothing of it is done again."""
    said: list[str] = []
    for number in range(3):  # in a rung, at its end, in the comparison of seeds
        child = trainkit.Child(tmp_path / f"{number}", "sweep", recipe, RATES, before=_kill_at_a_measurement)
        assert child.wait() == -signal.SIGKILL
        said += [line for line in child.err.splitlines() if " after " in line]
    record = swept(recipe, RATES, on_event=lambda event: said.append(getattr(event, "text", "")))
    measured = [text.partition(":")[0] + text.rpartition(" after ")[2] for text in said if " after " in text]
    assert len(measured) == 8  # 3 at 1/4, 2 at 1/2, 2 seeds, and the winner: nothing twice
    assert len(measured) == len({*measured})
    assert record.winner is not None
    assert_same(tmp_path / "out-sweep" / record.winner, alone(recipe, record.winner, tmp_path))


def test_a_signal_stops_all_runs_with_checkpoints(recipe: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Message) and event.text.startswith("run-01") and "2 of 8" in event.text:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        swept(recipe, RATES, on_event=stop)
    assert caught.value.exit_code == 75
    folder = tmp_path / "out-sweep"
    runs = [read_run(folder / f"run-0{number}") for number in (1, 2, 3)]
    assert [run["status"] for run in runs] == ["interrupted"] * 3
    assert all(run["resumable"] for run in runs)
    assert json.loads((folder / "sweep.json").read_text())["status"] == "interrupted"
    record = swept(recipe, RATES)
    assert record.winner is not None
    assert_same(folder / record.winner, alone(recipe, record.winner, tmp_path))


def test_a_run_that_fails_is_named_and_the_others_go_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["training.learning_rate=1e-3,1e6", "training.max_grad_norm=0"]
    for _ in range(2):  # the same again, where nothing is left to do
        trainkit.reset_accelerate()
        assert main(["sweep", str(recipe), *words]) == Diverged.exit_code
        shown = capsys.readouterr()
        assert "run-02 failed: the " in shown.err
        assert "winner: run-01" in shown.out
    assert read_run(tmp_path / "out-sweep/run-01")["status"] == "complete"
    trainkit.reset_accelerate()
    assert main(["sweep", str(recipe), *words, "--json"]) == Diverged.exit_code
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "Diverged"


def test_without_keys_the_rate_comes_first_and_then_r(recipe: Path) -> None:
    record = swept(recipe, "training.max_steps=4")
    tried = [(run.settings["training.learning_rate"], run.settings["method.r"]) for run in record.runs]
    assert tried[:3] == [("0.00167", "4"), ("0.005", "4"), ("0.015", "4")]
    assert {rank for _, rank in tried} == {"2", "4", "8"}
    assert record.seeds is not None
    assert [run.seed for run in record.runs if run.second_seed_of] == [43, 43]


def test_minutes_leave_time_for_the_best_run_to_end(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def up(self: Runs, running: Sequence[object]) -> None:
        looked.append(len(running))
        if len(looked) == 3:  # after the first step
            raise TimeUp

    monkeypatch.setattr(Runs, "_look_at_time", up)
    record = swept(recipe, RATES, minutes=60.0)
    assert record.not_tried == ["a second seed"]
    assert sorted(run.verdict for run in record.runs) == ["stopped: no time left"] * 2 + ["winner"]
    winner = record.run(record.winner or "")
    assert winner.complete
    assert [each.step for each in winner.measured] == [1, 8]


def test_a_second_seed_is_measured_on_the_same_rows(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace(f"eval: {recipe.parent}/eval.jsonl", "eval_fraction: 0.3"))
    record = swept(recipe, RATES)
    folder = recipe.parent / "out-sweep"
    again = next(run.name for run in record.runs if run.second_seed_of)
    made = load_recipe(folder / f"{again}.yaml")
    assert (made.training.seed, made.dataset.eval_seed) == (43, 42)
    first, second = (read_run(folder / name)["data"]["content"] for name in ("run-01", again))
    assert first == second


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset.eval=null"], "dataset.eval_fraction: a sweep compares runs by evaluation rows"),
        (["training.bf16=true,false"], "training.bf16=false: training.bf16: is not that of training.bf16=true"),
        (["training.output_dir=a,b"], "training.output_dir: each run of a sweep has its own"),
        (["training.seed=1,,2"], "training.seed: a value is empty"),
        (["training.learning_rate=3..1"], "training.learning_rate: 3..1 is no range"),
        (["method.r=4,zwei"], "method.r: "),
        (["training.report_to=[tensorboard]", RATES], "training.report_to: does not work for recipes"),
        ([RATES, "training.learning_rate=1,2"], "training.learning_rate: is given twice"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    recipe: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainkit.reset_accelerate()
    assert main(["sweep", str(recipe), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 6
    assert not list((recipe.parent / "out-sweep").glob("run-*/run.json"))


def test_another_sweep_in_the_folder_is_refused(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        swept(recipe, RATES, output=folder)
    record = SweepRecord(status="running", recipe="r", recipe_sha256="0", keys=[])
    (tmp_path / "other").mkdir()
    record.write(tmp_path / "other")
    with pytest.raises(UsageError, match="holds a sweep of another recipe"):
        swept(recipe, RATES, output=tmp_path / "other")


def test_words_are_values_ranges_and_overrides() -> None:
    space = read_space(["a.b=1, 2,2", "m=[q,v],all", "x=1e-5..1e-2", "n=4..64", "f=3", 'g="a,b"'])
    assert space.choices == {"a.b": ["1", "2"], "m": ["[q,v]", "all"]}
    assert space.ranges == {"x": Range(1e-5, 1e-2, False), "n": Range(4, 64, True)}
    assert space.fixed == ["f=3", 'g="a,b"']
    assert [each.by_factors for each in space.ranges.values()] == [True, True]
    assert list(read_space(["a=1,2", "b=3,4"]).grid())[1] == {"a": "1", "b": "4"}


@pytest.mark.parametrize("word", ["training.learning_rate=1e-5..1e-2", f"method.r={','.join(map(str, range(1, 32)))}"])
def test_optuna_is_named_where_it_is_needed_and_missing(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package optuna: pip install 'peftcli\[optuna\]'"):
        require_optuna(read_space([word]))
    require_optuna(read_space(["method.r=1,2"]))


@pytest.mark.slow
def test_optuna_proposes_and_the_rungs_prune(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words = ("training.learning_rate=1e-4..1e-1", "method.r=2..8")
    record = swept(recipe, *words, trials=6)
    own = [run for run in record.runs if not run.second_seed_of]
    assert len(own) == 6
    assert all(1e-4 <= float(run.settings["training.learning_rate"]) <= 1e-1 for run in own)
    assert [sum(run.at(share) is not None for run in own) for share in (QUARTER, HALF)] == [6, 3]
    again = swept(recipe, *words, trials=6, output=tmp_path / "again")
    assert [run.settings for run in again.runs] == [run.settings for run in record.runs]
    assert record.winner is not None
    assert_same(tmp_path / "out-sweep" / record.winner, alone(recipe, record.winner, tmp_path))


# --- the decisions alone ----------------------------------------------------------------------------------------------


class Known:
    """A track on which a run's metric is known: the loss falls to its value, that of a second seed is 0.05 higher."""

    def __init__(self, losses: dict[str, float], up_at: int = 1000):
        self.losses, self.up_at, self.trained = losses, up_at, list[tuple[str, float]]()
        self.record = SweepRecord(status="running", recipe="r", recipe_sha256="0", keys=[])

    def trial(self, settings: Settings, second_seed_of: TrialRecord | None = None) -> TrialRecord:
        first = second_seed_of.name if second_seed_of else None
        name = settings["a"] + ("-seed" if first else "")
        for each in self.record.runs:
            if each.name == name:
                return each
        self.record.runs.append(TrialRecord(name=name, settings=settings, seed=0, second_seed_of=first))
        return self.record.runs[-1]

    def reach(self, trials: Sequence[TrialRecord], share: float, *, last: bool = False) -> None:
        for each in trials:
            if each.at(share) or each.error:
                continue
            if len(self.trained) == self.up_at and not last:
                raise TimeUp
            self.trained.append((each.name, share))
            value = self.losses[each.settings["a"]] + 0.05 * bool(each.second_seed_of) + (1 - share)
            each.measured.append(Measurement(share=share, step=int(8 * share), value=value, metrics={}))
            each.steps = int(8 * share)

    def measure(self) -> None:
        raise AssertionError

    def drop(self, trial: TrialRecord, why: str) -> None:
        trial.verdict = why


def grid_of(track: Known, **more: Any) -> TrialRecord | None:
    halving = Halving(track)
    settings = [{"a": name} for name in track.losses]
    return halving.name_winner(lambda: halving.grid(settings))


def test_a_half_goes_on_from_each_rung() -> None:
    track = Known(dict(zip("abcdefgh", (5, 3, 8, 1, 7, 2, 6, 4), strict=True)))
    winner = grid_of(track)
    assert winner is not None
    assert (winner.name, winner.verdict) == ("d", "winner")
    count = {share: [name for name, at in track.trained if at == share] for share in (QUARTER, HALF, 1.0)}
    assert [len(names) for names in count.values()] == [8 + 2 * 0, 4 + 2, 2]
    assert track.record.seeds is not None
    assert track.record.seeds.runs == ["d", "f"]
    assert not track.record.seeds.within


def test_a_difference_within_that_of_seeds_is_said() -> None:
    track = Known({"a": 1.0, "b": 1.01, "c": 2.0})
    assert grid_of(track) is not None
    seeds = track.record.seeds
    assert seeds is not None
    assert (round(seeds.difference, 4), round(seeds.by_seed, 4), seeds.within) == (0.01, 0.05, True)


@pytest.mark.parametrize("up_at", [3, 5, 7])
def test_when_the_time_is_up_the_best_known_ends(up_at: int) -> None:
    track = Known({"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, up_at)
    winner = grid_of(track)
    assert winner is not None
    assert winner.name == "b"
    assert "a second seed" in track.record.not_tried
    assert track.trained[-1] == ("b", 1.0)


def test_a_recorded_failure_is_raised_as_its_kind() -> None:
    trial = TrialRecord(name="run-07", settings={}, seed=1, error=ErrorRecord.of(OutOfMemory("not enough memory")))
    error = error_of(trial)
    assert isinstance(error, OutOfMemory)
    assert error.exit_code == 8
    assert str(error) == "run-07 failed: not enough memory"
