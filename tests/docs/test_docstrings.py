"""Every public name says what it is, with its tensors' shapes and a short example; the examples run or compile."""

import ast
import doctest
import importlib
import inspect
import re
import textwrap

import numpy as np
import paddle
import pytest
from docs_blocks import ROOT

PACKAGES = ("", "attention", "sequence", "testing", "formers", "export", "audit")
FLEET = {"deepstack": ("VisualDeepstack", "deepstack_layer"), "embedding": ("VisualEmbedding",)}
PLAIN_VALUES = {"__version__"}
WITHOUT_EXAMPLE = {
    "CheckFailed": "an error",
    "DiffersFromUpstream": "an error",
    "RanksFailed": "an error",
    "UpstreamChanged": "an error",
    "VisionShare": "made by share_images, which has one",
}
DRAWN = {  # arrays, or what it is equivalent to
    "SeqLayout",
    "joint_features",
    "plan_visual",
    "plan_visual_local",
    "plans_of_all_ranks",
    "shard_batch",
    "ulysses_attention",
}
WITHOUT_SHAPE = {
    "audit_gradients",
    "register_causes",
    "apply_to_paddleformers",
    "note_forward",
    "stop_balancing",
}  # any, or none
LONGEST = 6  # lines of an example


def public_names():
    """{name: the object}, of all packages that users import from; formers is the last to be asked."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module("paddle_vl_sp" + f".{package}" * bool(package))
        found |= {name: getattr(module, name) for name in module.__all__ if name not in PLAIN_VALUES}
    return found


def docstrings():
    found = {name: inspect.getdoc(value) or "" for name, value in public_names().items()}
    for module, names in FLEET.items():  # without importing it, which needs paddlefleet
        tree = ast.parse((ROOT / "paddle_vl_sp" / "fleet" / f"{module}.py").read_text())
        found |= {node.name: ast.get_docstring(node) or "" for node in tree.body if getattr(node, "name", "") in names}
    return found


@pytest.fixture(scope="module")
def told():
    pytest.importorskip("paddleformers")
    return docstrings()


def blocks_of(text):
    """What follows a `::`, without its indentation."""
    found = re.findall(r"::\n\n((?: {4,}.*\n|\n)+)", text + "\n\n")
    return [textwrap.dedent(block).strip("\n") for block in found]


def session_lines(text):
    return [line for line in text.splitlines() if line.startswith((">>> ", "... "))]


def test_every_name_has_an_example(told):
    """A session, a drawing or a block of Python, of at most six lines."""
    assert set(WITHOUT_EXAMPLE) <= set(told)
    missing = [name for name, text in told.items() if not (blocks_of(text) or session_lines(text))]
    assert [name for name in missing if name not in WITHOUT_EXAMPLE] == []
    for name, text in told.items():
        assert all(len(block.splitlines()) <= LONGEST for block in blocks_of(text)), name
        assert len(session_lines(text)) <= LONGEST, name


def test_blocks_are_python(told):
    """They compile, but for the drawings."""
    for name, text in told.items():
        for block in blocks_of(text) if name not in DRAWN else ():
            compile(block, name, "exec")


def test_whoever_takes_a_tensor_says_its_shape(told):
    """In brackets."""
    for name, value in public_names().items():
        if not callable(value) or name in WITHOUT_SHAPE:
            continue
        try:
            parameters = inspect.signature(value).parameters.values()
        except (TypeError, ValueError):
            continue
        if any(re.search(r"\bTensor\b|\bArray\b", str(each.annotation)) for each in parameters):
            assert re.search(r"\[(\.\.|[A-Z]\w*|n)(, |\])|\[counts", told[name]), name


def test_sessions_run(told):
    """Each prints what it says, on one process, with all public names and numpy and paddle there."""
    names = public_names()
    names |= {"np": np, "paddle": paddle}
    runner = doctest.DocTestRunner(verbose=False)
    complaints, ran = [], 0
    for name in told.keys() & names.keys():
        test = doctest.DocTestParser().get_doctest(told[name], dict(names), name, None, 0)
        ran += bool(test.examples)
        runner.run(test, out=complaints.append)
    assert not complaints, "".join(complaints)
    assert ran > 20
