"""An audit puts back the states of PaddleFleet's own generators, so that every forward draws the same."""

import sys
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F  # noqa: N812

from paddle_vl_sp import audit_gradients

NAME = "audited"
MODULE = "paddlefleet.tensor_parallel.random"


@pytest.fixture
def tracker(paddlefleet):
    from paddlefleet.tensor_parallel.random import get_cuda_rng_tracker

    paddle.set_device("cpu")
    found = get_cuda_rng_tracker()
    if not hasattr(found, "add"):
        pytest.skip("this PaddleFleet's tracker is a stand-in that keeps no states")
    if not isinstance(found, _double()) and not paddle.is_compiled_with_cuda():
        pytest.skip("PaddleFleet's own tracker has generators of a GPU alone")
    before = found.get_states()
    found.add(NAME, 90_001)
    yield found
    found.set_states(before)


def _double():
    """The class of the double, or nothing."""
    return getattr(sys.modules[MODULE], "CudaRNGStatesTracker", ()) if "double" in sys.modules[MODULE].__file__ else ()


def dropped(tracker):
    """A loss whose dropout draws by the tracker, and its weight."""
    rng = np.random.default_rng(3)
    weight = paddle.to_tensor(rng.standard_normal((8, 6)).astype("float32"), stop_gradient=False)
    x = paddle.to_tensor(rng.standard_normal((10, 8)).astype("float32"))

    def loss():
        with tracker.fork(NAME):
            hidden = F.dropout(paddle.matmul(x, weight), 0.4)
        return hidden.square().mean()

    return loss, [("weight", weight)]


def drawn(tracker):
    with tracker.fork(NAME):
        return paddle.rand([3]).numpy()


def test_every_forward_draws_the_same_and_then_as_if_nothing_had_been(tracker):
    """The verdict of a loss without noise; the next numbers bit for bit, after an error too."""
    states = tracker.get_states()
    wanted = drawn(tracker)
    tracker.set_states(states)
    loss, named = dropped(tracker)
    audit = audit_gradients(loss, named, None)
    assert audit.verdicts == {"weight": "whole"}
    assert audit.noise < 1e-5
    calls = []

    def fails():
        calls.append(loss())
        if len(calls) == 3:
            raise KeyError("no batch")
        return calls[-1]

    with pytest.raises(KeyError, match="no batch"):
        audit_gradients(fails, named, None)
    assert np.array_equal(drawn(tracker), wanted)


@pytest.mark.parametrize("module", [None, SimpleNamespace(), SimpleNamespace(get_cuda_rng_tracker=object)])
def test_a_tracker_without_states_is_left_alone(monkeypatch, module):
    """Not imported, of another name, or without get_states: the audit goes on."""
    monkeypatch.setitem(sys.modules, MODULE, module)
    weight = paddle.to_tensor([1.0, 2.0], stop_gradient=False)
    assert audit_gradients(lambda: weight.square().sum(), [("weight", weight)], None).ok
