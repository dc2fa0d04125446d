"""Merging with little memory: tensors are written one at a time, and verified with weights as they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trainkit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from peftcli.adapters import float32, merge
from peftcli.adapters.float32 import computing_in_float32
from peftcli.core.files import content_of, save_adapter
from peftcli.core.inject import inject
from peftcli.methods.lora import LoraConfig
from peftcli.system.disk import write_file

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("piece", [float32._PIECE, 1000])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {"modules_to_save": ["lm_head"]}), ("llama_tied", {"use_dora": True}), ("gpt2", {"bias": "all"})],
    ids=["llama", "llama_tied", "gpt2"],
)
@torch.inference_mode()
def test_it_computes_as_a_model_in_float32(
    kind: str, settings: dict, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32, "_PIECE", piece)
    trainkit.build(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        torch.manual_seed(0)
        inject(model, LoraConfig(target_modules="all-linear", init_lora_weights=False, **settings))
        with computing_in_float32(model):
            found.append(model(input_ids=IDS).logits)
        assert model.get_input_embeddings().weight.dtype == dtype
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0, atol=1e-6 if piece == 1000 else 0)


def test_a_model_that_reads_a_weight_by_itself_is_verified_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = trainkit.base_folder("t5", torch.bfloat16)
    model = AutoModelForSeq2SeqLM.from_pretrained(base).float()
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", base_model_name_or_path=str(base))
    inject(model, config)
    save_adapter(model, config, tmp_path / "adapter")
    dtypes = []
    real = merge._difference
    monkeypatch.setattr(merge, "_difference", lambda *given: dtypes.append(given[2]) or real(*given))
    merge.merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert dtypes == [(torch.bfloat16,) * 2, (torch.float32,) * 2]


def test_tensors_of_every_dtype_and_shape_are_written(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "bytes": torch.tensor([[1], [2], [3]], dtype=torch.uint8),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "turned": torch.randn(4, 3).T,
        "said": torch.tensor([True, False, True]),
    }
    names = {torch.int64: "I64", torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16", torch.bool: "BOOL"}
    described = {
        name: ((names[value.dtype], tuple(value.shape)), lambda value=value: value.contiguous())
        for name, value in tensors.items()
    }
    write_file(tmp_path / "model.safetensors", content_of(described))
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
