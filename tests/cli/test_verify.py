"""``peftcli verify``, and that ``peftcli train`` ends with it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from classifierkit import classifier_base
from PIL import Image
from trainkit import Child

from peftcli.adapters.proof.readers import READERS
from peftcli.adapters.proof.verify import RECORD_FILE, sample_rows, verify_adapter
from peftcli.errors import AdapterError, Interrupted
from peftcli.models.open import open_base
from peftcli.schema import BaseModel, Source
from peftcli.system import signals
from peftcli.tasks import TASKS
from peftcli.train import finish, fresh_process

TRAINS = ("training.max_steps=2", "training.verify=true")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process is a fork of a process that has loaded no model, which starts sooner than an interpreter."""

    def answer_of(folder: Path) -> dict[str, Any]:
        child = Child(folder.parent, "verify", folder, "--json", "--quiet")
        child.wait()
        return json.loads(child.out)

    monkeypatch.setattr(fresh_process, "_answer_of", answer_of)


def zeroed_when_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on an adapter is saved with the first of its matrices B zeroed."""
    write = finish.write_finite

    def wrong(tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        first = next(name for name in tensors if "lora_B" in name)
        write({**tensors, first: torch.zeros_like(tensors[first])}, *rest)

    monkeypatch.setattr(finish, "write_finite", wrong)


@pytest.mark.usefixtures("forked")
def test_training_ends_with_it(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = trainkit.write_recipe(tmp_path)
    (tmp_path / "own.py").write_text("def f(found, wanted):\n    return 0\n")
    own = f"task={{type: causal_lm, metric_code: {tmp_path}/own.py:f, trust_metric_code: true, max_new_tokens: 4}}"
    ran = cli("train", recipe, *TRAINS, own)
    assert ran.code == 0
    assert "verified: the folder is the trained model" in ran.err
    out = tmp_path / "out"
    assert json.loads((out / RECORD_FILE).read_text())["verified"]
    assert "verified" not in cli("train", recipe, *TRAINS, own).err, "once is enough"
    said = cli("verify", out).out
    assert re.search(r"28 tensors are the same\nof 3 rows the outputs differ by (0|\S+e-0[78]) of", said)
    record = json.loads((out / RECORD_FILE).read_text())
    (tmp_path / "own.py").write_text("raise SystemExit")  # verifying runs no code, which was recorded once
    task = {**record["task"], "metric_code": f"{tmp_path}/own.py:f", "trust_metric_code": True}
    (out / RECORD_FILE).write_text(json.dumps({**record, "rows": None, "task": task}))
    assert "28 tensors are the same\nthe outputs differ by " in cli("verify", out).out

    zeroed_when_saved(monkeypatch)
    other = f"training.output_dir={tmp_path}/other"
    trainkit.reset_accelerate()
    for _ in range(2):  # a complete run that is not what was trained stays an error
        ran = cli("train", recipe, *TRAINS, other, "--json")
        assert ran.code == 4
        error = json.loads(ran.out)["error"]
        assert error["file"] == f"{tmp_path}/other/adapter_model.safetensors"
        assert error["message"].startswith("the saved adapter is not the trained model: differs from the trained one:")
        assert error["message"].endswith("lora_B.weight")


def test_a_bad_row_leaves_the_others_to_compare(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "good"}, {"text": None, "label": "good"}, {"text": "b", "label": "bad"}]
    data = trainkit.write_rows(tmp_path / "rows.jsonl", rows)
    row = TASKS["sequence_classification"]
    with open_base(BaseModel(name=str(classifier_base("bert")))) as base:
        task = row.open(row.settings(labels=["good", "bad"], problem_type="single_label"), base)
    kept = sample_rows(task, Source(train=str(data)), None)
    assert kept is not None
    assert kept["values"] == [rows[0], rows[2]]


def test_rows_of_a_folder_keep_where_their_files_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
        (tmp_path / name / "metadata.csv").write_text(f"file_name,label\nx.png,{name}\n")
    row = TASKS["image_classification"]
    with open_base(BaseModel(name=str(classifier_base("vit")))) as base:
        task = row.open(row.settings(labels=["a", "b"], problem_type="single_label"), base)
        kept = sample_rows(task, Source(train=str(tmp_path)), None)
    assert kept is not None
    assert kept["folders"] == [str(tmp_path / "a"), str(tmp_path / "b")]


RECORD: dict[str, Any] = {
    "schema_version": 3,
    "task": {"type": "causal_lm"},
    "config": {},
    "tensors": {},
    "files": {},
    "processor": {},
    "base_model": {"sha256": None},
    "device": "cpu",
    "dtype": "float32",
    "bf16": False,
    "rows": None,
    "probe": None,
}


def _rows(damage: dict[str, Any]) -> dict[str, Any]:
    """A record of rows that are damaged."""
    source = {"train": "a.jsonl", "format": "auto", "columns": {}}
    rows = {"source": source, "columns": ["text"], "class_names": {}, "day": None, "values": [{"text": "a"}]}
    rows |= {"folders": ["data"], **damage}
    return {"rows": rows, "inputs": {}, "scores": {"shape": [0], "sha256": ""}}


@pytest.mark.parametrize(
    ("damage", "key"),
    [
        ({"task": {"type": "causal_lm", "max_new_tokens": 0}}, "task.max_new_tokens"),
        ({"task": {"type": "song"}}, "task"),
        ({"dtype": "float8"}, "dtype"),
        ({"rows": 3}, "rows"),
        (_rows({"source": {"train": "a.jsonl", "format": "song", "columns": {}}}), "rows.source.format"),
        (_rows({"day": "31.1.2026"}), "rows.day"),
        (_rows({"values": []}), "rows.values"),
        (_rows({"folders": []}), "rows.folders"),
        (_rows({"values": [{"text": "a"}, {"text": {"bytes in base64": "a"}}], "folders": ["", ""]}), "rows.values.1"),
        (_rows({"values": [{"text": {"bytes in base64": 3}}]}), "rows.values.0"),
        ({"schema_version": 2, **_rows({"values": 3})}, "rows"),
        ({"probe": {"shape": [1], "values": [0.5], "mean": 0.5}}, "probe"),
    ],
)
def test_a_record_that_training_does_not_write_is_refused(tmp_path: Path, damage: dict[str, Any], key: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    (tmp_path / RECORD_FILE).write_text(json.dumps(RECORD | damage))
    with pytest.raises(AdapterError) as caught:
        verify_adapter(str(tmp_path))
    assert (caught.value.file, caught.value.key) == (str(tmp_path / RECORD_FILE), key)


def test_a_record_without_folders_of_rows_is_read(tmp_path: Path) -> None:
    trainkit.run_recipe(trainkit.write_recipe(tmp_path), *TRAINS)
    path = tmp_path / "out" / RECORD_FILE
    values = json.loads(path.read_text())
    del values["rows"]["folders"]
    path.write_text(json.dumps({**values, "schema_version": 2}))
    assert verify_adapter(str(path.parent))["difference"] < 1e-4


@pytest.mark.parametrize(
    ("method", "readers"),
    [
        pytest.param("method={type: lora}", ("peft", "transformers"), marks=pytest.mark.slow),
        (trainkit.PROMPT_TUNING, ("peft",)),  # its weights, in float32, come before those of the base model
    ],
)
def test_other_readers_are_compared_without_rounding(tmp_path: Path, method: str, readers: tuple[str, ...]) -> None:
    halves = ("base_model.dtype=bfloat16", "training.bf16=true")
    trainkit.run_recipe(trainkit.write_recipe(tmp_path), method, *halves, "training.max_steps=3", TRAINS[1])
    compared = verify_adapter(str(tmp_path / "out"), readers=readers)
    assert compared["allowed"] == 0.3, "it was trained in bfloat16"
    assert compared["difference"] == 0, "computed as in training"
    assert max(compared["readers"].values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_fresh_process_is_an_interpreter(cli: Callable, tmp_path: Path, processes: int) -> None:
    (tmp_path / "random.py").write_text("raise RuntimeError")  # what the folder of a recipe holds is not imported
    words = ("train", trainkit.write_recipe(tmp_path), *TRAINS, f"launch.num_processes={processes}", "--json")
    child = Child(tmp_path, *words, before=partial(os.chdir, tmp_path))
    assert child.wait() == 0, child.err
    assert "verified: the folder is the trained model" in child.err
    assert json.loads(child.out)["status"] == "complete"
    assert json.loads(cli("verify", tmp_path / "out", "--with", "peft", "--json").out)["readers"]["peft"] < 1e-5


def test_another_answer_than_that_of_verify_verifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(fresh_process, "needs_verification", lambda folder: True)
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda words, **_: started.append(words) or subprocess.CompletedProcess(words, 0, "{}", ""),
    )
    events: list[Any] = []
    fresh_process.verify_run(Path("-out"), events.append)
    assert events[-1].text.startswith("not verified: the process ended with 0: it said nothing")
    assert events[-1].text.endswith("run peftcli verify ./-out later")
    assert started[0][-2:] == ["--", "-out"], "a folder, and no option"


def test_a_signal_while_it_verifies_says_that_the_run_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_process, "needs_verification", lambda folder: True)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with (
        signals.handle_signals(),
        pytest.raises(Interrupted, match=r"\(SIGINT\)\nthe run is complete, but not verified: .* peftcli verify out$"),
    ):
        fresh_process.verify_run(Path("out"), lambda event: None)


def test_what_is_not_there_to_compare_with(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainkit.run_recipe(trainkit.write_recipe(tmp_path), "training.max_steps=1")
    ran = cli("verify", tmp_path / "out")
    assert (ran.code, "nothing says what the trained model was" in ran.err) == (2, True)
    assert (
        "is not one of peft, transformers, transformers-pipeline, sentence-transformers, diffusers"
        in cli("verify", tmp_path / "out", "--with", "pefd").err
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert "peft loads the same model" in cli("verify", tmp_path / "out", "--with", "peft").out
    assert not warned, "of PEFT and of what it calls"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for reader, (package, *_) in READERS.items():
        ran = cli("verify", tmp_path / "out", "--with", reader)
        assert (ran.code, f"{reader} needs the package {package.replace('_', '-')}" in ran.err) == (2, True)
