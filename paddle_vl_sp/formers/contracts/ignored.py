"""An argument that a method takes and never looks at."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from paddle_vl_sp.formers.known import Clause, Family, original_of


def never_reads(method: str, argument: str) -> Clause:
    """Ours refuse it for that reason."""

    def broken(family: Family, module: Any) -> str:
        function = inspect.unwrap(original_of(module, method))
        if argument not in inspect.signature(function).parameters:
            return f"takes no {argument}"
        body = ast.parse(textwrap.dedent(inspect.getsource(function)))
        uses = [node for node in ast.walk(body) if isinstance(node, ast.Name) and node.id == argument]
        return f"reads {argument}" if uses else ""

    return Clause(f"{method} takes {argument} and never reads it", broken)
