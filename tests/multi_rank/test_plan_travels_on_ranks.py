"""Recompute, two runs and wrappers around the text model under sequence parallelism, against one process."""

import os

import pytest
from test_formers import RIGHT, SOME, Ranks, on_one, tiny

from paddle_vl_sp.formers import PlanningCollate, apply_to_qwen3_vl
from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu
from text_wrappers import Recomputed, RecomputedOtherwise, Twice, Wrapped, wrap

WRAPPERS = (Wrapped, Recomputed, RecomputedOtherwise, Twice)


def under(ranks, wrapper, vision_dp=False):
    """Errors of a wrapped model on ranks against the same wrapper on one process."""
    reference = wrap(tiny.tiny_qwen3_vl(), wrapper)
    with apply_to_qwen3_vl():  # for images with videos
        wanted = {kind: ranks.step(reference, ranks.batches[kind]) for kind in SOME}
    model = wrap(ranks.model(), wrapper)
    with apply_to_qwen3_vl(model, vision_dp=vision_dp):
        return ranks.errors(model, SOME, wanted)


def with_a_wrong_row(ranks, spoiled_rank):
    """What this rank says where the loader's row of one rank is wrong, under PADDLE_VL_SP_CHECK=1."""
    collate = PlanningCollate(dict, (tiny.IMAGE, tiny.VIDEO), ranks.nranks, "flattened", tiny.MERGE)
    batch = collate(ranks.batches["several"])
    batch["visual_update_indices"][spoiled_rank] = batch["visual_update_indices"][spoiled_rank].flip(0)
    os.environ["PADDLE_VL_SP_CHECK"] = "1"
    try:
        ranks.step(ranks.model(), batch)
    except ValueError as error:
        return str(error)
    finally:
        del os.environ["PADDLE_VL_SP_CHECK"]
    return ""


def measure(nranks):
    """Everything, in one launch."""
    enable_tensor_parallel_on_cpu()
    ranks = Ranks(nranks, *on_one())
    with apply_to_qwen3_vl():
        found = {wrapper.__name__: under(ranks, wrapper) for wrapper in WRAPPERS}
        found |= {f"Vision DP, {wrapper.__name__}": under(ranks, wrapper, vision_dp=True) for wrapper in WRAPPERS}
        found["wrong row"] = with_a_wrong_row(ranks, spoiled_rank=1)
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(measure, 2, 2, timeout=240)


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.__name__)
@pytest.mark.parametrize("way", ["", "Vision DP, "])
@pytest.mark.parametrize("kind", SOME)
def test_gradients_under_a_wrapper(found, way, wrapper, kind):
    """fp32 rounding: loss and every gradient, on every rank."""
    for rank in found:
        errors = rank[way + wrapper.__name__][kind]
        assert errors["loss"] < 2e-6
        assert errors["tower"] < RIGHT
        assert errors["language"] < RIGHT
        assert errors["more"] == 0


def test_a_wrong_row_of_one_rank_is_an_error_on_all(found):
    """The same words on every rank, before anything is sent."""
    said = [rank["wrong row"] for rank in found]
    assert said[0] == said[1]
    assert "visual_update_indices of rank 1 of the batch is not what its ids ask for" in said[0]
