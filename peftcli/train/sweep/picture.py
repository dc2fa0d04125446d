"""sweep.png: the metric of each run over its steps."""

from __future__ import annotations

import io
import logging
from typing import Any

from peftcli.train.sweep.record import SweepRecord


def draw(record: SweepRecord) -> bytes:
    """Draw the metric of each run where it was measured, the winner's line wider. Returns the PNG."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it cannot write a cache into the home folder
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_axes((0.1, 0.12, 0.87, 0.85))  # left, bottom, width, height
    colours: dict[str, Any] = {}
    for each in record.runs:
        points = sorted((one.step, one.value) for one in each.measured)
        if points:
            first = each.second_seed_of
            label = f"{each.name} {each.described}" if first is None else f"{first}, second seed"
            style = "o-" if first is None else "x:"
            wide = 3 if each.name == record.winner else 1.2
            (line,) = axes.plot(
                *zip(*points, strict=True), style, label=label, linewidth=wide, color=colours.get(first or "")
            )
            colours[each.name] = line.get_color()
    axes.set(xlabel="step", ylabel=(record.metric or "").removeprefix("eval_"))
    axes.grid(alpha=0.3)
    if colours:
        axes.legend(fontsize=7)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    return image.getvalue()
