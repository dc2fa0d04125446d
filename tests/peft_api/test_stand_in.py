"""``install()``: peftcli stands in for the name peft, and what transformers does with it then."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models_tiny import tiny
from transformers import LlamaForCausalLM

import peftcli
import peftcli.peft_api
from peftcli.errors import AdapterError
from peftcli.peft_api import namespaces
from peftcli.peft_api.namespaces import FILES, NAMESPACES

IDS = torch.arange(3, 21).view(2, 9)


@pytest.fixture
def before_others(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As at the start of a script: neither peft nor what looks for it has been imported."""
    real = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"}
    for name in real:
        del sys.modules[name]
    monkeypatch.setattr(namespaces, "_LOOK_ONCE", ())
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        del sys.modules[name]
    sys.modules.update(real)


def test_nothing_changes_where_peft_or_who_looked_for_it_was_imported(
    before_others: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", peft)
    with pytest.raises(AdapterError, match=r"peft has been imported already, from .*\n.*at the start"):
        peftcli.peft_api.install(version="0.22.0")
    assert sys.modules["peft"] is peft
    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr(namespaces, "_LOOK_ONCE", ("json",))
    with pytest.raises(AdapterError, match="json has looked for peft already"):
        peftcli.peft_api.install(version="0.22.0")
    monkeypatch.setattr(namespaces, "_LOOK_ONCE", ())
    found_none = functools.lru_cache(lambda: False)
    found_none()
    monkeypatch.setattr(transformers.utils.import_utils, "is_peft_available", found_none)
    with pytest.raises(AdapterError, match="transformers has looked for peft already"):
        peftcli.peft_api.install(version="0.22.0")
    assert "peft" not in sys.modules
    assert importlib.metadata.version("peft") == peft.__version__


def test_imports_of_peft_give_the_same_objects(before_others: None) -> None:
    peftcli.peft_api.install()
    there: Any = importlib.import_module("peft")
    peftcli.peft_api.install()
    assert sys.modules["peft"] is there
    assert there.__version__ == peftcli.peft_api.__version__
    assert all(getattr(there, name) is getattr(peftcli, name) for name in peftcli.PEFT_NAMES)
    for path in (*FILES, *NAMESPACES):
        assert importlib.import_module(f"peft.{path}") is importlib.import_module(f"peftcli.peft_api.{path}")
    assert all(importlib.util.find_spec(name) for name in ("peft", "peft.utils.other", "peft.config"))
    for name in ("peft.stand_in", "peft.no_such_module"):  # of peftcli's own modules none is PEFT's
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    with pytest.raises(AttributeError, match="for which peftcli stands in, has no attribute 'no_such_name'"):
        _ = there.no_such_name


def test_the_version_of_peft_is_what_is_true_or_what_the_caller_claims(before_others: None) -> None:
    peftcli.peft_api.install()
    assert importlib.metadata.version("peft") == peft.__version__
    peftcli.peft_api.install(version="0.99")
    assert importlib.metadata.version("peft") == "0.99"
    assert "0.99" not in {found.version for found in importlib.metadata.distributions() if found.name == "peft"}


def test_the_adapter_methods_of_a_transformers_model(before_others: None, tmp_path: Path) -> None:
    """Of which the newest peft has none that work: transformers 5.24 wants a newer one."""
    torch.manual_seed(0)
    tiny("llama").save_pretrained(tmp_path / "base")
    wrapped = peftcli.get_peft_model(_base(tmp_path), peftcli.LoraConfig(r=4, init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = {"second": wrapped(IDS).logits, "none": _base(tmp_path)(IDS).logits}

    peftcli.peft_api.install(version="0.22.0")
    model = _base(tmp_path)
    model.add_adapter(peftcli.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False), "first")
    assert {name.rpartition(".lora_")[2] for name, value in model.named_parameters() if value.requires_grad} == {
        "A.weight",
        "B.weight",
    }
    wanted["first"] = model(IDS).logits
    model.load_adapter(str(tmp_path / "adapter"), "second")
    assert model.active_adapters() == ["second"]
    for name in ("first", "second"):
        model.set_adapter(name)
        torch.testing.assert_close(model(IDS).logits, wanted[name])
        model.disable_adapters()
        torch.testing.assert_close(model(IDS).logits, wanted["none"])
        assert model.active_adapters() == [name]
        model.enable_adapters()
        torch.testing.assert_close(model(IDS).logits, wanted[name])
    model.set_adapter(["first", "second"])
    assert not any(torch.allclose(model(IDS).logits, each) for each in wanted.values())
    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"]
    torch.testing.assert_close(model(IDS).logits, wanted["second"])
    model.save_pretrained(tmp_path / "saved")
    assert next(layer for layer in model.modules() if hasattr(layer, "lora_A")).active_adapter == ["second"]
    torch.testing.assert_close(_base(tmp_path, "saved")(IDS).logits, wanted["second"])
    again = peftcli.PeftModel.from_pretrained(_base(tmp_path), tmp_path / "saved").eval()
    torch.testing.assert_close(again(IDS).logits, wanted["second"])
    with pytest.raises(AdapterError, match="use get_peft_model"):
        model.add_adapter(peftcli.PromptTuningConfig(num_virtual_tokens=2), "soft")


def test_load_adapter_of_transformers_reads_a_file_or_refuses_it(before_others: None, tmp_path: Path) -> None:
    """Names in the file that are not those in the model: of a norm, a trained module. Tensors that layers share."""
    tiny("llama").save_pretrained(tmp_path / "base")
    configs = [
        peftcli.LNTuningConfig(target_modules=["input_layernorm"]),
        peftcli.LoraConfig(r=2, modules_to_save=["lm_head"]),
        peftcli.LoraConfig(r=2, trainable_token_indices=[5, 6]),
        peftcli.VeraConfig(r=2, target_modules=["q_proj"]),
    ]
    peftcli.peft_api.install()
    for number, config in enumerate(configs):
        wrapped, folder = peftcli.get_peft_model(_base(tmp_path), config).eval(), tmp_path / str(number)
        with torch.no_grad():
            for value in wrapped.parameters():
                value.add_(0.1 * torch.randn_like(value) if value.requires_grad else 0)
        wrapped.save_pretrained(folder)
        model = _base(tmp_path)
        if config.peft_type == "VERA":
            with pytest.raises(AdapterError, match=r"cannot read vera_A\nuse PeftModel.from_pretrained"):
                model.load_adapter(str(folder))
        else:
            model.load_adapter(str(folder))
            torch.testing.assert_close(model(IDS).logits, wrapped(IDS).logits)


def test_two_adapters_of_which_one_hides_the_other_cannot_be_active_together(before_others: None) -> None:
    peftcli.peft_api.install(version="0.22.0")
    model = tiny("llama")
    for name in ("first", "second"):
        model.add_adapter(peftcli.LoraConfig(r=2, modules_to_save=["lm_head"]), name)
    with pytest.raises(AdapterError, match="second replaces what first changes too"):
        model.set_adapter(["first", "second"])


def _base(folder: Path, name: str = "base") -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / name)
