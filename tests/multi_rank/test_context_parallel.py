"""Context parallelism in PaddleFormers' plain models: loss and every gradient, summed over the ranks, are those of one
process within fp32 rounding (1e-5). On 2, 3 and 4 ranks, each kind of attention.
"""

import pytest
from context_cases import CASES, CUT, FAULTS, on_four, on_ranks, on_two

from paddle_vl_sp.testing import run_ranks

KINDS = ("gather", "ring", "ulysses")
NAMES = [case.name for case in CASES]
FEW = ["images", "images and videos, padded to divide", "packed rows with their own segments and padding"]
WITHIN = [*FEW[:2], "text only", "Qwen2.5-VL", "shared tower"]


@pytest.fixture(scope="module")
def of_two():
    return run_ranks(on_two, 2, KINDS, NAMES, timeout=400)


@pytest.fixture(scope="module")
def of_three():
    return run_ranks(on_ranks, 3, ("gather", "ring", "auto"), FEW, timeout=200)


@pytest.fixture(scope="module")
def of_four():
    return run_ranks(on_four, 4, FEW, WITHIN, timeout=400)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks(of_two, name, kind):
    for rank in of_two:
        assert max(rank["right"][name, kind]) < 1e-5


@pytest.mark.parametrize("kind", ["gather", "ring", "auto"])
@pytest.mark.parametrize("name", FEW)
def test_three_ranks(of_three, name, kind):
    for rank in of_three:
        assert max(rank[name, kind]) < 1e-5


@pytest.mark.parametrize("name", FEW)
def test_ring_and_ulysses_on_four_ranks(of_four, name):
    for rank in of_four:
        assert max(rank["both"][name]) < 1e-5


@pytest.mark.parametrize("name", WITHIN)
def test_sequence_parallelism_inside(of_four, name):
    for rank in of_four:
        assert max(rank["within"][name]) < 1e-5


@pytest.mark.parametrize("fault", [*FAULTS, "gradients not summed"])
def test_faults_are_seen(of_two, fault):
    """What a wrong wiring does to the same figures: a thousand times the bar and more."""
    assert max(of_two[0]["faults"][fault]) > 1e-2


def test_the_audit_says_the_same(of_two):
    """Without a reference: each rank's gradients are partial, and their sums are whole."""
    for rank in of_two:
        verdicts, is_ok = rank["audit"]
        assert is_ok == [False, True]
        assert set(verdicts[0]) <= {"partial", "too small to judge"}
        assert set(verdicts[1]) <= {"whole", "too small to judge"}


def test_a_trainer_with_both_axes_is_not_audited(of_four):
    """Tensor and sep parallelism together: refused by name on every rank, and nothing is run."""
    for rank in of_four:
        found, words = rank["audit"]
        assert found is None
        assert "not audited: tensor and sep parallelism together are two groups" in words


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CUT)
def test_ids_that_are_cut_already(of_two, name, kind):
    """Each rank gives its own part of ids, labels and positions."""
    for rank in of_two:
        assert max(rank["cut"][name, kind]) < 1e-5


def test_rows_go_to_their_owners_alone(of_two):
    """A shared tower's features: on each rank exactly the rows that it places, not those of the whole batch."""
    (first,), (second,) = (rank["arriving"] for rank in of_two)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert min(first[0], second[0]) > 0


def test_checked(of_two):
    """PADDLE_VL_SP_CHECK=1: as without it; batches that differ between the ranks are refused on both."""
    for rank in of_two:
        found, message = rank["checked"]
        assert max(found) < 1e-5
        assert "the ranks of one group must hold the same input_ids" in message
