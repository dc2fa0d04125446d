"""Several machines: two hosts with addresses of their own train together, lose a process or each other, and go on."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainkit
from hosts import PORT, Pair, can_make_hosts, ended, made_pair, processes_of
from safetensors.torch import load_file
from torch.distributed import HashStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from trainkit import read_run, run_recipe

from peftcli.errors import AdapterError, DataError, Diverged, GateFailed, ProcessDied, UsageError
from peftcli.schema import Launch
from peftcli.train import read_data
from peftcli.train.devices import machines
from peftcli.train.devices.launch import Failed, HangDetector
from peftcli.train.devices.machines import Agent, NumberedRendezvous
from peftcli.train.runs import identity

STEPS = ("training.max_steps=40", "training.save_strategy=steps", "training.save_steps=5", "training.eval_strategy=no")


@pytest.fixture
def pair(recipe: Path) -> Iterator[Pair]:
    if not can_make_hosts():
        pytest.skip("hosts are network namespaces, which only root on Linux can make")
    with made_pair(recipe) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicate", "ddp", "fsdp", "zero2", "zero3"])
def test_two_hosts_give_the_series_of_one_process(strategy: str, pair: Pair) -> None:
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    one = run_recipe(pair.recipe, "training.eval_strategy=epoch")
    (answer, err), (nothing, _) = map(ended, pair.both("training.eval_strategy=epoch", f"launch.strategy={strategy}"))
    assert "UserWarning" not in err
    assert [entry["loss"] for entry in pair.lines() if "loss" in entry] == pytest.approx(one.losses, rel=1e-5)
    assert read_run(pair.folder(0))["processes"] == 2
    assert '"status": "complete"' in answer
    assert not nothing
    assert not pair.folder(1).exists()


def in_twos(pair: Pair, strategy: str) -> tuple[list[float], int]:
    """The losses of a run of two processes on each host, and the bytes that one host has sent to the other."""
    before = pair.hosts[0].sent()
    size = "training.per_device_train_batch_size=1"
    for process in pair.both(*STEPS[:1], STEPS[-1], "launch.num_processes=2", size, f"launch.strategy={strategy}"):
        ended(process)
    found = [entry["loss"] for entry in pair.lines() if "loss" in entry]
    pair.folder(0).rename(pair.folder(0).with_name(strategy))
    return found, pair.hosts[0].sent() - before


@pytest.mark.slow
def test_only_gradients_of_the_adapter_go_from_host_to_host(pair: Pair) -> None:
    one = run_recipe(pair.recipe, STEPS[0], STEPS[-1])
    sent = dict[str, int]()
    for strategy in ("replicate", "hybrid", "fsdp"):
        found, sent[strategy] = in_twos(pair, strategy)
        assert found == pytest.approx(one.losses, rel=1e-5)
        adapter = load_file(pair.folder(0).with_name(strategy) / "adapter_model.safetensors")
        torch.testing.assert_close(adapter, load_file(one.folder / "adapter_model.safetensors"), atol=1e-5, rtol=1e-5)
    assert sent["hybrid"] < 1.1 * sent["replicate"]
    assert sent["fsdp"] > 3 * sent["hybrid"]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torchrun", "a PyTorchJob"])
def test_launchers_of_the_field_on_two_hosts(by: str, pair: Pair) -> None:
    settings, address = "training.eval_strategy=epoch", pair.hosts[0].address
    one = run_recipe(pair.recipe, settings)
    running = []
    for rank in (0, 1):
        if by == "torchrun":
            place = [f"--node-rank={rank}", f"--master-addr={address}", f"--master-port={PORT}"]
            launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *place]
            running.append(pair.run(rank, [settings], launcher))
        else:
            pod = {"PET_NNODES": "2", "WORLD_SIZE": "2", "RANK": str(rank)}
            running.append(pair.run(rank, [settings], env={**pod, "MASTER_ADDR": address, "MASTER_PORT": str(PORT)}))
    (answer, _), _ = map(ended, running)
    assert [entry["loss"] for entry in pair.lines() if "loss" in entry] == pytest.approx(one.losses, rel=1e-5)
    assert read_run(pair.folder(0))["processes"] == 2
    assert '"status": "complete"' in answer


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["a machine", "a process"])
def test_what_is_lost_comes_back_and_the_run_ends_with_the_same_bytes(pair: Pair, lost: str) -> None:
    for process in pair.both(*STEPS):
        ended(process)
    wanted = pair.adapter()
    pair.folder(0).rename(pair.folder(0).with_name("undisturbed"))
    first, second = pair.both(*STEPS)
    pair.wait_for_step(12)
    if lost == "a machine":
        second.kill()
        second = pair.start(1, *STEPS)
    else:
        os.kill(processes_of(second)[0], signal.SIGKILL)
    _, err = ended(first)
    ended(second)
    assert "all go on at the newest checkpoint" in err
    assert read_run(pair.folder(0))["attempts"][-1]["from_step"] >= 10
    assert pair.adapter() == wanted


@pytest.mark.slow
def test_a_machine_without_power_is_noticed_and_comes_back(pair: Pair) -> None:
    first, second = pair.both(*STEPS)
    pair.wait_for_step(12)
    pair.hosts[1].unplug()
    second.kill()
    end = time.monotonic() + 120
    while processes_of(first):  # it ends them, and waits for the other machine
        assert time.monotonic() < end
        time.sleep(1)
    pair.hosts[1].plug()
    second = pair.start(1, *STEPS)
    _, err = ended(first)
    ended(second)
    assert "restart 1 of" in err
    assert read_run(pair.folder(0))["attempts"][-1]["from_step"] >= 10


@pytest.mark.slow
def test_where_the_machines_meet_there_is_no_power_and_the_others_end(pair: Pair) -> None:
    first, second = pair.both(*STEPS)
    pair.wait_for_step(3)
    pair.hosts[0].unplug()
    first.kill()
    ended(second, ProcessDied.exit_code)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_on_one_host_reaches_both(pair: Pair, number: signal.Signals) -> None:
    first, second = pair.both(*STEPS[:-2], "training.eval_strategy=no")
    pair.wait_for_step(3)
    second.send_signal(number)
    if number == signal.SIGUSR2:
        _, err = ended(first)
        ended(second)
        saved = re.findall(r"checkpoint: \S+step-(\d+)", err)
        assert any(int(step) < 40 for step in saved), err  # the last step is saved by itself
        return
    for process in (first, second):
        _, err = ended(process, 75)
        assert "restart" not in err
    for process in pair.both(*STEPS[:-2], "training.eval_strategy=no"):
        ended(process)
    assert len(read_run(pair.folder(0))["attempts"]) == 2


@pytest.mark.slow
def test_what_fails_by_itself_is_not_started_again(pair: Pair) -> None:
    for process in pair.both("training.learning_rate=1e6", "training.max_grad_norm=0"):
        _, err = ended(process, Diverged.exit_code)
        assert "restart" not in err


@pytest.mark.slow
def test_two_machines_of_one_number_are_refused(pair: Pair) -> None:
    both = [pair.start(rank, number=0) for rank in (0, 1)]
    found = {process.communicate(timeout=240)[1]: process.returncode for process in both}
    assert set(found.values()) == {UsageError.exit_code}
    assert all("launch.machine_rank: not every machine has a number of its own" in err for err in found)


@pytest.mark.slow
def test_a_machine_that_waits_for_the_others_can_be_stopped(pair: Pair) -> None:
    alone = pair.start(0)
    time.sleep(10)
    alone.send_signal(signal.SIGTERM)
    ended(alone, 143)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_are_told_why_one_ends(rank: int, pair: Pair) -> None:
    """Data that has changed on one machine alone is refused by its process, and not started again."""
    pair.start(1 - rank)
    other = pair.recipe.parent / "other.jsonl"
    trainkit.write_rows(other, trainkit.MESSAGES[3:])
    pair.start(rank, f"dataset.train={other}")
    for process in pair.running:
        _, err = ended(process, 3)
        assert "its rows are not the same for all processes" in err
        assert "restart" not in err


@pytest.mark.slow
def test_a_failed_gate_is_the_first_machines(pair: Pair) -> None:
    first, second = pair.both("training.eval_strategy=epoch", "gates={eval_loss: <= 0.1}")
    out, _ = ended(first, GateFailed.exit_code)
    assert '"status": "complete"' in out
    _, err = ended(second)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("recipe", r"training\.learning_rate: is 0\.005 in process 0, and 0\.001 in process 1"),
        ("base model", r"base_model\.name: its files are not the same for all processes"),
        ("rows", "dataset: its rows are not the same for all processes"),
        ("places", None),
    ],
)
def test_what_differs_between_machines_is_refused(
    other: str, said: str | None, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(own: list[Any]) -> list[Any]:
        (value,), theirs = own, own[0]
        if isinstance(value, dict):
            theirs = value | ({"training.learning_rate": 1e-3} if other == "recipe" else {})
            assert not any(str(recipe.parent) in str(each) for each in value.values()), "each has a place of its own"
        elif isinstance(value, str):
            theirs = "other" if other == "base model" else value
        elif other == "rows":
            theirs = []
        return [value, theirs]

    for module in (identity, read_data):
        monkeypatch.setattr(module, "gather_object", gather)
    if said is None:
        run_recipe(recipe)
    else:
        with pytest.raises((UsageError, DataError), match=said):
            run_recipe(recipe)


def test_a_machine_waits_for_the_first_one_no_longer_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_JOIN_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as other:  # a server of something else, which says nothing
        port = other.getsockname()[1]
        place = Launch(num_machines=2, machine_rank=1, main_process_ip="127.0.0.1", main_process_port=port)
        with pytest.raises(ProcessDied, match="where the machines meet, does not answer"):
            machines._rendezvous(place, "127.0.0.1")


def rendezvous(number: int, store: Any) -> NumberedRendezvous:
    """A machine's rendezvous, which the agent would number otherwise."""
    found = SimpleNamespace(store=store, rank=5, world_size=2, bootstrap_store_info=None)
    return NumberedRendezvous(
        SimpleNamespace(next_rendezvous=lambda: found), number, "10.0.0.9" if number == 0 else "10.0.0.10"
    )


