"""Write the table of docs/scaling.md that says what many GPUs would take: it is calculated, and says from what.

python docs/many_gpus.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("scaling.md")
TOKENS = 2048
"""Tokens of a step on each GPU, one micro-batch."""
KEPT = 24_200 / 576
"""Bytes that are kept for the backward pass, for each token, layer and unit of width: measured (docs/log.md)."""
R = 16
SPEED = 400e12
"""Floating-point operations in a second of one GPU: 40 % of an H100's in bfloat16. Assumed."""
MACHINE = 8
"""GPUs of a machine."""
NEAR, FAR = 300e9, 40e9
"""Bytes in a second that each GPU gathers from those of its machine of 8, and from other machines. Assumed."""
GB = 1e9


ROWS = {"replicate": (1, 2, 8, 64, 512), "hybrid": (64, 512), "fsdp": (2, 8, 64, 512)}
"""Strategy -> numbers of GPUs. With 8 or fewer hybrid is fsdp."""


@dataclass(frozen=True)
class Shape:
    """A model of Llama's shape."""

    name: str
    layers: int
    width: int
    inner: int
    heads_share: float
    """Width of keys and values, relative to that of queries."""
    vocabulary: int

    @property
    def of_layer(self) -> int:
        """Parameters of a layer's matrices."""
        return int(self.width**2 * (2 + 2 * self.heads_share)) + 3 * self.width * self.inner

    @property
    def outside(self) -> int:
        """Parameters of embedding and head."""
        return 2 * self.vocabulary * self.width

    @property
    def adapter(self) -> int:
        """Parameters of LoRA on all linear layers."""
        sides = 2 * (self.width + self.width) + 2 * (self.width + self.width * self.heads_share)
        return int(R * self.layers * (sides + 3 * (self.width + self.inner)))


SHAPES = (
    Shape("8B", 32, 4096, 14_336, 0.25, 128_256),
    Shape("70B", 80, 8192, 28_672, 0.125, 128_256),
)


def group_size(strategy: str, gpus: int) -> int:
    """GPUs that divide a base model among them."""
    return {"replicate": 1, "hybrid": min(gpus, MACHINE), "fsdp": gpus}[strategy]


def memory(shape: Shape, gpus: int, strategy: str) -> float:
    """Bytes on a GPU: weights, adapter with gradients and AdamW's averages, what is kept, one chunk of logits."""
    layers, size = 2 * shape.layers * shape.of_layer, group_size(strategy, gpus)
    weights = 2 * shape.outside + (layers / size + 3 * 2 * shape.of_layer if size > 1 else layers)
    kept = TOKENS * shape.width * (2 * shape.layers + KEPT)  # inputs of layers, and one layer computed again
    return weights + 16 * shape.adapter + kept + 1024 * shape.vocabulary * (2 + 4 + 2)


def seconds(shape: Shape, gpus: int, strategy: str) -> tuple[float, float]:
    """Seconds of a step, and how many of them are spent waiting for other GPUs."""
    products = 2 * (shape.layers * shape.of_layer + shape.outside / 2 + shape.adapter)
    computing = 3 * products * TOKENS / SPEED  # forward, again, and backward to the inputs alone
    size = group_size(strategy, gpus)
    summing = 2 * 4 * shape.adapter * (gpus - 1) / gpus / (NEAR if gpus <= MACHINE else FAR)
    gathering = 2 * 2 * shape.layers * shape.of_layer * (size - 1) / size / (NEAR if size <= MACHINE else FAR)
    waiting = max(gathering - computing, 0.0) + summing  # layers are gathered while others compute
    return computing + waiting, waiting


def table() -> str:
    """The table."""
    lines = [
        "| model | strategy | GPUs | GB on each | s a step | of them waiting | tokens/s | of the ideal |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for shape in SHAPES:
        for strategy, counts in ROWS.items():
            for gpus in counts:
                took, waited = seconds(shape, gpus, strategy)
                share = seconds(shape, 1, "replicate")[0] / took
                size = memory(shape, gpus, strategy) / GB
                fits = "" if size < 76 else " (too much for 80)"
                lines.append(
                    f"| {shape.name} | {strategy} | {gpus} | {size:.0f}{fits} | {took:.2f} | "
                    f"{waited:.2f} | {gpus * TOKENS / took:,.0f} | {share:.0%} |"
                )
    return "\n".join(lines)


def page() -> str:
    """The page with the table as it is now."""
    text = PAGE.read_text()
    before, _, rest = text.partition("<!-- calculated -->")
    _, _, after = rest.partition("<!-- /calculated -->")
    return f"{before}<!-- calculated -->\n{table()}\n<!-- /calculated -->{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
