"""Test modules share oracle.py and strategies.py; the report says which implementation serves."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("GLOG_minloglevel", "2")


def pytest_report_header():
    from paddle_vl_sp import backend

    fleet = importlib.util.find_spec("paddlefleet")
    return [
        f"paddle_vl_sp: {backend()}",
        f"paddlefleet: {fleet.origin if fleet else 'not installed, the test double in tests/fleet/double serves'}",
    ]


@pytest.fixture(params=["op", "python"])
def implementation(request, monkeypatch):
    """Runs the test with the custom operators, then with plain Paddle; says so where there are no operators."""
    from paddle_vl_sp import ops, reference

    if request.param == "op" and ops.backend().name != "op":
        pytest.skip("no custom operators: the header of this report says why")
    if request.param == "python":
        monkeypatch.setattr(ops, "_serving", lambda _: reference)
    return request.param
