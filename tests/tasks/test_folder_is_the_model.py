"""The folder is the model: a fault of any kind in a saved adapter is found, and nothing else is."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
import transformers
from models_tiny import tiny
from safetensors.torch import load_file, save_file
from taskkit import CASES

from peftcli.adapters.proof import readers
from peftcli.adapters.proof.sketches import hash_of
from peftcli.adapters.proof.verify import RECORD_FILE, verify_adapter
from peftcli.errors import AdapterError, ModelError
from peftcli.system.disk import sha256
from peftcli.tasks import TASKS
from peftcli.tasks.scores import scores_on

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Plant = Callable[[Path], str | None]
"""Damages an adapter folder, and returns a part of what must be said of it; None where the task has no such thing."""


def test_of_long_texts_the_head_sees_a_few_places() -> None:
    """The logits of all would take more memory than training, whose head sees the targets."""
    model, ids, mask = tiny("llama"), torch.randint(3, 90, (2, 100)), torch.ones(2, 100, dtype=torch.long)
    mask[1, 40:] = 0
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    found = scores_on(model, {"input_ids": ids, "attention_mask": mask}, bf16=False)
    assert seen == [32]
    at = torch.linspace(0, 99, 32).long()
    with torch.no_grad():
        every = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, every[:, at][mask[:, at].bool()], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, every)


@functools.cache
def trained(name: str) -> Path:
    """The folder of a finished run, with a base model of its own."""
    folder = trainkit.scratch() / f"verified {name}"
    folder.mkdir()
    settings = ["training.verify=true", "training.max_steps=3"]
    recipe, base = CASES[name].write(folder), CASES[name].base()
    shutil.copytree(base, folder / "base")
    recipe.write_text(recipe.read_text().replace(str(base), f"{folder}/base"))
    if name == "causal_lm":
        settings.append(f"base_model={{name: {folder}/base, new_tokens: [<a>, <b>]}}")
    return trainkit.run_recipe(recipe, *settings).folder


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run's folder, over a copy of its base model."""

    def copied(name: str) -> Path:
        folder, base = tmp_path / "adapter", tmp_path / "base"
        for earlier in (folder, base):
            shutil.rmtree(earlier, ignore_errors=True)
        shutil.copytree(trained(name), folder)
        shutil.copytree(trained(name).parent / "base", base)
        _edit(folder / CONFIG, base_model_name_or_path=str(base))
        record = _read(folder / RECORD_FILE)
        record["config"]["base_model_name_or_path"] = str(base)
        (folder / RECORD_FILE).write_text(json.dumps(record))
        return folder

    return copied


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _edit(path: Path, *without: str, **values: Any) -> None:
    kept = {name: value for name, value in _read(path).items() if name not in without}
    path.write_text(json.dumps({**kept, **values}))


def tensors(change: Callable[[dict[str, torch.Tensor]], str | None]) -> Plant:
    """A fault of the tensors: ``change`` damages them in place, and names one."""

    def plant(folder: Path) -> str | None:
        found = load_file(folder / WEIGHTS)
        named = change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})
        return named

    return plant


def config(*without: str, **values: Any) -> Plant:
    """A fault of adapter_config.json."""

    def plant(folder: Path) -> str:
        _edit(folder / CONFIG, *without, **values)
        return [*without, *values][0]

    return plant


def _head(found: Mapping[str, torch.Tensor]) -> str | None:
    return next((name for name in found if "lora_" not in name and "running" not in name and "num_b" not in name), None)


def _dropped(found: dict[str, torch.Tensor]) -> str | None:
    if (name := _head(found)) is not None:
        del found[name]
    return name


def _renamed(found: dict[str, torch.Tensor]) -> str | None:
    if (name := _head(found)) is not None:
        found[name.replace("base_model.model.", "base_model.model.head_")] = found.pop(name)
    return name


def _moved_statistic(found: dict[str, torch.Tensor]) -> str | None:
    name = next((name for name in found if name.endswith("running_mean")), None)
    if name is not None:
        found[name] += 0.1
    return name


def _without_new_rows(found: dict[str, torch.Tensor]) -> str | None:
    name = next((name for name in found if "token_adapter" in name or "trainable_tokens" in name), None)
    if name is not None:
        del found[name]
    return name


