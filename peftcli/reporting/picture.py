"""Curves of runs as a picture: PNG or SVG."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence

from peftcli.reporting.blocks import Chart


def draw_picture(charts: Sequence[Chart], kind: str) -> bytes:
    """Draw charts side by side; ``kind`` is png or svg."""
    # where matplotlib cannot write a cache into the home folder, it warns, and writes a temporary one
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6 * len(charts), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        for number, series in enumerate(chart.series):
            style = "-o" if series.dots else "-"
            axes.plot(
                *zip(*series.points, strict=True), style, markersize=3, color=f"C{number % 10}", label=series.name
            )
        axes.set(xlabel="step", ylabel=chart.title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    image = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "peftcli", "text.parse_math": False}):
        figure.savefig(image, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return image.getvalue()
