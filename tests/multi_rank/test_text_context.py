"""Context parallelism in PaddleFormers' text-only models: loss and every gradient, summed over the ranks, are those of
one process within fp32 rounding (1e-5; 1e-4 for the decays of Gated DeltaNet, small sums of many terms), each kind of
attention. Packed rows are as their segments run one by one.
"""

import pytest
from text_cases import CASES, FAULTS, of_a_product, on_ranks

from paddle_vl_sp.testing import run_ranks

KINDS = ("gather", "ring", "ulysses")
NAMES = [case.name for case in CASES]
PACKED = [case.name for case in CASES if case.segments]
FEW = ["Qwen3, packed, with padding", "Qwen3-Next, packed, with padding"]


@pytest.fixture(scope="module")
def of_two():
    return run_ranks(on_ranks, 2, KINDS, timeout=240)


@pytest.fixture(scope="module")
def of_four():
    return run_ranks(of_a_product, 4, FEW, timeout=200)


def check(errors):
    assert max(errors.loss, errors.others) < 1e-5
    assert errors.decay < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks(of_two, name, kind):
    for errors, _ in of_two:
        check(errors[name, kind])


@pytest.mark.parametrize("name", FEW)
def test_ring_and_ulysses_on_four_ranks(of_four, name):
    for errors in of_four:
        check(errors[name])


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_upstream(of_two, name):
    """In one process upstream's attention keeps segments apart; its linear attention does not, 1e-2 and more off."""
    errors = of_two[0][0][name, "upstream"]
    if "Next" in name:
        assert errors.others > 1e-2
    else:
        check(errors)


@pytest.mark.parametrize("fault", [*FAULTS, "gradients not summed"])
def test_faults_are_seen(of_two, fault):
    """What a wrong wiring does to the same figures: a thousand times the bar and more."""
    assert of_two[0][1][fault].others > 1e-2