def test_machines_have_the_numbers_of_their_recipes() -> None:
    with ThreadPoolExecutor(2) as machines:
        store = HashStore()
        both = [machines.submit(rendezvous(each, store).next_rendezvous) for each in (1, 0)]
        assert [each.result().rank for each in both] == [1, 0]
        assert {each.result().bootstrap_store_info.master_addr for each in both} == {"10.0.0.9"}
        store = HashStore()
        for each in [machines.submit(rendezvous(1, store).next_rendezvous) for _ in range(2)]:
            with pytest.raises(UsageError, match="not every machine has a number of its own below 2"):
                each.result()


def test_machines_that_are_all_idle_hang() -> None:
    one, other = rendezvous(0, HashStore()), rendezvous(1, None)
    one.store = other.store = HashStore()
    one.others = other.others = 1
    assert one.idle_everywhere(200.0) == 0  # nothing is known of the other
    assert other.idle_everywhere(3.0) == 3
    assert other.idle_everywhere(190.0) == 190
    for everywhere, reason in ((one.idle_everywhere, None), (lambda _: 181.0, "for 181 seconds")):
        detector = HangDetector(seen=(0.0, float("inf"), 2**62))  # nobody computes, or reads and writes
        found = detector.find_hang({0: os.getpid()}, training=True, everywhere=everywhere)
        assert found is None if reason is None else reason in str(found)


