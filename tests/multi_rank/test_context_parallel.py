"""Context parallelism in PaddleFormers' plain models: loss and every gradient, summed over the ranks, are those of one
process within fp32 rounding (1e-5). On 2, 3 and 4 ranks, each kind of attention.
"""

import pytest
from context_cases import CASES, FAULTS, of_a_product, of_sequence_parallelism, on_ranks, with_faults

from paddle_vl_sp.testing import run_ranks

KINDS = ("gather", "ring", "ulysses")
NAMES = [case.name for case in CASES]
FEW = ["images", "images and videos, padded to divide", "packed rows with their own segments and padding"]


@pytest.fixture(scope="module")
def of_two():
    return run_ranks(on_ranks, 2, KINDS, NAMES, timeout=240)


@pytest.fixture(scope="module")
def of_three():
    return run_ranks(on_ranks, 3, ("gather", "ring", "auto"), FEW, timeout=200)


@pytest.fixture(scope="module")
def of_four():
    return run_ranks(of_a_product, 4, FEW, timeout=200)


@pytest.fixture(scope="module")
def within():
    return run_ranks(of_sequence_parallelism, 4, [*FEW[:2], "text only", "Qwen2.5-VL"], timeout=200)


@pytest.fixture(scope="module")
def faulty():
    return run_ranks(with_faults, 2, timeout=120)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks(of_two, name, kind):
    for rank in of_two:
        assert max(rank[name, kind]) < 1e-5


@pytest.mark.parametrize("kind", ["gather", "ring", "auto"])
@pytest.mark.parametrize("name", FEW)
def test_three_ranks(of_three, name, kind):
    for rank in of_three:
        assert max(rank[name, kind]) < 1e-5


@pytest.mark.parametrize("name", FEW)
def test_ring_and_ulysses_on_four_ranks(of_four, name):
    for rank in of_four:
        assert max(rank[name]) < 1e-5


@pytest.mark.parametrize("name", [*FEW[:2], "text only", "Qwen2.5-VL"])
def test_sequence_parallelism_inside(within, name):
    for rank in within:
        assert max(rank[name]) < 1e-5


@pytest.mark.parametrize("fault", [*FAULTS, "gradients not summed"])
def test_faults_are_seen(faulty, fault):
    """What a wrong wiring does to the same figures: a thousand times the bar and more."""
    assert max(faulty[0]["none"]) < 1e-5
    assert max(faulty[0][fault]) > 1e-2
