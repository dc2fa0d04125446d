"""Memory and time of a process that holds all of the base model, against one that shares it with another (FSDP2).

A Llama of random weights in bfloat16, 5 billion parameters by default, is written to a temporary folder (10 GB of disk,
and 12 GB of memory later on), and trained for a few steps by two processes, first with ``launch.strategy: replicate``,
then with ``fsdp``; activations are computed again in the backward pass, as they are where memory is short. Memory is
the largest that the first process had, that of imports included. The adapters must be the same, to the bit. Needs
``make quickstart`` to have fetched the tokenizer.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/sharded.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENIZER = "models/SmolLM2-135M-Instruct"


def write_base(folder: Path, layers: int) -> int:
    """Write the base model, and return its number of parameters."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")
    return model.num_parameters()


def measure(base: Path, folder: Path, strategy: str, steps: int) -> tuple[float, float]:
    """Train in two processes; return MiB and seconds a step."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(f"""\
base_model: {{name: {base}, dtype: bfloat16}}
task: causal_lm
method: {{type: lora, r: 8, target_modules: all-linear}}
dataset: {{train: configs/quickstart/train.jsonl, max_length: 128}}
launch: {{num_processes: 2, strategy: {strategy}}}
training:
  output_dir: {folder}
  max_steps: {steps}
  per_device_train_batch_size: 1
  bf16: true
  gradient_checkpointing: true
  verify: false
""")
    subprocess.run([sys.executable, "-m", "peftcli", "train", recipe, "--quiet"], check=True, stdout=subprocess.DEVNULL)
    run = json.loads((folder / "run.json").read_text())
    return run["peak_memory_bytes"]["rss"] / 2**20, run["wall_seconds"] / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, "base")
        count = write_base(base, options.layers)
        found = {name: measure(base, Path(scratch, name), name, options.steps) for name in ("replicate", "fsdp")}
        files = [Path(scratch, name, "adapter_model.safetensors").read_bytes() for name in found]
    if files[0] != files[1]:
        raise SystemExit("the adapters differ")
    print(f"{count / 1e9:.2f} billion parameters, two processes\n")
    print("| strategy | peak RSS, MiB | seconds a step |\n| --- | ---: | ---: |")
    for name, (memory, seconds) in found.items():
        print(f"| {name} | {memory:,.0f} | {seconds:.1f} |")
    print(json.dumps({"memory": round(found["replicate"][0] / found["fsdp"][0], 3)}))


if __name__ == "__main__":
    main()