def _of_another_class(found: dict[str, torch.Tensor]) -> str:
    for name in list(found):
        found[name.replace("base_model.model.", "base_model.model.model.", 1)] = found.pop(name)
    return "missing"


def _b(found: Mapping[str, torch.Tensor]) -> list[str]:
    """The matrices B whose effect is largest: in a random model, attention is the same whatever its keys are."""
    every = [name for name in found if "lora_B" in name]
    return [name for name in every if re.search(r"\bv(alue|_proj)?\.", name)] or every


def _zeroed(found: dict[str, torch.Tensor]) -> str:
    found[_b(found)[0]].zero_()
    return _b(found)[0]


def _of_another_layer(found: dict[str, torch.Tensor]) -> str:
    one, other = next(
        (one, other)
        for one in _b(found)
        for other in found
        if one != other and found[one].shape == found[other].shape and not torch.equal(found[one], found[other])
    )
    found[one] = found[other].clone()
    return one


def _rounded(found: dict[str, torch.Tensor]) -> str:
    found[_b(found)[0]] = found[_b(found)[0]].bfloat16().float()
    return _b(found)[0]


def _in_half(found: dict[str, torch.Tensor]) -> str:
    found |= {name: value.bfloat16() if value.is_floating_point() else value for name, value in found.items()}
    return "differs from the trained one"


def _sign_flipped(found: dict[str, torch.Tensor]) -> str:
    found[_b(found)[-1]].neg_()
    return _b(found)[-1]


def _labels_permuted(folder: Path) -> str | None:
    path = folder / "task.json"
    labels = _read(path).get("settings", {}).get("labels") if path.is_file() else None
    if not labels:
        return None
    _edit(path, settings={**_read(path)["settings"], "labels": labels[::-1]})
    return "labels"


def _task_lost(folder: Path) -> str | None:
    path = folder / "task.json"
    if not path.is_file():
        return None
    path.unlink()
    return "task.json"


def _place(folder: Path, name: str) -> Path | None:
    """A file of the processor: the adapter's own, else the base model's."""
    return next((path for path in (folder / name, folder.parent / "base" / name) if path.is_file()), None)


def _preprocessor(folder: Path) -> str | None:
    if (path := folder.parent / "base/scheduler/scheduler_config.json").is_file():
        _edit(path, **{"shift": 1.0} if "shift" in _read(path) else {"beta_end": 0.02})
        return "is not the base model of training"
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := _place(folder, name)) is None:
            continue
        values = _read(path)
        inner = values.get("feature_extractor", values.get("image_processor", values))
        if "image_mean" in inner:
            inner["image_mean"] = [0.1, 0.2, 0.3]
        elif "hop_length" in inner:
            inner["hop_length"] //= 2
        elif "do_normalize" in inner:
            inner["do_normalize"] = not inner["do_normalize"]
        path.write_text(json.dumps(values))
        return "other inputs"
    return None


def _of_tokenizer(key: str, value: str) -> Plant:
    def plant(folder: Path) -> str | None:
        path = _place(folder, "tokenizer_config.json")
        if path is None:
            return None
        values = _read(path)
        if "CTC" in str(values.get("tokenizer_class")):
            return None  # whose texts are not padded
        before = values.get(key, "right")
        _edit(path, **{key: value if before != value else "left"})
        return key

    return plant


def _pad_token(folder: Path) -> str | None:
    path, words = _place(folder, "tokenizer_config.json"), _place(folder, "tokenizer.json")
    if path is None or words is None:
        return None
    before = _read(path).get("pad_token")
    _edit(path, pad_token=next(word for word in _read(words)["model"]["vocab"] if word != before and word.isalpha()))
    return "pad_token"


def _other_words(folder: Path) -> str | None:
    """Each word gets the number of the next one."""
    path = _place(folder, "tokenizer.json") or _place(folder, "tokenizer/tokenizer.json")
    if path is None:
        return None
    values = _read(path)
    vocab = values["model"]["vocab"]
    numbers = list(vocab.values())
    values["model"]["vocab"] = dict(zip(vocab, numbers[1:] + numbers[:1], strict=True))
    path.write_text(json.dumps(values))
    return ""


