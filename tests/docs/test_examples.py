"""The examples: the script runs and says what is right, the YAML has keys that PaddleFormers knows."""

import dataclasses
import re

import pytest
from docs_blocks import ROOT, python

from paddle_vl_sp.settings import CONTEXT_PARALLEL, SWITCHES

EXAMPLES = ROOT / "examples"


def test_context_parallel():
    """Loss and every gradient within fp32 of one process, of each kind; what was chosen is said."""
    pytest.importorskip("paddleformers")
    done = python(EXAMPLES / "context_parallel.py")
    assert done.returncode == 0, done.stderr[-3000:]
    (loss,) = re.findall(r"^one process: loss (\S+)$", done.stdout, re.MULTILINE)
    pattern = r"^two ranks, (\w+): loss (\S+), worst gradient error (\S+)\n    (\w+) over 2 ranks: \w+"
    found = re.findall(pattern, done.stdout, re.MULTILINE)
    assert [(asked, chosen) for asked, _, _, chosen in found] == [
        ("auto", "ulysses"),
        ("gather", "gather"),
        ("ring", "ring"),
        ("ulysses", "ulysses"),
    ]
    for _, shared, error, _ in found:
        assert abs(float(shared) - float(loss)) < 1e-5
        assert float(error) < 1e-5


def test_the_yaml_says_what_paddleformers_knows():
    """Its keys; the plugin's path, which is relative to the repository; the words of the switch."""
    yaml = pytest.importorskip("yaml")
    arguments = pytest.importorskip("paddleformers.cli.hparams.parser")
    text = (EXAMPLES / "sft_context_parallel.yaml").read_text()
    said = yaml.safe_load(text)
    assert (ROOT / said.pop("custom_register_path")).is_file()
    known = {field.name for each in arguments._TRAIN_ARGS for field in dataclasses.fields(each)}
    assert set(said) <= known
    (words,) = re.findall(rf"export {CONTEXT_PARALLEL}=(.*);", text)
    assert set(re.findall(r"\w+", words)) - {"or"} == set(SWITCHES[CONTEXT_PARALLEL]) - {"0"}


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert {name for name in names if f"examples/{name}`" in listed} == names
