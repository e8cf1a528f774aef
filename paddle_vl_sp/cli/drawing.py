"""The look of every picture: 900 pixels wide, few lines, colours that the colour-blind can tell apart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.cli.answer import Problem, WrongUse

GREY, RED, BLUE, ORANGE, GREEN = "#888888", "#c8401e", "#1f5fa8", "#e69f00", "#009e73"
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}
# Okabe and Ito's without black, and two more, in an order in which neighbours differ for everybody
RANKS = ("#0072b2", "#cc79a7", "#56b4e9", "#e69f00", "#009e73", "#d55e00", "#8c6bb1", "#b8a800")
SUFFIXES = (".png", ".svg")


def saved(path: Path, height: float, draw: Callable[[Any], None]) -> None:
    """Makes a figure of this height in inches, lets `draw` fill it and saves it as the path's suffix says."""
    if path.suffix.lower() not in SUFFIXES:
        raise WrongUse(f"a picture must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise WrongUse(f"{path}: there is no folder {path.parent}")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # the first picture on a machine tells of its fonts
    try:
        import matplotlib
    except ImportError as error:
        raise Problem(
            'pictures need matplotlib: pip install "paddle-vl-sp[plot]", or pip install matplotlib'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(SETTINGS):
        figure = pyplot.figure(figsize=(9, height), dpi=100)
        draw(figure)
        try:
            figure.savefig(path)
        except OSError as error:
            raise WrongUse(f"{path} cannot be written: {error}; give a path that can") from error
        finally:
            pyplot.close(figure)


def rank_colours(number: int) -> npt.NDArray[np.float64]:
    """A colour for every rank, [number, 3]; the same one again after as many as can be told apart."""
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(RANKS[rank % len(RANKS)]) for rank in range(number)])