def _base_weights(folder: Path) -> str:
    ends = ("v_proj.weight", "value.weight", ".v.weight", "convolution.weight", "to_v.weight")
    for path in sorted((folder.parent / "base").rglob("*model.safetensors")):
        found = load_file(path)
        for name in [name for name in found if name.endswith(ends) and found[name].ndim > 1][:1]:
            noise = torch.randn(found[name].shape, generator=torch.Generator().manual_seed(1))
            found[name] = found[name] + 0.05 * noise
            save_file(found, path, {"format": "pt"})
    return "trained model"


def _added(found: dict[str, torch.Tensor]) -> str:
    found["base_model.model.another.lora_A.weight"] = torch.zeros(4, 8)
    return "not of the trained model"


def _cut(folder: Path) -> str:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    return WEIGHTS


FAULTS: dict[str, Plant] = {
    "a tensor of the head dropped": tensors(_dropped),
    "a tensor of the head renamed": tensors(_renamed),
    "a norm's statistic moved": tensors(_moved_statistic),
    "the rows of new tokens lost": tensors(_without_new_rows),
    "names of another class": tensors(_of_another_class),
    "a tensor zeroed": tensors(_zeroed),
    "a tensor of another layer": tensors(_of_another_layer),
    "a tensor rounded to bfloat16": tensors(_rounded),
    "all tensors in bfloat16": tensors(_in_half),
    "a sign flipped": tensors(_sign_flipped),
    "a tensor more": tensors(_added),
    "the file cut": _cut,
    "alpha lost": config("lora_alpha"),
    "alpha changed": config(lora_alpha=16),
    "r changed": config(r=2),
    "rslora": config(use_rslora=True),
    "fewer targets": config(target_modules=["nothing"]),
    "another task type": config(task_type="SEQ_2_SEQ_LM_OR_SO"),
    "another method": config(peft_type="LOHA"),
    "another dropout": config(lora_dropout=0.5),
    "another revision": config(revision="0" * 40),
    "labels permuted": _labels_permuted,
    "task.json lost": _task_lost,
    "the preprocessor changed": _preprocessor,
    "another pad token": _pad_token,
    "another padding side": _of_tokenizer("padding_side", "left"),
    "another vocabulary": _other_words,
    "other base weights": _base_weights,
}
ON_ALL = ("a tensor zeroed", "alpha changed", "a tensor of another layer", "rslora", "a norm's statistic moved")
"""Faults that change what the model says, whatever is recorded of files."""


def _as_if_trained(folder: Path) -> None:
    """Make the record agree with the folder's files, so that only what the model says is left to find the fault by."""
    path = folder / RECORD_FILE
    record = _read(path)
    record["config"] = _read(folder / CONFIG)
    record["tensors"] = {name: hash_of(value) for name, value in load_file(folder / WEIGHTS).items()}
    path.write_text(json.dumps(record))


def _hashes_again(folder: Path) -> None:
    """Record the hashes of the task's files again, as of a file that was wrong when it was written."""
    path = folder / RECORD_FILE
    record = _read(path)
    record["files"] = {name: sha256(folder / name) for name in record["files"] if (folder / name).is_file()} | {
        name: digest for name, digest in record["files"].items() if not (folder / name).is_file()
    }
    path.write_text(json.dumps(record))


