"""audit_gradients on PaddleFormers' whole fleet Qwen3-VL on four ranks: upstream's faults are found, with their causes,
and nothing is named of the model with one line.
"""

import re

import pytest

pytest.importorskip("paddlefleet", reason="the whole fleet class is built over an installed paddlefleet")

import audit_fleet

from paddle_vl_sp import audit_gradients
from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel

pytestmark = pytest.mark.timeout(600)
LOOKED_AT = re.compile(r"(merger.*|layers\.1\..*o_proj|language_model\.[12]\..*(norm|o_proj)|lm_head)\.weight")


def on_ranks(nranks):
    """{fault: (names that are wrong, all verdicts, the table)} of the parameters looked at."""
    found = {}
    with enable_tensor_parallel_on_cpu():
        group = init_tensor_parallel(nranks)
        for fault in ("", *audit_fleet.FAULTS):
            with audit_fleet.fleet_model(fault, group) as (loss, model):
                named = [pair for pair in model.named_parameters() if LOOKED_AT.search(pair[0])]
                audit = audit_gradients(loss, named, group)
                found[fault] = {finding.name for finding in audit.wrong}, audit.verdicts, str(audit)
    return found


@pytest.fixture(scope="module")
def found():
    ranks = run_ranks(on_ranks, 4, 4, timeout=500)
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


def test_nothing_is_named_of_the_model_with_one_line(found):
    """Under TP-SP; three of four at least are judged."""
    wrong, verdicts, table = found[""]
    assert wrong == set(), table
    assert list(verdicts.values()).count("too small to judge") <= len(verdicts) / 4, table


@pytest.mark.parametrize("fault", audit_fleet.FAULTS)
def test_upstreams_faults_are_found(found, fault):
    """Where they are and nowhere else; the table has the cause."""
    wrong, _, table = found[fault]
    part = ".vision_model." if fault == "upstream" else "_norm.weight"
    assert wrong, table
    assert all(part in name for name in wrong), table
    assert audit_fleet.FAULTS[fault] in table
