"""Slurm's and Kubeflow's environments give a command its place; they are as these systems document them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from trainkit import Child, read_run

from peftcli.schema import Launch
from peftcli.train.devices import launch
from peftcli.train.devices.schedulers import take_slurms_rank, with_schedulers_place

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
}
POD = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
POD |= {"WORLD_SIZE": "2", "RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Launch()),
        (STEP, Launch(num_machines=3, machine_rank=2, main_process_ip="gpu07", main_process_port=22_977)),
        (STEP | {"SLURM_PTY_PORT": "4000"}, Launch()),  # a shell
        (STEP | {"SLURM_STEP_NODELIST": "a-1,a-2,b"}, "a-1"),
        (STEP | {"SLURM_STEP_NODELIST": "rack[1-2]node[01-04]-ib,x"}, "rack1node01-ib"),
        (
            {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            Launch(),
        ),  # a job of one pod
        (STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu07"}, Launch()),
        (POD, Launch(num_machines=2, machine_rank=1, main_process_ip="job-master-0", main_process_port=23_456)),
        (POD | {"LOCAL_RANK": "0"}, Launch()),  # started by torchrun there
    ],
)
def test_a_command_knows_its_machine(
    environment: dict[str, str], place: Launch | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = with_schedulers_place(Launch())
    assert (found.main_process_ip if isinstance(place, str) else found) == place
    own = replace(Launch(), num_machines=5, machine_rank=4)
    assert with_schedulers_place(own) is own
    assert launch.is_launched() is ("LOCAL_RANK" in environment)


@pytest.mark.slow
def test_tasks_of_one_node_train_together(recipe: Path) -> None:
    step = STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NODEID": "0"}
    settings = ("training.per_device_train_batch_size=2", "training.max_steps=2", "training.eval_strategy=no")
    tasks = [
        Child(recipe.parent, "train", recipe, *settings, env={**step, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
        for n in range(2)
    ]
    for task in tasks:
        assert task.wait() == 0, task.err
    assert read_run(recipe.parent / "out")["processes"] == 2
    assert not tasks[1].out


def test_a_process_that_another_launcher_placed_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**STEP, "SLURM_STEP_NUM_TASKS": "6", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    take_slurms_rank()
    assert os.environ["RANK"] == "1"
