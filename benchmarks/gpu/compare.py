"""Tokens a second and peak memory on a GPU: peftcli and its variants, beside peft + Trainer and TRL.

LoRA r 16 on all linear layers of a Llama of random weights in bfloat16, chats of unequal length, 16 rows a step. Sides
take turns, each in a process of its own; all train the same rows, whose token ids are compared, with a learning rate of
0, so that the loss over all targets must come out the same. A variant whose package is missing is left out, and said.

    benchmarks/gpu/run.sh                    1.1 billion parameters
    benchmarks/gpu/run.sh --shape tiny       a try, also without a GPU
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import ROOT, TOKENIZER, WORK, machine
from rows import LENGTHS, rows

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Of Llamas, with the tokenizer's vocabulary."""
BATCHES, ROWS, WARM_UP = 24, 16, 4
"""Of a round: steps, rows of a step, and steps before the clock starts, in which kernels are chosen and compiled."""
_TRL = {"function": "trainer", "library": "trl", "base": "bfloat16", "gradient_checkpointing": False}
SIDES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "peftcli": (None, {}),
    "peftcli, flash attention": ("flash_attn", {"base_model": {"attn_implementation": "flash_attention_2"}}),
    "peftcli, liger kernels": ("liger_kernel", {"training": {"use_liger_kernel": True}}),
    "peftcli, compiled": (None, {"training": {"torch_compile": True}}),
    "peftcli, nf4": ("bitsandbytes", {"base_model": {"quantization": "nf4"}}),
    "peftcli, activations computed again": (None, {"checkpointing": True}),
    "peft + Trainer": (None, {"function": "trainer", "base": "bfloat16"}),
    "peft + Trainer, grouped": (None, {"function": "trainer", "base": "bfloat16", "order": "group_by_length"}),
    "TRL": ("trl", _TRL),
    "TRL, liger kernels": ("liger_kernel", {**_TRL, "use_liger_kernel": True}),
}
"""Side -> the package that it needs, and its arguments."""


def write_base(shape: str) -> Path:
    """Write the base model, once."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = WORK / f"llama-{shape}"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        tokenizer.save_pretrained(folder)
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **ends, **SHAPES[shape])
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def measure(side: str, round: int) -> dict[str, Any]:
    """Train one side in this process."""
    import sides

    settings = dict(SIDES[side][1])
    function = sides.SIDES[settings.pop("function", "peftcli")]
    chosen = rows("unequal", round, BATCHES * ROWS // 4)
    return function(chosen, max_length=LENGTHS["unequal"], batch=ROWS, precision="bf16", **settings)


def run(side: str, round: int, base: Path) -> dict[str, Any] | None:
    """Measure in a process of its own; None where it fails, with the reason on stderr."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0],  # Trainer would use all
        "BENCH_MODEL": str(base),
        "BENCH_WARM_UP": str(WARM_UP),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, __file__, "--measure", json.dumps({"side": side, "round": round})]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def main() -> None:
    """Measure all sides in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(**json.loads(options.measure))))
        return
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: CPU seconds and RSS"
    there = {name: sides for name, sides in SIDES.items() if sides[0] is None or importlib.util.find_spec(sides[0])}
    base = write_base(options.shape)
    found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for round in range(options.rounds):
        for side in there:
            if (figures := run(side, round, base)) is not None:
                found[side][round] = figures
                print(json.dumps({"side": side, "round": round, **figures}), flush=True)  # if time runs out
    if "peftcli" not in found:
        raise SystemExit("peftcli itself failed; the reason is above")
    ours = found["peftcli"]
    print(f"{device}; {machine()}\n")
    print("| side | tokens/s | times as long | peak, MiB | times as much | loss |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for side, each in found.items():
        pairs = [(figures, ours[round]) for round, figures in each.items() if round in ours]
        if any(there["ids"] != here["ids"] for there, here in pairs):
            raise SystemExit(f"{side} has trained other tokens")
        speed, peak = (median(figures[key] for figures in each.values()) for key in ("per_thousand", "peak"))
        slower, larger = (median(one[key] / other[key] for one, other in pairs) for key in ("per_thousand", "peak"))
        off = max(abs(one["loss"] / other["loss"] - 1) for one, other in pairs)
        print(f"| {side} | {1000 / speed:,.0f} | {slower:.2f} | {peak:,.0f} | {larger:.2f} | within {off:.0e} |")
    for side in SIDES.keys() - found.keys():
        needs = SIDES[side][0]
        print(f"not measured: {side}{f' (needs {needs})' if needs and side not in there else ': it failed'}")


if __name__ == "__main__":
    main()
