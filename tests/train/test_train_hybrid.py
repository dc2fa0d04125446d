"""A base model that is divided within groups of processes trains as one that all of them divide, or none."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from safetensors.torch import load_file
from test_train_processes import group, losses
from test_train_sharded import EFFICIENTLY, STEPS, assert_same_end, interrupt
from trainkit import read_run

from peftcli.errors import UsageError
from peftcli.recipe import load_recipe
from peftcli.schema import Launch
from peftcli.train.devices import sharding
from peftcli.train.examine import examine

COUNT, GROUPS = 4, ([0, 1], [2, 3])
HYBRID = ("launch.strategy=hybrid", "launch.shard_size=2")
SHORT = ("training.verify=false", "training.max_steps=2", "training.eval_strategy=no")
SAVED = ("training.verify=false", "training.save_strategy=steps", "training.save_steps=2")
ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Counted:
    """Counts what a process sends and holds; before a child's work."""

    file: Path

    def __call__(self) -> None:
        from torch.distributed import ProcessGroup, get_process_group_ranks
        from torch.utils._pytree import tree_leaves

        from peftcli.train import setup

        def note(*values: object) -> None:
            with self.file.open("a") as log:
                log.write(json.dumps(values) + "\n")

        def watch(name: str) -> None:
            plain = getattr(ProcessGroup, name)

            def watched(self: ProcessGroup, *given: object, **more: object) -> object:
                tensors = [each for each in tree_leaves((given, more)) if isinstance(each, torch.Tensor)]
                size = max((each.nbytes for each in tensors), default=0)
                note(name, str(tensors[0].dtype) if tensors else "", size, get_process_group_ranks(self))
                return plain(self, *given, **more)

            setattr(ProcessGroup, name, watched)

        for name in dir(ProcessGroup):
            if re.search("gather|reduce|broadcast|scatter|all_?to_?all|send|recv", name):
                watch(name)
        shard = setup.shard

        def watched(model: torch.nn.Module, *given: Any, **more: Any) -> None:
            shard(model, *given, **more)
            parts = [getattr(each, "_local_tensor", each) for each in model.parameters()]
            note("held", "", sum(each.nbytes for each in parts), [])

        setup.shard = watched


def run(recipe: Path, name: str, *settings: str, count: int = COUNT) -> tuple[Path, list[Counter[tuple[object, ...]]]]:
    """The folder of a run of so many processes, and what each has sent and held, how often."""
    folder, files = recipe.parent / name, [recipe.parent / f"{name}-{number}" for number in range(count)]
    size = f"training.per_device_train_batch_size={COUNT // count}"
    given = (*STEPS, size, *settings, f"training.output_dir={folder}")
    children = group(recipe.parent, "train", recipe, *given, count=count, before=dict(enumerate(map(Counted, files))))
    assert [child.wait() for child in children] == [0] * count, children[0].err
    lines = (map(json.loads, file.read_text().splitlines()) for file in files)
    return folder, [Counter((*each[:3], *each[3]) for each in found) for found in lines]


def numbers(sent: Counter[tuple[object, ...]], *ranks: int) -> Counter[tuple[object, ...]]:
    """The messages among these processes that hold floating-point numbers: their call and size."""
    return Counter({each[:3]: times for each, times in sent.items() if each[3:] == ranks and "float" in str(each[1])})


