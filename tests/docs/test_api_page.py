"""docs/api.md is what its generator makes of today's docstrings, and has every public name."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
from docs_blocks import PAGES, ROOT

sys.path.insert(0, str(ROOT / "tools"))
import api_page

NEEDS_FLEET = "paddle_vl_sp.fleet"  # read from the source here, as the page is


def test_the_page_is_up_to_date():
    """To the letter."""
    assert PAGES["docs/api.md"] == api_page.page(), "python tools/api_page.py writes it again"


@pytest.mark.parametrize("package", api_page.PACKAGES)
def test_every_public_name_has_its_entry(package):
    """What `__all__` holds at run time, or in the source where that cannot be imported: one heading, one link here."""
    module = f"paddle_vl_sp{package}"
    listed = api_page.public(api_page.tree_of(module))
    if module != NEEDS_FLEET:
        assert sorted(listed) == sorted(set(importlib.import_module(module).__all__) - {"__version__"})
    headings = re.findall(r"^### (\w+)$", PAGES["docs/api.md"], re.MULTILINE)
    section = PAGES["docs/api.md"].partition(f"\n## {module}\n")[2].partition("\n## ")[0]
    assert all(headings.count(name) == 1 for name in listed)
    assert all(f"[{name}](#{name.lower()})" in section for name in listed)


def test_every_public_name_has_a_text():
    """A docstring, or what an alias stands for."""
    assert [found.name for found in api_page.names() if not found.text] == []


def test_docstrings_become_markdown():
    """Sentences in one line, signs of Markdown escaped outside of code, columns and drawings as they are."""
    docstring = "Adds *rows* and\n`a*b` too; drawn::\n\n    t v\n    v t\n\nname  one\n      line\n\nEnd."
    text = "Adds \\*rows\\* and `a*b` too; drawn:\n\n```\nt v\nv t\n```\n\n```\nname  one\n      line\n```\n\nEnd.\n"
    assert api_page.as_markdown(docstring) == text
