"""The code blocks of the pages, and running them.

A block runs by itself, unless the HTML comment right above it says otherwise; notes are joined by commas:

    <!-- continues -->             with the names that the block before it, of the same kind, left behind
    <!-- given NAME -->            with the names that the function NAME of docs_given.py returns
    <!-- on 2 ranks -->            on two processes, joined by gloo
    <!-- run by pytest -->         as a file of tests
    <!-- not run: REASON -->       compiled, and what it imports from this package must be there and take its arguments
    <!-- fault WHERE: ERROR -->    raises that error by a fault of an installed package: test_upstream_faults.py
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CHINESE = ".zh-CN.md"
TRANSLATED = tuple(  # into pages with the same blocks
    page.relative_to(ROOT).as_posix().replace(CHINESE, ".md")
    for folder in (ROOT, ROOT / "docs")
    for page in sorted(folder.glob(f"*{CHINESE}"))
)
DOUBLE = ROOT / "tests" / "fleet" / "double"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r"<!-- (.*?) -->\n\Z")
NOTES = re.compile(
    r"continues|given \w+|on 2 ranks|run by pytest|not run: .+"
    r"|fault (preamble|(on one process|on 2 ranks|in a process): [^,]+)"
)
OPTIONAL = ("paddleformers", "paddlefleet")


@dataclass(frozen=True)
class Block:
    page: str
    number: int  # among the blocks of its page, from 1
    language: str
    source: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.number}"

    def noted(self, start: str) -> str:
        """The rest of the note that starts so; "" where there is none, or nothing follows."""
        return next((note.removeprefix(start).strip() for note in self.notes if note.startswith(start)), "")

    @property
    def how(self) -> str:
        """How it is held to be right: run, ranks, pytest, compile, or by its fault."""
        kinds = {"on 2 ranks": "ranks", "run by pytest": "pytest", "not run:": "compile", "fault ": "fault"}
        return next((kind for start, kind in kinds.items() for note in self.notes if note.startswith(start)), "run")


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in pages()}


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A new process of this Python that finds this package and what tests share."""
    path = os.pathsep.join(str(folder) for folder in (ROOT / "tests", ROOT / "tests" / "docs", ROOT))
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)


def blocks_of(page: Path) -> list[Block]:
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    found = []
    for number, fence in enumerate(FENCE.finditer(text), 1):
        note = NOTE.search(text[: fence.start()])
        text_of_note = note[1] if note else ""
        notes = (
            (text_of_note,) if text_of_note.startswith("not run:") else tuple(filter(None, text_of_note.split(", ")))
        )
        found.append(Block(name, number, fence[1], fence[2], notes))
    return found


def python_blocks() -> list[Block]:
    return [
        block
        for page in pages()
        if not page.name.endswith(CHINESE)
        for block in blocks_of(page)
        if block.language == "python"
    ]


def run_blocks(how: str) -> dict[str, str]:
    """What went wrong in each block of this kind, "" if nothing: in a new folder, with nothing of ours left changed."""
    told = {}
    names: dict[str, Any] = {}
    for block in (block for block in python_blocks() if block.how == how):
        names = names if "continues" in block.notes else {"__name__": "block"}
        with in_a_new_folder():
            told[str(block)] = _error_of(block, names)
        if "paddle_vl_sp.formers" in sys.modules:
            sys.modules["paddle_vl_sp.formers"].revert()
    return told


@contextlib.contextmanager
def in_a_new_folder() -> Iterator[None]:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _error_of(block: Block, names: dict[str, Any]) -> str:
    given = block.noted("given ")
    try:
        if given:
            names |= getattr(importlib.import_module("docs_given"), given)()
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.source, str(block), "exec"), names)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in OPTIONAL:
            return f"skip: {error}"
        return traceback.format_exc()
    except Exception:
        return traceback.format_exc()
    return ""


def unfit_imports(block: Block) -> list[str]:
    """Names of this package that the block imports and that are not there, and arguments that they do not take."""
    tree, found, wrong = ast.parse(block.source), {}, []
    for statement in ast.walk(tree):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("paddle_vl_sp"):
            module = importlib.import_module(statement.module)
            for alias in statement.names:
                if hasattr(module, alias.name):
                    found[alias.asname or alias.name] = getattr(module, alias.name)
                else:
                    wrong.append(f"{statement.module} has no {alias.name}")
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in found:
            keywords = dict.fromkeys(keyword.arg for keyword in call.keywords if keyword.arg)
            try:
                inspect.signature(found[call.func.id]).bind_partial(**keywords)
            except TypeError as error:
                wrong.append(f"{call.func.id}: {error}")
    return wrong


def main() -> None:
    """Runs every block that runs by itself, and looks at those that cannot; prints what is wrong as JSON."""
    told = run_blocks("run")
    if importlib.util.find_spec("paddlefleet") is None:
        sys.path.insert(0, str(DOUBLE))  # last: what ran before must not take it for PaddleFleet
    for block in python_blocks():
        if block.how == "compile":
            told[str(block)] = "; ".join(unfit_imports(block))
    print(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
