"""What the pages name exists: commands, links, files, modules, variables; and the translation says the same."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
from docs_blocks import CHINESE, FENCE, PAGES, ROOT, TRANSLATED, python

import paddle_vl_sp

PACKAGE = Path(paddle_vl_sp.__file__).parent
TO_COME = {"docs/gpu-results.md"}  # the README says when it will be there
PROGRAMS = {"make", "python", "python3", "pip", "git", "cd", "export", "paddle-vl-sp"}

each_page = pytest.mark.parametrize("page", PAGES)


def commands(text):
    """Lines of shell blocks, indented lines that call Python, and inline code that names a command."""
    shell = [line for language, source in FENCE.findall(text) if language == "bash" for line in source.splitlines()]
    prose = FENCE.sub("", text)
    shell += re.findall(r"^ {4}(python \S.*)$", prose, re.MULTILINE)
    shell += re.findall(r"`((?:make|python|pip|paddle-vl-sp) [^`]+)`", prose)
    return [line.partition("  #")[0].strip() for line in shell if line.strip() and not line.startswith("#")]


@each_page
def test_commands_exist(page):
    for command in commands(PAGES[page]):
        words = [word for word in command.split() if not re.fullmatch(r"\w+=\S+", word)]
        assert words[0] in PROGRAMS, command
        if words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words[1:]) <= set(targets), command
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), command
        elif words[0].startswith("python") and words[1] not in ("-c", "COMMAND"):
            source = (ROOT / words[1]).read_text()
            assert all(flag in source for flag in words if flag.startswith("--")), command


def own_commands():
    """The commands of this package that pages name, with their flags."""
    named = {
        re.sub(r"^paddle-vl-sp|.*-m paddle_vl_sp", "", command)
        for text in PAGES.values()
        for command in commands(text)
        if re.match("paddle-vl-sp |python -m paddle_vl_sp ", command)
    }
    words = [command.replace("...", "").split() for command in named if command]
    return sorted({(line[0], *(word for word in line if word.startswith("--"))) for line in words if line[0].islower()})


@pytest.mark.parametrize("command", own_commands(), ids=" ".join)
def test_own_commands_know_themselves(command):
    done = python("-m", "paddle_vl_sp", command[0], "--help")
    assert done.returncode == 0, done.stderr
    assert all(flag in done.stdout for flag in command[1:])


def slugs(text):
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page])):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in slugs(file.read_text()), target


@each_page
def test_files_that_are_named_exist(page):
    top = {entry.name for entry in ROOT.iterdir()} | {entry.name for entry in PACKAGE.iterdir()}
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", PAGES[page])):
        for word in code.split():
            named = re.fullmatch(r"(?:[\w.-]+/)+(?:[\w.-]+)?|[\w-]+\.(?:py|md|png|cc|cu|h)", word)
            if named and (word.partition("/")[0] in top or "." in word) and word not in TO_COME:
                places = (ROOT, PACKAGE, (ROOT / page).parent)
                assert any((place / word).exists() for place in places), word


@each_page
def test_dotted_names_of_the_package_exist(page):
    for name in set(re.findall(r"(?<![\w./])paddle_vl_sp(?:\.\w+)+", PAGES[page])):
        module, found = name, []
        while importlib.util.find_spec(module.partition(".")[0]) and not _is_module(module):
            module, _, last = module.rpartition(".")
            found.append(last)
        assert len(found) < 2, name
        if found and module != "paddle_vl_sp.fleet":
            assert hasattr(importlib.import_module(module), found[0]), name


def _is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@each_page
def test_environment_variables_are_read_somewhere(page):
    sources = "".join(path.read_text() for path in [*PACKAGE.rglob("*.py"), ROOT / "setup.py"])
    for name in set(re.findall(r"\bPADDLE_VL_SP(?:_[A-Z]+)?\b", PAGES[page])):
        assert f'"{name}"' in sources, name


@pytest.mark.parametrize("page", TRANSLATED)
def test_the_translation_has_the_same_code_links_numbers_and_rows(page):
    """Blocks to the letter; pages linked to, in either language; numbers; the code in the same row of each table."""
    name = page.replace(".md", CHINESE)
    ours, theirs = PAGES[page], PAGES[name]
    assert [source for _, source in FENCE.findall(ours)] == [source for _, source in FENCE.findall(theirs)]
    assert _links(ours) == _links(theirs)
    assert (_numbers(ours) - _numbers(theirs), _numbers(theirs) - _numbers(ours)) == (Counter(), Counter())
    rows = [
        [Counter(re.findall(r"`[^`]+`", row)) for row in re.findall(r"^\|.*", text, re.M)] for text in (ours, theirs)
    ]
    assert len(rows[0]) == len(rows[1])
    assert [pair for pair in zip(*rows, strict=True) if pair[0] != pair[1]] == []


@pytest.mark.parametrize("page", TRANSLATED)
def test_each_language_links_to_the_other_at_the_top(page):
    english, chinese = Path(page).name, Path(page).name.replace(".md", CHINESE)
    assert PAGES[page].splitlines()[2] == f"English | [简体中文]({chinese})"
    assert PAGES[page.replace(".md", CHINESE)].splitlines()[2] == f"[English]({english}) | 简体中文"


def _links(text):
    targets = re.findall(r"\]\(([^)#\s]+)[)#]", "\n".join(text.splitlines()[3:]))
    return {target.replace(CHINESE, ".md") for target in targets}


def _numbers(text):
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", re.sub("<!--.*?-->", "", FENCE.sub("", text))))
