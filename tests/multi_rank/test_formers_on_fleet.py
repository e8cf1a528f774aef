"""PaddleFormers' layer with its methods replaced, behind PaddleFleet's embedding and behind ours, on real ranks.

Whoever made the plan completed the gradients: they are summed once however the two are combined.
"""

from unittest import mock

import paddle.distributed as dist
import pytest
import test_fleet as fleet_cases

from groups import topology_of
from paddle_vl_sp.formers import deepstack
from paddle_vl_sp.formers.changes import replace, revert
from paddle_vl_sp.formers.families import qwen3_vl_fleet
from paddle_vl_sp.testing import run_ranks


def replaced_layer():
    layer = fleet_cases.whole_layer()
    replace(layer, "_deepstack_process", deepstack.deepstack)
    replace(layer, "forward", qwen3_vl_fleet.layer_forward)
    return layer


def worst_errors():
    """Per case, embedding and wiring, the worst gradient error of this rank."""
    fleet_cases.use_paddlefleet()
    fleet_cases.whole_layer, fleet_cases.formers_layer = fleet_cases.formers_layer, replaced_layer
    found = {}
    with fleet_cases.one_group():
        for case in fleet_cases.CASES:
            truth = fleet_cases.gradients(case, sequence_parallel=False)
            # PaddleFleet's own embedding raises on images and videos together
            for merge in ("embedding",) if case == "image and video" else ("embedding", "upstream alone"):
                for wiring, given in fleet_cases.WIRINGS.items():
                    groups = topology_of(dist.get_group(0), given.get("stages", 1))
                    with mock.patch("paddle.distributed.fleet.get_hybrid_communicate_group", return_value=groups):
                        got = fleet_cases.counted_gradients(case, merge=merge, **given)
                    found[case, merge, wiring] = fleet_cases.worst_error(got, truth)
    revert()
    return found


@pytest.mark.parametrize("nranks", [2])
def test_gradients_are_summed_once(nranks):
    """fp32, relative error below 2e-6 of every parameter, on every rank, for every embedding and wiring."""
    by_rank = run_ranks(worst_errors, nranks, timeout=120)
    assert len(by_rank[0]) == 21
    for combination in by_rank[0]:
        assert max(found[combination] for found in by_rank) < 2e-6, combination
