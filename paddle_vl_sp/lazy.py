"""Names of a package that are imported at their first use (PEP 562), and modules under their old names."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a package with `__all__`; homes maps each name to the module that defines it.

    ::

        __getattr__, __dir__ = lazy_exports(__name__, {"plan_visual": "plan"})

    Type checkers need `from ... import` under TYPE_CHECKING besides, and not to see this `__getattr__`.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:  # noqa: N807
        return sorted(sys.modules[package].__all__)

    return __getattr__, __dir__


class MovedModule(types.ModuleType):
    """A module of an earlier version under its old name: its attributes are those of the new module, with a warning."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to {new}.")
        self.__dict__["_new"] = new
        sys.modules[old] = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect looks these up on every module: no warning for that
            raise AttributeError(name)
        warnings.warn(f"{self.__name__} has moved to {self._new}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(self._new), name)