def test_only_gradients_of_the_adapter_leave_a_group(recipe: Path) -> None:
    one = trainkit.run_recipe(recipe, *STEPS, *SHORT, f"training.per_device_train_batch_size={COUNT}")
    folder, sent = run(recipe, "hybrid", *SHORT, *HYBRID)
    assert_same_end(folder, one.folder)
    tensors = load_file(folder / ADAPTER).values()
    gradients = sum(4 * each.numel() for each in tensors) + 4 * len(tensors)  # and of each whether there is one
    for each in sent:
        between = numbers(each, *range(COUNT))
        adapter = sorted(
            size for (name, _, size), times in between.items() if name == "broadcast" for _ in range(times)
        )
        assert adapter == sorted(4 * value.numel() for value in tensors), "once, as it begins"
        sums = {size: times for (name, _, size), times in between.items() if name != "broadcast"}
        assert sums == {gradients: 2, 4: sums[4]}, "numbers of 4 bytes are losses"
    for number, each in enumerate(sent):
        assert numbers(each, *GROUPS[number // 2]), "layers are gathered within a group"


@pytest.mark.slow
def test_each_process_holds_what_it_would_of_a_base_that_its_group_divides(recipe: Path) -> None:
    hybrid, sent = run(recipe, "hybrid", *SHORT, *HYBRID)
    pair, by_two = run(recipe, "pair", *SHORT, "launch.strategy=fsdp", count=2)
    four, by_four = run(recipe, "four", *SHORT, "launch.strategy=fsdp")
    whole, _ = run(recipe, "whole", *SHORT)
    held = [{each[2] for each in found if each[0] == "held"} for found in (*sent, *by_two)]
    assert all(each == held[0] for each in held)
    assert min(held[0]) > max(each[2] for each in by_four[0] if each[0] == "held")
    for other in (pair, four, whole):
        assert losses(hybrid) == pytest.approx(losses(other), rel=1e-5)
        assert_same_end(hybrid, other)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["launch.reshard_after_forward=false", "launch.cpu_offload=true", EFFICIENTLY])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_how_parts_are_kept_and_read_changes_nothing(more: str, dtype: str, recipe: Path) -> None:
    settings = (*SHORT, *HYBRID, f"base_model.dtype={dtype}")
    one, other = (run(recipe, name, *settings, *also)[0] for name, also in (("plain", ()), ("more", (more,))))
    assert (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()


@pytest.mark.slow
def test_the_first_of_each_group_reads_the_model(recipe: Path) -> None:
    """And sends it within the group."""
    _, plain = run(recipe, "plain", *SHORT, *HYBRID)
    _, sent = run(recipe, "sent", *SHORT, *HYBRID, EFFICIENTLY)
    for number, (before, now) in enumerate(zip(plain, sent, strict=True)):
        assert numbers(before, *range(COUNT)) == numbers(now, *range(COUNT)), "no more between groups"
        more = numbers(now, *GROUPS[number // 2]) - numbers(before, *GROUPS[number // 2])
        assert {name for name, *_ in more} == {"broadcast"}


@pytest.mark.slow
def test_weights_of_four_bits_are_divided_within_groups(recipe: Path) -> None:
    pytest.importorskip("bitsandbytes")
    nf4 = (*SHORT, "base_model.quantization={type: nf4}")
    assert_same_end(run(recipe, "hybrid", *nf4, *HYBRID)[0], run(recipe, "whole", *nf4)[0])


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bytes(recipe: Path) -> None:
    settings = (*SAVED, *HYBRID, "method.lora_dropout=0.2")
    folder, _ = run(recipe, "out", *settings)
    wanted = (folder / ADAPTER).read_bytes()
    interrupt(folder)
    assert (run(recipe, "out", *settings)[0] / ADAPTER).read_bytes() == wanted
    assert read_run(folder)["attempts"][-1]["from_step"] == 2
    interrupt(folder)  # and with other groups
    assert (run(recipe, "out", *settings[:-2], "launch.shard_size=4", settings[-1])[0] / ADAPTER).read_bytes() == wanted


@pytest.mark.slow
def test_a_run_goes_on_in_groups_of_more_processes(recipe: Path) -> None:
    folder, _ = run(recipe, "out", *SAVED, count=1)
    whole = load_file(folder / ADAPTER)
    interrupt(folder)
    keys = ("processes", "launch.strategy", "training.per_device_train_batch_size")
    allowed = [word for key in keys for word in ("--allow-change", key)]
    run(recipe, "out", *SAVED, *HYBRID, *allowed)
    torch.testing.assert_close(load_file(folder / ADAPTER), whole, atol=1e-5, rtol=1e-5)
    found = read_run(folder)
    assert (found["attempts"][-1]["from_step"], found["processes"], found["exact"]) == (2, 4, False)


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        ([(4, 3, 0)], "must divide the 4 processes of a machine, and is 3"),
        ([(4, 4, 0), (2, 2, 0)], "is 2 on one machine and 4 on another"),
        ([(4, 2, 0), (4, 2, 1)], "processes of different machines into one group"),
        ([(4, 2, 0), (2, 2, 0)], None),
    ],
)
def test_groups_that_do_not_fit_the_machines_are_refused(
    processes: list[tuple[int, int, int]], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(sharding.torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(sharding, "gather_object", lambda own: processes)
    if said is None:
        sharding.refuse_groups(Launch(strategy="hybrid"), 4)
    else:
        with pytest.raises(UsageError, match=said):
            sharding.refuse_groups(Launch(strategy="hybrid"), 4)


def test_a_deep_check_refuses_them_too(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.train.examine.total_processes", lambda launch: 4)
    found = examine(load_recipe(recipe, ["launch={strategy: hybrid, shard_size: 3}"]))
    assert [each.key for each in found.errors] == ["launch.shard_size"]


def test_one_process_divides_nothing_and_says_so(recipe: Path) -> None:
    found = trainkit.run_recipe(recipe, "launch.strategy=hybrid", "training.max_steps=1")
    assert any("hybrid divides nothing" in str(each) for each in found.events)
