"""The files for the place where the project is hosted: they parse, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import paddle_vl_sp

ROOT = Path(__file__).parents[2]
HOSTED = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*") if path.is_file())
FILES = [*HOSTED, "CITATION.cff", "SECURITY.md"]
WORKFLOWS = [name for name in HOSTED if "/workflows/" in name]
# What a runner has, or gets in the same line.
USED = {"bash", "cp", "gh", "grep", "mkdir", "make", "pip", "rm", "twine"}

each_file = pytest.mark.parametrize("name", FILES)


def parsed(name):
    return yaml.safe_load((ROOT / name).read_text())


def commands(name):
    """Every command of a workflow, and what `with`, `if` and the rest of its steps say."""
    steps = [step for job in parsed(name)["jobs"].values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    return [part.strip() for step in steps for part in re.split(r"&&|\n", step.get("run", "")) if part.strip()]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_commands_of_workflows_exist(name):
    """Programs by name, make targets and files of the tree by looking; jobs that are waited for are there."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(name):
        words = command.split()
        assert words[0] in USED, command
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, command
        for word in words[1:]:
            if re.fullmatch(r"[\w./-]+/[\w.-]+\.\w+", word) and not re.match(r"(dist|index)/", word):
                assert (ROOT / word).is_file(), command
    jobs = parsed(name)["jobs"]
    for job in jobs.values():
        assert {*job.get("needs", [])} <= jobs.keys()
        assert all(re.fullmatch(r"[\w.-]+/[\w./-]+@[\w./-]+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_the_issue_form_asks_for_what_doctor_says():
    """The first field, which must be filled in; every field has an id of its own."""
    fields = parsed(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    assert "`python -m paddle_vl_sp doctor`" in fields[0]["attributes"]["description"]
    assert fields[0]["validations"]["required"] is True
    assert len({field["id"] for field in fields}) == len(fields)
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes", "markdown"}


@each_file
def test_what_these_files_name_exists(name):
    """Make targets, switches and pages; no path, host or name of one machine."""
    text = (ROOT / name).read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets
    sources = "".join(path.read_text() for path in Path(paddle_vl_sp.__file__).parent.rglob("*.py"))
    assert all(f'"{switch}"' in sources for switch in re.findall(r"\bPADDLE_VL_SP_[A-Z]+\b", text))
    assert all((ROOT / page).is_file() for page in re.findall(r"\b(?:docs/[\w.-]+|[A-Z]+)\.md\b", text))
    assert not re.search(r"(?<![\w.~-])/(?:work|root|home|tmp|opt|mnt|data)\b|\blocalhost\b|\d+\.\d+\.\d+\.\d+", text)


def test_the_citation_is_one():
    """What the format requires, and the licence of the package."""
    citation = parsed("CITATION.cff")
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
