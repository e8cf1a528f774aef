"""Runs these tests against the installed PaddleFleet, or the double where there is none; the report says which."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from stub_paddlefleet import drop_double, use_paddlefleet

IS_DOUBLE = importlib.util.find_spec("paddlefleet") is None


@pytest.fixture(scope="module", autouse=True)
def paddlefleet():
    """The package under the subclasses; gone again after each module."""
    use_paddlefleet()
    yield importlib.import_module("paddlefleet")
    if IS_DOUBLE:
        drop_double()


@pytest.fixture(params=["newer", "older"] if IS_DOUBLE else ["installed"])
def shape(request, monkeypatch, paddlefleet):
    """The two known shapes of GPTEmbedding; an installed package has one of them."""
    if IS_DOUBLE:
        from paddlefleet.models.gpt.gpt_embedding import GPTEmbedding

        monkeypatch.setattr(GPTEmbedding, "older", request.param == "older")
    return request.param
