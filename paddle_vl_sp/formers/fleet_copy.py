"""What newer releases of PaddleFleet have of PaddleFormers' models: left as it is, and that is said."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder

from paddle.nn import Layer

from paddle_vl_sp.formers.known import KNOWN_VERSIONS, MODELS
from paddle_vl_sp.formers.report import UNSUPPORTED, Line
from paddle_vl_sp.log import logger

PACKAGE, COPY = "paddlefleet", "paddlefleet.transformers"
LEFT = f"its classes are left as they are: this release changes those of {MODELS} alone"
ADVICE = (
    f"build models from {MODELS} of PaddleFormers {' or '.join(KNOWN_VERSIONS)}, or of the subclasses of "
    "paddle_vl_sp.fleet"
)


def is_installed() -> bool:
    """Without importing PaddleFleet, as finding a module in it by name would."""
    package = sys.modules.get(PACKAGE)
    if package is None:
        spec = importlib.util.find_spec(PACKAGE)
        folders = spec.submodule_search_locations if spec else None
    else:
        folders = getattr(package, "__path__", None)
    return folders is not None and PathFinder.find_spec(COPY, folders) is not None


def say_what_is_left() -> list[Line]:
    """For the report, and a warning; nothing where there is no copy."""
    if not is_installed():
        return []
    logger.warning("PaddleFleet has models of its own, %s, and %s; %s", COPY, LEFT, ADVICE)
    return [Line("PaddleFleet's own", COPY, UNSUPPORTED, f"{LEFT}; {ADVICE}")]


def refuse_model(model: Layer) -> None:
    """A model that is given by hand, and would silently train as it is."""
    module = next((base.__module__ for base in type(model).__mro__ if base.__module__.startswith(f"{COPY}.")), "")
    if module:
        raise ValueError(f"model is {type(model).__name__}, of PaddleFleet's own {module}, and {LEFT}; {ADVICE}")
