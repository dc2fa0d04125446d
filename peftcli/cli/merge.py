"""``peftcli merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peftcli.cli import console
from peftcli.cli.options import Adapter, Base, Json, Quiet, path, progress_log
from peftcli.data.rows import count_of
from peftcli.models.hub_files import PIPELINE_FILE


def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(parser=path, help="Folder for the merged model; must be new or empty.")],
    base: Base = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Number format of the merged weights; by default the base model's."),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Dequantise the weights of a quantised base model, and merge into them."),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Compare the outputs of the merged model with base model and adapter."
        ),
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge an adapter into its base model, as one checkpoint.

    transformers loads it without peftcli.
    """
    tell = progress_log(quiet)
    from peftcli.adapters.merge import merge_adapter

    merged = merge_adapter(adapter, output, base=base, dtype=dtype, dequantize=dequantize, verify=verify, tell=tell)
    if as_json:
        return console.print_json(merged)
    if merged["max_logit_difference"] is not None:
        console.paragraph(_verified(merged))
    size, files = console.format_size(merged["bytes"]), count_of(merged["shards"], "file")
    console.out(f"{output}: {size} in {files}, {merged['dtype']}")
    kind = "DiffusionPipeline." if Path(merged["output"], PIPELINE_FILE).exists() else ""
    return console.out(f"load it with {kind}from_pretrained({merged['output']!r})")


def _verified(merged: dict[str, Any]) -> str:
    """What was compared, and how much it differs."""
    largest, spread, positions = (merged[key] for key in ("max_logit_difference", "logit_spread", "positions"))
    size = f"by at most {largest:.2g}, {largest / (spread or 1):.2g} of their spread"
    if merged["same_tokens"] is None:
        return f"verified on {count_of(positions, 'row')}: the outputs differ {size}"
    same = "everywhere" if merged["same_tokens"] == positions else f"after {merged['same_tokens']} of them"
    tokens = f"verified after {count_of(positions, 'random token')}: the logits differ {size}"
    return f"{tokens}; the likeliest next token is the same {same}"
