"""One style for all figures, and what they share.

Colours are seaborn's colour-blind-safe palette. Lines also differ in dash or marker, so that grey prints are legible.
Chance levels are grey lines; uncertainty is a band or a bar.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib.figure import Figure

GREY = "0.45"
INK, PULL, WARN, BAND = (sns.color_palette("colorblind")[i] for i in (0, 1, 3, 2))
MARKERS = "os^vDPX*h"
HATCHES = ["", "//", "..", "xx", "--", "++"]


def use_style() -> None:
    """Set the style of all figures; call it once, after the imports of a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette="colorblind",
        font_scale=0.8,
        rc={
            "figure.dpi": 110,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlesize": "medium",
            "grid.color": "0.9",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "svg.hashsalt": "lvmlib",  # the same figure is the same file
        },
    )
    if get_ipython() is not None:
        # SVG is sharp on every screen. JupyterLab does not show it in a notebook that another process ran: PNG besides.
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", "png", metadata={"Date": None})


def look(i: int) -> dict:
    """Return the line style of the i-th predictor, the same in every figure; the first is the model."""
    dashes = ["-", "--", ":", "-.", (0, (1, 1)), (0, (6, 2, 1, 2, 1, 2))]
    return {"color": sns.color_palette("colorblind")[i % 10], "ls": dashes[i % 6], "lw": 2.6 if i == 0 else 1.4}


def marked(i: int) -> dict:
    """Return `look` with the marker of the i-th predictor."""
    return look(i) | {"marker": MARKERS[i % 6], "ms": 5}


def title(figure: Figure, text: str) -> Figure:
    """Return the figure with a bold title at its left."""
    figure.suptitle(text, x=0.005, ha="left", weight="bold")
    return figure


def lines(axis, x: pd.Series, parts: Mapping[str, pd.Series]) -> None:
    """Draw up to three lines over epochs or steps, by label."""
    for (label, part), style, color in zip(parts.items(), ("o-", "s:", "^--"), (INK, PULL, BAND), strict=False):
        axis.plot(x, part, style, color=color, label=label)


def reach(rows: pd.DataFrame | Mapping) -> np.ndarray:
    """Return how far intervals reach below and above their values, (2, N), for error bars."""
    return np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)


def whole_epochs(axis) -> None:
    """Put ticks at whole epochs only."""
    axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