WITHOUT_PIPELINE = (
    *("AutoModelForSeq2SeqLM", "AutoModelForQuestionAnswering", "AutoModel"),
    "AutoModelForMultipleChoice",
    "AutoModelForImageTextToText",  # its pipeline asks a chat, and is not compared
    "reranker",  # the pipeline of its class says which class, not a score
    "AutoModelForObjectDetection",  # whose pipeline gives the corners of boxes in whole pixels
)
"""Tasks, or their classes, of which transformers 5 has no pipeline that ``verify`` compares with."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.grid
def test_a_clean_folder_is_the_model(copied: Callable, name: str) -> None:
    auto_class = TASKS[CASES[name].task["type"]].auto_class
    named = ["peft", "transformers", *["transformers-pipeline"] * ({auto_class, name}.isdisjoint(WITHOUT_PIPELINE))]
    if name == "causal_lm":
        named = ["peft"]  # transformers gives a base model no rows for new tokens
    elif not hasattr(transformers, auto_class):
        named = ["peft", "diffusers"]
    found = verify_adapter(str(copied(name)), readers=named)
    assert [*found["readers"]] == named
    assert max(found["readers"].values(), default=0.0) < 1e-4
    assert found["rows"] >= 3
    assert found["tensors"] > 0
    assert found["difference"] <= found["allowed"] / 10


def _lose_a_tensor(model: torch.nn.Module) -> None:
    next(value for name, value in model.named_parameters() if "value.lora_B" in name).data.add_(1)


def _lose_alpha(model: torch.nn.Module) -> None:
    next(module for name, module in model.named_modules() if name.endswith("value")).scaling["default"] = 100.0


@pytest.mark.parametrize("reader", ["peft", "transformers", "transformers-pipeline"])
@pytest.mark.parametrize(
    ("lose", "named"),
    [
        (_lose_a_tensor, f"{WEIGHTS}: .*self.value: it lacks base_model.model.bert.*value.lora_B.weight"),
        (_lose_alpha, f"{CONFIG}: .* first those of bert.*self.value$"),
    ],
)
@pytest.mark.slow
def test_what_a_reader_loses_is_named(
    copied: Callable, monkeypatch: pytest.MonkeyPatch, reader: str, lose: Callable, named: str
) -> None:
    load = readers._load_with

    def damaged(*arguments: Any) -> Any:
        model = load(*arguments)
        lose(model)
        return model

    monkeypatch.setattr(readers, "_load_with", damaged)
    with pytest.raises(AdapterError, match=named):
        verify_adapter(str(copied("sequence_classification")), readers=[reader])


@pytest.mark.parametrize(
    ("reader", "name"), [("peft", f"unet/{WEIGHTS}"), ("diffusers", "pytorch_lora_weights.safetensors")]
)
@pytest.mark.slow
def test_a_fault_of_a_file_for_other_readers_is_named(copied: Callable, reader: str, name: str) -> None:
    folder = copied("text_to_image")
    found = load_file(folder / name)
    lost = next(name for name in found if "to_v.lora_B" in name)
    save_file(found | {lost: torch.zeros_like(found[lost])}, folder / name, {"format": "pt"})
    _hashes_again(folder)
    with pytest.raises(AdapterError, match=f"{name}: .*loaded by {reader}, .* {lost} is not that of {WEIGHTS}"):
        verify_adapter(str(folder), readers=[reader])


@pytest.mark.slow
def test_what_a_reader_cannot_load_is_one_error(copied: Callable) -> None:
    with pytest.raises(AdapterError, match=r"transformers cannot use it: .* out of bounds"):
        verify_adapter(str(copied("causal_lm")), readers=["transformers"])


@pytest.mark.slow
def test_every_fault_is_planted_and_every_task_has_twenty(copied: Callable) -> None:
    planted = {name: {fault for fault in FAULTS if FAULTS[fault](copied(name)) is not None} for name in CASES}
    assert set().union(*planted.values()) == FAULTS.keys()
    assert all(len(faults) >= 20 for faults in planted.values()), {name: len(each) for name, each in planted.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_a_fault_is_found_and_named(copied: Callable, name: str, fault: str) -> None:
    folder = copied(name)
    named = FAULTS[fault](folder)
    if named is None:
        pytest.skip("the task has no such thing")
    _hashes_again(folder)
    with pytest.raises((AdapterError, ModelError)) as found:
        verify_adapter(str(folder))
    assert named in str(found.value), str(found.value)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fault", ON_ALL)
@pytest.mark.grid
def test_what_the_model_says_shows_a_fault(copied: Callable, name: str, fault: str) -> None:
    folder = copied(name)
    if FAULTS[fault](folder) is None:
        pytest.skip("the task has no such thing")
    _as_if_trained(folder)
    with pytest.raises(AdapterError, match=r"the outputs differ by .* from those of the trained model"):
        verify_adapter(str(folder))
