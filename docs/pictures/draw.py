"""Draw the pictures of docs/concepts.md, in light and dark: python docs/pictures/draw.py."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
STYLE = """<style>
.page{fill:#fff}.ink{fill:#1b1f24}.quiet{fill:#57606a}.frozen{fill:#e8ecf1;stroke:#8c96a3}
.trains{fill:#d8f3dd;stroke:#2a8a45}
.line{stroke:#57606a;fill:none}.head{fill:#57606a}
text{font-family:system-ui,sans-serif;text-anchor:middle}.left{text-anchor:start}
@media (prefers-color-scheme: dark){.page{fill:#1c2026}.ink{fill:#e2e6ea}.quiet{fill:#a5afba}
.frozen{fill:#2c323a;stroke:#7d8794}
.trains{fill:#12401f;stroke:#5fc47b}.line{stroke:#a5afba}.head{fill:#a5afba}}
</style><defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">
<path class="head" d="M0 0 L10 5 L0 10 z"/></marker></defs>"""


def box(x: int, y: int, w: int, h: int, title: str, *lines: str, kind: str = "frozen") -> str:
    """A box with a title and lines below it, in its middle."""
    top = y + h / 2 + 6 - 9 * len(lines)
    out = f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="7" stroke-width="1.5"/>' + text(
        x + w / 2, top, title, 15, bold=True
    )
    return out + "".join(text(x + w / 2, top + 18 * (at + 1), line, 12, "quiet") for at, line in enumerate(lines))


def text(
    x: float, y: float, words: str, size: int = 13, kind: str = "ink", *, bold: bool = False, left: bool = False
) -> str:
    """Words at a place."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text class="{kind}{" left" if left else ""}" x="{x}" y="{y}" font-size="{size}"{weight}>{words}</text>'


def arrow(path: str) -> str:
    """A line with a head."""
    return f'<path class="line" d="{path}" stroke-width="1.6" marker-end="url(#a)"/>'


def legend(x: int, y: int) -> str:
    """What the colours mean."""
    out = f'<rect class="trains" x="{x}" y="{y - 11}" width="14" height="14" rx="3"/>' + text(
        x + 22, y, "trains", 12, "quiet", left=True
    )
    return (
        out
        + f'<rect class="frozen" x="{x + 80}" y="{y - 11}" width="14" height="14" rx="3"/>'
        + text(x + 102, y, "frozen", 12, "quiet", left=True)
    )


def write(name: str, title: str, width: int, height: int, *parts: str) -> None:
    """Write a picture."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><title>{title}</title>{STYLE}'
    back = f'<rect class="page" width="{width}" height="{height}" rx="10"/>'
    (HERE / f"{name}.svg").write_text("\n".join([head, back, *parts, "</svg>"]) + "\n", encoding="utf-8")


def lora() -> None:
    """LoRA on one linear layer."""
    write(
        "lora",
        "LoRA on a linear layer",
        760,
        330,
        box(330, 262, 100, 40, "x"),
        arrow("M360 262 C360 225 230 245 230 214"),
        arrow("M400 262 C400 235 530 250 530 228"),
        box(140, 112, 180, 100, "W", "d x d, of the base model"),
        '<path class="trains" d="M490 186 L570 186 L620 226 L440 226 z" stroke-width="1.5"/>',
        text(530, 211, "A: r x d", 14, bold=True),
        '<path class="trains" d="M440 112 L620 112 L570 152 L490 152 z" stroke-width="1.5"/>',
        text(530, 137, "B: d x r", 14, bold=True),
        arrow("M530 186 L530 155"),
        text(638, 174, "r numbers", 12, "quiet", left=True),
        text(640, 122, "starts at zero", 12, "quiet", left=True),
        arrow("M230 112 C230 80 340 84 357 66"),
        arrow("M530 112 C530 80 420 84 403 66"),
        text(536, 84, "times lora_alpha / r", 12, "quiet", left=True),
        '<circle class="frozen" cx="380" cy="54" r="18" stroke-width="1.5"/>',
        text(380, 60, "+", 18, bold=True),
        text(412, 32, "y = W x + lora_alpha / r · B A x", 14, bold=True, left=True),
        arrow("M380 36 L380 12"),
        legend(24, 312),
    )


def soft_prompts() -> None:
    """Prompt tuning beside prefix tuning."""
    parts = []
    for left, title in ((20, "Prompt tuning"), (400, "Prefix tuning")):
        parts.append(text(left + 170, 30, title, 16, bold=True))
        for layer in range(3):
            y = 56 + 58 * layer
            wide = 340 if left == 20 else 236
            parts.append(box(left + 340 - wide, y, wide, 40, f"layer {3 - layer}"))
            if left == 400:
                parts.append(box(left, y, 96, 40, "k, v", kind="trains"))
        for at in range(7):
            virtual = at < 2
            if virtual and left == 400:
                continue
            x = left + 49 * at
            word = "v" if virtual else ("What", "does", "len()", "do", "?")[at - 2]
            parts.append(
                box(x, 250, 42, 34, "" if not virtual else f"v{at + 1}", kind="trains" if virtual else "frozen")
            )
            parts.append("" if virtual else text(x + 21, 271, word, 13))
            parts.append(arrow(f"M{x + 21} 250 L{x + 21} 216"))
    parts.append(text(68, 304, "virtual tokens", 12, "quiet"))
    parts.append(text(448, 304, "in every layer", 12, "quiet"))
    parts.append(legend(560, 318))
    write("soft-prompts", "Prompt tuning and prefix tuning", 760, 336, *parts)


def way() -> None:
    """From the recipe to the folder."""
    write(
        "way-of-a-row",
        "The way of a row",
        760,
        330,
        box(290, 16, 180, 56, "recipe.yaml", "names all of it", kind="frozen"),
        arrow("M300 72 C260 96 130 84 120 110"),
        arrow("M460 72 C500 96 630 84 640 110"),
        box(30, 114, 180, 60, "base model", "opened once, pinned"),
        box(550, 114, 180, 60, "rows", "files, folders, the hub"),
        arrow("M120 174 L120 208"),
        arrow("M640 174 L640 208"),
        box(30, 212, 180, 74, "adapter layers", "wrapped around the layers", "that the method targets", kind="trains"),
        box(550, 212, 180, 74, "examples", "tokens and targets,", "checked and cached"),
        arrow("M210 249 L286 249"),
        arrow("M550 249 L474 249"),
        box(290, 212, 180, 74, "loop", "loss over the targets,", "checkpoints, evaluations"),
        arrow("M380 212 L380 178"),
        box(290, 114, 180, 60, "adapter folder", "PEFT's two files, run.json", kind="trains"),
        legend(24, 314),
    )


if __name__ == "__main__":
    lora()
    soft_prompts()
    way()
