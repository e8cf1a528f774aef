"""Troubleshooting explains every message of the package, and quotes none that is not there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
from docs_blocks import PAGES

import paddle_vl_sp

PACKAGE = Path(paddle_vl_sp.__file__).parent
ELSEWHERE = {"cli"}  # what the commands say about their arguments is on their own page
TOLD_IN_PROSE = {"…", "….… on … ranks\n…"}  # another rank's words, whose sentence is a row; RanksFailed
FEWEST_LETTERS = 14  # of a quotation, so that it does not fit everything


def text_of(node):
    """The text of a string expression, … for what varies."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdr]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def error_classes(trees):
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    own = {node.name for node in classes for base in node.bases if getattr(base, "id", "").endswith("Error")}
    return own | {"ValueError", "RuntimeError", "ImportError", "TypeError", "OSError"}


@functools.cache
def messages():
    """Every message of the package, with its module, and the sentence around another rank's words."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in ELSEWHERE]
    trees = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in paths}
    errors, found = error_classes(trees.values()), []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args:
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if called in errors or called == "warning":
                    found.append((name, text_of(node.args[0])))
    sentences = [text_of(node) for node in ast.walk(trees["comm/agree.py"]) if _is_sentence(node)]
    return [*found, *(("comm/agree.py", sentence) for sentence in sentences)]


def _is_sentence(node):
    return isinstance(node, ast.JoinedStr) and "failed, so all stop" in text_of(node)


def rows_of_troubleshooting():
    """What each row quotes; the first column of the tables under the headings with messages."""
    _, _, text = PAGES["docs/troubleshooting.md"].partition("## Operators")
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def quotes(row, message):
    parts = [re.escape(part.strip()) for part in row.split("…") if part.strip()]
    return re.search(".*".join(parts), message, re.DOTALL) is not None


@pytest.mark.parametrize("row", rows_of_troubleshooting())
def test_a_quoted_message_is_one_of_the_package(row):
    assert len(row.replace("…", "")) >= FEWEST_LETTERS
    assert any(quotes(row, message) for _, message in messages())


def test_every_message_of_the_package_is_explained():
    rows = rows_of_troubleshooting()
    missing = [
        f"{module}: {message}"
        for module, message in messages()
        if message not in TOLD_IN_PROSE and not any(quotes(row, message) for row in rows)
    ]
    assert not missing, "docs/troubleshooting.md says nothing of\n" + "\n".join(missing)
