"""Two hosts that train together, and lose a process, a host or their time at any step (Linux, as root)."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
from functools import partial
from pathlib import Path

import trainkit
from campaigns import Campaign, Trial
from hosts import can_make_hosts, made_pair, processes_of

_SETTINGS = (
    *("training.max_steps=40", "training.save_strategy=steps", "training.save_steps=5"),
    *("training.eval_strategy=no", "method.lora_dropout=0.2"),
)
_LOSSES = (
    "a process of host 0 is killed",
    "a process of host 1 is killed",
    "host 1 is lost",
    "host 0 is lost",
    "SIGTERM to host 0",
    "SIGTERM to host 1",
)
SEEDS = 3
"""Trials at random steps, of each loss and each strategy."""
_PROCESSES = {"hybrid": 2}
"""Strategy -> processes on each host, if more than one."""
_STARTED_AGAIN = 3
"""How often a trial starts both hosts."""


@functools.cache
def _undisturbed(strategy: str) -> bytes:
    folder = trainkit.scratch() / f"hosts-{strategy}"
    folder.mkdir()
    with made_pair(trainkit.write_recipe(folder)) as pair:
        codes, said = _ended(pair.both(*_settings(strategy)))
        assert codes == [0, 0], said
        return pair.adapter()


def _settings(strategy: str) -> tuple[str, ...]:
    count = _PROCESSES.get(strategy, 1)
    size = f"training.per_device_train_batch_size={2 // count}"  # the same global batch
    return (*_SETTINGS, f"launch.strategy={strategy}", f"launch.num_processes={count}", size)


def _ended(running: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    said = [each.communicate(timeout=240)[1] for each in running]
    return [each.returncode for each in running], "\n".join(said)


def _loses(loss: str, strategy: str, seed: int, folder: Path) -> None:
    """Something is lost at a step; both hosts, started again where they ended, end as if it had not been."""
    wanted, settings = _undisturbed(strategy), _settings(strategy)
    step = random.Random(f"{loss} {strategy} {seed}").randint(1, 25)
    with made_pair(trainkit.write_recipe(folder)) as pair:
        running = pair.both(*settings)
        pair.wait_for_step(step)
        number = int("host 1" in loss)
        if "process" in loss:
            os.kill(processes_of(running[number])[0], signal.SIGKILL)
        elif "lost" in loss:
            running[number].kill()
            running[number].communicate()
            if number == 1:  # host 0 waits for it
                running[1] = pair.start(1, *settings)
        else:
            running[number].send_signal(signal.SIGTERM)
        codes, said = _ended([each for each in running if each.returncode is None])
        expected = {"process": {0}, "SIGTERM": {75}, "host 1 is lost": {0}, "host 0 is lost": {10}}
        allowed = next(each for word, each in expected.items() if word in loss)
        assert set(codes) <= allowed, f"exit codes {codes}: {said}"
        for _ in range(_STARTED_AGAIN):
            if not any(codes):
                break
            codes, said = _ended(pair.both(*settings))
        assert codes == [0, 0], f"exit codes {codes}: {said}"
        assert pair.adapter() == wanted, "another adapter"
        asked = [["ip", "netns", "pids", host.name] for host in pair.hosts]
        left = [subprocess.run(each, capture_output=True, text=True, check=True).stdout for each in asked]
        assert not any(left), f"orphans: {left}"


def _campaign(name: str, strategies: tuple[str, ...], losses: tuple[str, ...], seeds: int) -> Campaign:
    return Campaign(
        name,
        "The others wait for what was lost, or end with 75 or 10; all end byte-identical to hosts that lost nothing.",
        lambda: [
            Trial(f"{loss}, {strategy}, seed {seed}", partial(_loses, loss, strategy, seed))
            for seed in range(seeds)
            for loss in losses
            for strategy in strategies
        ],
        least=len(strategies) * len(losses) * seeds,
        sample=0,
    )


_CAMPAIGNS = [
    _campaign("two hosts of which one is lost", ("replicate", "fsdp"), _LOSSES, SEEDS),
    _campaign("two hosts of two processes, the base model divided on each", ("hybrid",), _LOSSES[2:4], 10),
]
CAMPAIGNS = _CAMPAIGNS if can_make_hosts() else []
