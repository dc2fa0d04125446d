"""The helper that listens for PEFT's warnings hears them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import peft
import pytest
from models_tiny import tiny
from oracle import loaded_by_peft, saved_by_peft, silence, theirs
from safetensors.torch import load_file, save_file

from peftcli.methods import METHODS, NOT_HERE


def test_silence_hears_warnings_and_logs() -> None:
    with pytest.raises(pytest.fail.Exception, match="spoken"), silence():
        warnings.warn("spoken", stacklevel=1)
    with pytest.raises(pytest.fail.Exception, match="written"), silence():
        logging.getLogger("transformers.trainer").warning("written")
    with silence():
        tiny("llama")


def test_a_file_with_a_missing_tensor_is_heard(tmp_path: Path) -> None:
    saved_by_peft(theirs("llama", "lora"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file, {"format": "pt"})
    with pytest.raises(pytest.fail.Exception, match="missing adapter keys"):
        loaded_by_peft("llama", tmp_path)


def test_every_method_of_pefts_is_here_or_has_a_reason_not_to_be() -> None:
    here = {row.peft_type for row in METHODS.values()}
    assert not here & NOT_HERE.keys()
    assert here | NOT_HERE.keys() >= {one.value for one in peft.PeftType}
