"""Peak memory of ``peftcli merge`` over that of the imports, as a multiple of the checkpoint and of its largest shard.

    python benchmarks/merge_memory.py [--layers N] [--shard SIZE ...] [--folder KEPT]

A Llama of random bfloat16 weights, width 2048, is written in shards with a LoRA of all linear layers, and merged in a
process of its own, which has merged a tiny one before, so that everything is imported. Peak memory is resident memory:
pages of mapped files count. The last line has the worst figure in shards: relative to the largest one.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path


def write_model(folder: Path, shard: str, **sizes: int) -> None:
    """Write a base model of these sizes, a tensor at a time, and beside it an adapter with an effect."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from peftcli.core.files import content_of, write_adapter
    from peftcli.core.inject import inject
    from peftcli.core.weights import adapter_state
    from peftcli.methods.lora import LoraConfig
    from peftcli.system.disk import write_file

    base = folder / "base"
    base.mkdir(parents=True)
    architecture = LlamaConfig(
        num_attention_heads=32, num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"], **sizes
    )
    architecture.save_pretrained(base)
    with torch.device("meta"):
        model = LlamaForCausalLM(architecture).bfloat16()
    split = split_torch_state_dict_into_shards(model.state_dict(), max_shard_size=shard)
    for name, keys in split.filename_to_tensors.items():
        shapes = {key: tuple(model.get_parameter(key).shape) for key in keys}
        values = {key: partial(torch.normal, 0.0, 0.02, shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
        write_file(base / name, content_of({key: (("BF16", shapes[key]), values[key]) for key in keys}))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    bare = Tokenizer(models.WordLevel(words, "<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=bare, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(base)
    config = LoraConfig(
        r=8, target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path=str(base),
        init_lora_weights=False,
    )  # fmt: skip
    with torch.device("meta"):
        inject(model, config)
    trained = {name: 0.02 * torch.randn(value.shape) for name, value in adapter_state(model).items()}
    (folder / "adapter").mkdir()
    write_adapter(trained, config, folder / "adapter")


def measure(tiny: Path, folder: Path, verify: bool) -> tuple[int, int]:
    """Merge both; return bytes of resident memory before the second merge, and at its peak."""
    from peftcli.adapters.merge import merge_adapter

    for source in (tiny, folder):
        before = resident()
        shutil.rmtree(folder / "merged", ignore_errors=True)
        merge_adapter(str(source / "adapter"), folder / "merged", verify=verify)
    shutil.rmtree(folder / "merged")
    return before, peak()


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """Return the most bytes of this process that were in memory. ``getrusage`` counts the one that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) << 10


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--shard", nargs="+", default=["5GB", "300MB"], help="largest size of a shard")
    parser.add_argument("--folder", type=Path, help="where models are kept; by default a temporary folder")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        tiny, folder, verify = options.measure
        return print(json.dumps(measure(Path(tiny), Path(folder), verify == "True")))
    with tempfile.TemporaryDirectory() as scratch:
        top = options.folder or Path(scratch)
        if not (top / "tiny").exists():
            write_model(top / "tiny", "5GB", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
        print("shards  verify  base MiB  largest shard MiB  peak over imports MiB  / largest shard  / all")
        worst = 0.0
        for shard in options.shard:
            folder = top / shard
            if not folder.exists():
                write_model(
                    folder, shard, vocab_size=49152, hidden_size=2048, intermediate_size=5632,
                    num_hidden_layers=options.layers,
                )  # fmt: skip
            sizes = [path.stat().st_size for path in (folder / "base").glob("*.safetensors")]
            for verify in (False, True):
                command = [sys.executable, __file__, "--measure", str(top / "tiny"), str(folder), str(verify)]
                ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                before, peak = json.loads(ran.stdout.splitlines()[-1])
                more, mib = peak - before, 1 << 20
                worst = max(worst, more / max(sizes))
                print(
                    f"{len(sizes):6}  {verify!s:6}  {sum(sizes) / mib:8,.0f}  {max(sizes) / mib:17,.0f}  "
                    f"{more / mib:21,.0f}  {more / max(sizes):15.2f}  {more / sum(sizes):5.2f}"
                )
        print(json.dumps({"merge peak over the imports, verification included, in shards": round(worst, 3)}))
    return None


if __name__ == "__main__":
    main()