def test_a_machine_hears_why_another_has_ended() -> None:
    one, other = rendezvous(0, HashStore()), rendezvous(1, None)
    assert other.wait_for_end(0) is None
    one.store = other.store = HashStore()
    one.others = 1
    assert other.wait_for_end(0) is None
    with ThreadPoolExecutor(1) as machines:
        said = machines.submit(one.announce_end, Diverged("the loss of step 3 is not finite", hint="lower it"))
        heard = other.wait_for_end(5)
        said.result(timeout=5)
    assert heard is not None
    assert (heard.exit_code, str(heard)) == (Diverged.exit_code, "the loss of step 3 is not finite\nlower it")


@pytest.mark.parametrize(
    ("error", "other", "again"),
    [
        (ProcessDied("died"), None, True),
        (None, None, True),
        (Diverged("no"), None, False),
        (AdapterError("no"), None, False),
        (Failed("a defect of ours"), None, False),
        (ProcessDied("another ended"), Diverged("there"), False),
    ],
)
def test_only_lost_processes_are_started_again(
    error: Any, other: Any, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarted = []
    monkeypatch.setattr(machines.LocalElasticAgent, "_restart_workers", lambda self, group: restarted.append(group))
    agent: Any = object.__new__(Agent)
    agent.error, agent.tell, agent.waiting, agent.forwarded, agent._remaining_restarts = (
        error,
        lambda _: None,
        [],
        [],
        2,
    )
    agent.spec, agent.rendezvous = SimpleNamespace(max_restarts=3), SimpleNamespace(wait_for_end=lambda seconds: other)
    if again:
        agent._restart_workers("group")
    else:
        with pytest.raises(type(other or error)):
            agent._restart_workers("group")
    assert bool(restarted) is again


@pytest.mark.parametrize(("reported", "state"), [(("null", "null"), "SUCCEEDED"), (("null",), "FAILED")])
def test_processes_that_are_aborted_after_their_work_are_not_started_again(
    reported: tuple[str, ...], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aborted = ProcessFailure(local_rank=1, pid=1, exitcode=-signal.SIGABRT, error_file="")
    failed = RunResult(WorkerState.FAILED, failures={1: aborted})
    monkeypatch.setattr(machines.LocalElasticAgent, "_monitor_workers", lambda self, group: failed)
    for number, text in enumerate(reported):
        (tmp_path / f"{number}.json").write_text(text)
    agent: Any = object.__new__(Agent)
    agent.status, agent.waiting, agent.forwarded, agent._pcontext = tmp_path, [], [], None
    agent.spec, agent.detector = SimpleNamespace(local_world_size=2), SimpleNamespace(find_hang=lambda *_, **__: None)
    agent.rendezvous = SimpleNamespace(idle_everywhere=None)
    group: Any = SimpleNamespace(workers=[SimpleNamespace(global_rank=2), SimpleNamespace(global_rank=3)])
    result = agent._monitor_workers(group)
    assert result.state.name == state
    assert [*result.return_values] == ([2, 3] if state == "SUCCEEDED" else [])
    assert (agent.error is None) is (state == "SUCCEEDED")
