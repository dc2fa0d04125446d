"""Base models that must not hurt: no code of theirs runs, no pickle is read, no weight is noise."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from opened import load_config, load_model, load_tokenizer
from safetensors.torch import load_file, save_file

from peftcli.errors import AdapterError, HubError, ModelError, NetworkError, OutOfMemory, PeftcliError
from peftcli.guard.adapter_folder import read_run
from peftcli.models import hub_files
from peftcli.models.guarded import quiet, translated_errors
from peftcli.models.open import open_base
from peftcli.models.quantization import trained_quantization
from peftcli.models.validate import check_config, check_folder, listed_shards
from peftcli.schema import BaseModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(trainkit.base_folder(), tmp_path / "base"))


def load(folder: Path, **more: Any) -> Any:
    return load_model(BaseModel(name=str(folder), **more), "AutoModelForCausalLM", torch.float32)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("keep", [False, True])
def test_a_pickle_is_never_read(keep: bool, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder / "mark")))
    if keep:
        assert load(folder).num_parameters() > 0
    else:
        (folder / SINGLE).unlink()
        with pytest.raises(ModelError, match=r"pytorch_model\.bin can run code when it is read") as caught:
            load(folder)
        assert "save_pretrained" in (caught.value.hint or "")
    assert not (folder / "mark").exists()


ATTENTION: dict[str, dict[str, Any]] = {
    "_attn_implementation": {"_attn_implementation": "org/kernel"},
    "attn_implementation": {"attn_implementation": {"": "eager", "text": "org/kernel:run"}},
    "text_config._attn_implementation_internal": {"text_config": {"_attn_implementation_internal": "org/kernel@v1"}},
    "parts.attn_implementation": {"parts": [{"attn_implementation": "magic"}]},
}


@pytest.mark.parametrize("key", ATTENTION)
def test_attention_from_the_hub_is_refused(key: str, folder: Path) -> None:
    change(folder / "config.json", **ATTENTION[key])
    with pytest.raises(ModelError, match="is not known, and code is not fetched") as caught:
        load(folder)
    assert (caught.value.file, caught.value.key) == (str(folder / "config.json"), key)


@pytest.mark.parametrize("value", ["eager", "sdpa", None, {"": "eager"}, "paged|eager"])
def test_known_attention_is_not_refused(value: object, folder: Path) -> None:
    change(folder / "config.json", _attn_implementation=value)
    check_config(check_folder(folder), trusted=False)


def test_code_beside_a_model_is_not_run_and_refused_where_it_is_needed(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text(f"from pathlib import Path\nPath({str(folder / 'mark')!r}).touch()\n")
    code = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}
    change(folder / "config.json", auto_map=code)
    assert type(load(folder)).__name__ == "LlamaForCausalLM"
    change(folder / "config.json", model_type="evil")
    with pytest.raises(ModelError, match="needs Python code that comes with the model") as caught:
        load(folder)
    assert caught.value.key == "auto_map"
    assert not (folder / "mark").exists()


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a config": ("config.json", {"auto_map": {"AutoConfig": "evil/other--modeling.Config"}}),
    "a part of a config": ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil/other--modeling.Model"}}}),
    "a config of a version": ("config.4.0.json", {"auto_map": {"AutoConfig": "evil/other--modeling.Config"}}),
    "a tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil/other--tok.Tok"]}}),
    "a tokenizer as of old": ("tokenizer_config.json", {"auto_map": ["evil/other--tok.Tok", None]}),
    "a processor": ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "e/o--i.I"}}}),
    "images": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": {"pil": "evil/other--i.I"}}}),
    "videos": ("video_preprocessor_config.json", {"auto_map": {"AutoVideoProcessor": "evil/other--v.V"}}),
    "answers": ("generation_config.json", {"auto_map": {"AutoModel": "evil/other--g.G"}}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_trusted_code_is_of_one_repository(name: str, folder: Path) -> None:
    file, values = OTHERS[name]
    shutil.copy(folder / "config.json", folder / "config.4.0.json")
    change(folder / "config.json", configuration_files=["config.4.0.json"])
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(before | values))
    with pytest.raises(ModelError, match="is code from another repository, which the revision does not pin") as caught:
        load_tokenizer(BaseModel(name=str(folder), trust_remote_code=True, revision="0" * 40))
    assert (caught.value.file, str(caught.value.key)[-8:]) == (str(folder / file), "auto_map")
    assert load(folder).num_parameters() > 0, "what is not run need not be pinned"


def test_code_of_the_trusted_repository_is_run(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "mine.Mine"]}, tokenizer_class="Mine")
    base = BaseModel(name=str(folder), trust_remote_code=True, revision="0" * 40)
    assert type(load_tokenizer(base)).__name__ == "Mine"


def test_a_config_of_a_version_is_looked_at_too(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "config.4.0.json")
    change(folder / "config.4.0.json", _attn_implementation="org/kernel")
    assert load(folder).num_parameters() > 0
    change(folder / "config.json", configuration_files=["config.4.0.json"])
    with pytest.raises(ModelError, match="'org/kernel' is not known") as caught:
        load(folder)
    assert caught.value.file == str(folder / "config.4.0.json")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", "", "pytorch_model.bin", "a/b.safetensors", 3]
)
def test_an_index_lists_files_beside_it_only(name: object, folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "b.safetensors", "c": name}}))
    with pytest.raises(ModelError, match="is not a safetensors file in the same folder"):
        listed_shards(folder / INDEX)


def test_files_of_several_are_missed(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trainkit.base_folder(shard="20KB"), tmp_path / "base"))
    files = list(open_base(BaseModel(name=str(folder))).shards)
    assert len(files) > 1
    files[1].unlink()
    with pytest.raises(ModelError, match=files[1].name):
        _ = open_base(BaseModel(name=str(folder))).shards
    os.mkfifo(files[1])
    with pytest.raises(ModelError, match=f"{files[1].name}: is a pipe"):
        load(folder)


SPOILT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
    "head": (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(7)}),
        r"model.norm.weight is \(7,\), not \(32,\)",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_no_weight_is_noise(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, message = SPOILT[name]
    tensors = load_file(folder / SINGLE)
    spoil(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load(folder)
    assert "LOAD REPORT" not in capfd.readouterr().err


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda base: (base / SINGLE).unlink(), r"contains neither model\.safetensors nor"),
    "far larger than its weights": (
        lambda base: change(base / "config.json", vocab_size=10**10),
        "describes a model of .* numbers, but its weights have",
    ),
    **{
        f"{value} {key}": (
            lambda base, key=key, value=value: change(base / "config.json", **{key: value}),
            f"{key}: .*is not a plausible value",
        )
        for key, value in {"num_hidden_layers": 10**9, "decoder_layers": -1, "num_labels": 10**9}.items()
    },
    "a damaged generation config": (
        lambda base: (base / "generation_config.json").write_text("{"),
        r"generation_config\.json:1: not valid JSON",
    ),
    "an adapter": (lambda base: (base / "adapter_config.json").write_text("{}"), "contains an adapter"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_a_whole_model_is_refused_before_it_takes_memory(name: str, folder: Path) -> None:
    spoil, message = WRONG[name]
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_an_adapters_tokenizer_is_checked_like_the_base_models(folder: Path) -> None:
    change(folder / "config.json", num_labels=10**9)
    with pytest.raises(ModelError, match="is not a plausible value"):
        load_tokenizer(BaseModel(name=str(trainkit.base_folder())), adapter=folder)


def test_trusted_code_is_that_of_a_pinned_commit() -> None:
    with pytest.raises(ModelError, match=r"base_model\.revision: .*at a pinned commit only"):
        load_config(BaseModel(name="org/model", trust_remote_code=True, revision="main"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "source.spm"])
def test_a_pipe_is_not_waited_for(name: str, folder: Path) -> None:
    os.mkfifo(folder / ".lock")  # which nobody reads, as a link to nothing
    (folder / "notes.txt").symlink_to("nowhere")
    check_folder(folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name}: is a pipe"):
        check_folder(folder)


class PanicException(BaseException):
    """As libraries in Rust raise."""


RAISED: dict[str, tuple[BaseException, type[BaseException], str]] = {
    "a panic": (PanicException("called `Option::unwrap()`"), ModelError, "cannot load x: called"),
    "many lines": (ValueError("a\n\n b\x1b[2J"), ModelError, r"cannot load x: a b\\x1b\[2J"),
    "no words": (KeyError(), ModelError, "cannot load x: KeyError"),
    "no memory": (MemoryError(), OutOfMemory, "does not hold x"),
    "Ctrl-C": (KeyboardInterrupt("2"), KeyboardInterrupt, "2"),
    "an exit": (SystemExit(3), SystemExit, "3"),
    "a folder's name": (ValueError("/data/offline-models/e couldn't connect"), ModelError, "cannot load x: /data/off"),
    "code": (
        ValueError("The repository x contains custom code which must be executed. Please pass the argument"),
        ModelError,
        "cannot load x: it needs Python code that comes with the model\nonly a recipe can allow",
    ),
    "a missing package": (
        ImportError("PixtralProcessor requires the Torchvision library but it was not found in your environment."),
        ModelError,
        "cannot load x: it needs the package torchvision\npip install torchvision",
    ),
    "one of several": (
        ValueError("None of these classes could be imported. Missing optional dependencies: torchvision. Please"),
        ModelError,
        "pip install torchvision",
    ),
    "a package for numbers": (
        ImportError("Package `num2words` is required to run SmolVLM processor."),
        ModelError,
        "pip install num2words",
    ),
    "no network": (ConnectionError("refused"), NetworkError, "cannot load x: the hub cannot be reached"),
}


@pytest.mark.parametrize("name", RAISED)
def test_what_transformers_raises_is_one_line(name: str) -> None:
    raised, expected, message = RAISED[name]

    with pytest.raises(expected, match=message) as caught, translated_errors("x"):
        raise raised
    assert "\n" not in getattr(caught.value, "message", "")


def test_what_transformers_logs_is_short_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, shown = logging.getLogger("transformers"), io.StringIO()
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(shown)])
    with quiet():
        logger.error("\x1b[1mReport\x1b[0m\n" + "tensor \x1b]0;owned\x07\n" * 100)
        assert not shown.getvalue()
    lines = shown.getvalue().splitlines()
    assert lines[:2] == ["Report", r"tensor \x1b]0;owned\x07"]
    assert lines[-1] == "and 85 lines more"


@pytest.mark.parametrize("said", ["{", "[]", '{"recipe": {"base_model": {"quantization": {"type": "nf5"}}}}'])
def test_a_damaged_run_is_said(said: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(said)
    with pytest.raises(AdapterError, match=r"run\.json"):
        trained_quantization(read_run(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "failed", "kind"),
    [
        ("./models/tinny", None, ModelError),
        ("models/tinny", HubError("no such repository"), ModelError),
        ("models/tinny", NetworkError("no answer", hint="try again"), NetworkError),  # which may be the reason
    ],
)
def test_a_misspelt_folder_suggests_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, failed: PeftcliError | None, kind: type[PeftcliError]
) -> None:
    (tmp_path / "models/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def fetch(spec: BaseModel) -> Path:
        assert failed is not None
        raise failed

    monkeypatch.setattr(hub_files, "fetch", fetch)
    with pytest.raises(kind) as caught:
        open_base(BaseModel(name=name))
    assert (caught.value.hint or "").splitlines()[0] == "did you mean 'models/tiny'?"
