"""What llama.cpp makes of adapters as they are and as `peftcli export` writes them, on tiny models: docs/export.md.

    pip install xllamacpp
    python benchmarks/export.py

Each row is an adapter of random weights. Beside the export stands the file as it is: A, B and lora_alpha, as
llama.cpp's converter takes them from the folder, or why it does not.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/adapters")]

from test_adapters_replay import make_adapter  # noqa: E402

from peftcli.adapters.combine import combine_adapters  # noqa: E402
from peftcli.adapters.export.gguf import write_adapter_file  # noqa: E402
from peftcli.adapters.export.lora import PlainLora  # noqa: E402
from peftcli.adapters.export.programs import readings  # noqa: E402
from peftcli.adapters.export.replay import Replayed, replay, say  # noqa: E402
from peftcli.adapters.export.write import export_adapter, open_dense_base  # noqa: E402
from peftcli.adapters.load import find_adapter  # noqa: E402
from peftcli.core.files import read_tensors  # noqa: E402
from peftcli.errors import PeftcliError  # noqa: E402
from peftcli.methods.lora.updates import pairs  # noqa: E402
from peftcli.methods.updates import Update  # noqa: E402

PAGE, BEGIN, END = ROOT / "docs/export.md", "<!-- table of benchmarks/export.py -->\n", "<!-- end of the table -->"
PATTERNS = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 64}}
SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {}),
    "LoRA, rsLoRA": ("llama", {"use_rslora": True}),
    "LoRA with patterns": ("qwen3", PATTERNS),
    "LoRA from PiSSA": ("gemma2", {"init_lora_weights": "pissa"}),
    "two LoRA combined": ("smollm3", {"combined": True}),
    "LoRA, rsLoRA on Conv1D": ("gpt2", {"use_rslora": True}),
    "LoRA on fused projections": ("phi3", {}),
    "DoRA": ("llama", {"use_dora": True}),
    "LoHa": ("gemma3", {"peft_type": "LOHA", "r": 2, **SOME}),
    "OFT": ("qwen2", {"peft_type": "OFT", "oft_block_size": 8, "r": 0, **SOME}),
    "VeRA": ("llama", {"peft_type": "VERA", "r": 16, "target_modules": ["q_proj"]}),
    "LoRA with a trained head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}
"""What -> the family of its base model, and its settings."""


def main() -> None:
    """Write the table, or with arguments print the rows of these adapters."""
    lines = [
        "| adapter | base | form | prompts | answers | first tokens | the file as it is |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (family, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            row = measured(Path(scratch), family, dict(settings))
        lines.append(f"| {name} | {family} | {' | '.join(row)} |")
        print(lines[-1], flush=True)
    page = PAGE.read_text(encoding="utf-8")
    start, _, rest = page.partition(BEGIN)
    PAGE.write_text(start + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2], encoding="utf-8")


def measured(folder: Path, family: str, settings: dict[str, Any]) -> list[str]:
    """Export an adapter, as a LoRA or else merged, and ask llama.cpp about the export and about the file as it is."""
    combined = settings.pop("combined", False)
    adapter = make_adapter(folder, family, **settings)
    if combined:
        other = make_adapter(folder / "other", family, r=4, use_rslora=True)
        config = json.loads((other / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(folder / "base")  # the same weights
        (other / "adapter_config.json").write_text(json.dumps(config))
        combine_adapters([str(adapter), str(other)], [0.7, 0.3], folder / "combined")
        adapter = folder / "combined"
    for form in ("gguf", "merged-gguf"):
        try:
            found = export_adapter(str(adapter), folder / form, form=form, numbers="f32")
            break
        except PeftcliError as error:
            print(f"  not as {form}: {error}", flush=True)
    one = Replayed(**found["replayed"])
    how = form if not found["error"] else f"{form}, {found['error']:.1%} lost"
    return [how, *cells(one), as_it_is(adapter, folder)]


def cells(one: Replayed) -> list[str]:
    """Return how many prompts and answers are the same, and how far the first tokens are off."""
    prompts = f"{one.same_prompts} of {one.prompts}" + f" ({one.normalised} not in NFC)" * bool(one.normalised)
    return [prompts, f"{one.same_answers} of {one.answers}", "-" if one.first is None else f"{one.first:.1g}"]


def as_it_is(adapter: Path, folder: Path) -> str:
    """Ask llama.cpp about A, B and lora_alpha as they stand in the folder."""
    source = find_adapter(str(adapter))
    row = next(
        r for r in readings(str(adapter), source.config, source.header, chat=True) if r["program"] == "llama.cpp"
    )
    if row["reads"] == "no":
        return "; ".join(row["why"])
    tensors, config = read_tensors(source.folder), source.config
    updates = {path: Update(tensors[pair.b], tensors[pair.a]) for path, pair in pairs(tensors).items()}
    raw = PlainLora(config.lora_alpha, updates, False, [], 0.0, ("", 0.0))
    (folder / "raw").mkdir()
    with open_dense_base(source) as opened:
        write_adapter_file(raw, opened, folder / "raw/adapter.gguf")
        found = replay("gguf", say(source), folder / "raw", "adapter.gguf", opened)
    return f"{found.same_answers} of {found.answers} answers, first tokens off by {cells(found)[-1]}"


if __name__ == "__main__":
    main()
