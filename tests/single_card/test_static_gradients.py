"""Gradients of gradients in static graphs: right, or an error, never a part of them without a word."""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest

from paddle_vl_sp import VisualPlan, add_rows, replace_rows
from paddle_vl_sp.backends import load

CSE = "FLAGS_enable_cse_in_dy2st"
INPUTS = {
    "hidden": np.random.default_rng(0).standard_normal((1, 4, 3)),
    "features": np.random.default_rng(1).standard_normal((3, 3)),  # the second of them is not used
    "update": np.array([1, 3]),
    "gather": np.array([0, 2]),
}
TAKEN = np.array([0, 1, 0, 3])  # which feature each row takes, counted from 1
FORMS = {
    "replace": (replace_rows, {}, TAKEN == 0),  # which hidden states are kept
    "add": (add_rows, {}, TAKEN >= 0),
    "add in place": (add_rows, {"inplace": True}, TAKEN >= 0),
}
needs_operators = pytest.mark.skipif(
    load.backend().name != "op", reason="no custom operators: the header of this report says why"
)


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture
def static_mode():
    paddle.enable_static()
    yield
    paddle.disable_static()


@pytest.fixture
def without_cse():
    paddle.set_flags({CSE: False})
    yield
    paddle.set_flags({CSE: True})


@pytest.fixture
def plain_paddle(monkeypatch):
    monkeypatch.setattr(load, "backend", lambda: load.Backend("python", (), "as on a device without operators"))


def by_rows(form, hidden, features, update, gather):
    function, options, _ = form
    plan = VisualPlan.from_indices(update, gather, (1, 4), 3)
    return function(hidden * hidden, features * features, plan, **options)


def expected(form, order):
    """For hidden and features. With v = out, which is a sum of squares x^2, the gradients are 6 v^2 x, the sum of their
    squares is 36 v^5, its gradients are 360 v^4 x, and so on.
    """
    factor, power = {1: (6, 2), 2: (360, 4), 3: (360 * 360 * 18, 8)}[order]
    is_kept, padded = form[2].reshape([1, 4, 1]), np.concatenate([np.zeros([1, 3]), INPUTS["features"]])
    out = INPUTS["hidden"] ** 2 * is_kept + padded[TAKEN] ** 2
    scale = factor * out**power
    feature_grad = np.zeros([4, 3])
    feature_grad[TAKEN] = scale[0] * padded[TAKEN]
    return scale * INPUTS["hidden"] * is_kept, feature_grad[1:]


def assert_close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert np.allclose(a, b, rtol=1e-10, atol=1e-10)


def squares(grads):
    return sum((grad * grad).sum() for grad in grads)


def gradients_of(way, form, order):
    """For hidden and features, by the static executor: of out^3, then of the sum of the squares of those, and so on."""
    program = paddle.static.Program()
    with paddle.static.program_guard(program):
        given = [paddle.static.data(name, x.shape, str(x.dtype)) for name, x in INPUTS.items()]
        given[0].stop_gradient = given[1].stop_gradient = False
        out = way(form, *given)
        grads = paddle.static.gradients([(out * out * out).sum()], given[:2])
        for _ in range(order - 1):
            grads = paddle.static.gradients([squares(grads)], given[:2])
    return paddle.static.Executor(paddle.CPUPlace()).run(program, INPUTS, grads)


@needs_operators
@pytest.mark.usefixtures("static_mode")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_gradients_in_a_static_program(order, form):
    """To 1e-10 what the formula says."""
    assert_close(gradients_of(by_rows, form, order), expected(form, order))


@needs_operators
@pytest.mark.usefixtures("static_mode")
def test_second_gradients_inside_a_branch(form):
    """To 1e-10, as above: there gradients get copies of what the branch made."""

    def in_a_branch(form, hidden, features, update, gather):
        return paddle.static.nn.cond(
            update.sum() > 0, lambda: by_rows(form, hidden, features, update, gather), lambda: hidden * 1
        )

    assert_close(gradients_of(in_a_branch, form, 2), expected(form, 2))


def penalty(form, hidden, features, update, gather):
    """What a user traces: a gradient inside, and the caller's backward."""
    out = by_rows(form, hidden, features, update, gather)
    grads = paddle.grad([(out * out * out).sum()], [hidden, features], create_graph=True)
    return (grads[0] * grads[0]).sum() + (grads[1] * grads[1]).sum()


def tensors():
    given = [paddle.to_tensor(x) for x in INPUTS.values()]
    given[0].stop_gradient = given[1].stop_gradient = False
    return given


def traced(form):
    def function(hidden, features, update, gather):
        return penalty(form, hidden, features, update, gather)

    return paddle.jit.to_static(function, full_graph=True)


@needs_operators
@pytest.mark.usefixtures("without_cse")
def test_second_gradients_in_a_traced_function(form):
    """To 1e-10 what the formula says."""
    given = tensors()
    traced(form)(*given).backward()
    assert_close([x.grad.numpy() for x in given[:2]], expected(form, 2))


@needs_operators
def test_a_pass_that_spoils_second_gradients_is_refused(form):
    """Refused with the flag, before anything runs; first gradients are not."""
    with pytest.raises(ValueError, match=f"second gradients in a to_static graph need {CSE}=0"):
        traced(form)(*tensors()).backward()
    given = tensors()

    def first(hidden, features, update, gather):
        return (by_rows(form, hidden, features, update, gather) ** 2).sum()

    paddle.jit.to_static(first, full_graph=True)(*given).backward()
    assert given[1].grad[0].abs().min() > 0


@pytest.mark.usefixtures("plain_paddle", "static_mode")
def test_plain_paddle_has_no_second_gradient_in_a_static_program(form):
    """Paddle's error, as in eager mode."""
    with pytest.raises(ValueError, match=r"'pd_op.\w+_grad' has no grad op"):
        gradients_of(by_rows, form, 2)


@pytest.mark.usefixtures("plain_paddle", "without_cse")
def test_plain_paddle_has_no_second_gradient_in_a_traced_function(form):
    """Paddle's error, as in eager mode."""
    with pytest.raises(ValueError, match=r"'pd_op.\w+_grad' has no grad op"):
        traced(form)(*tensors()).backward()


OLD_IR = """
import paddle
from paddle_vl_sp import SeqLayout, VisualPlan, add_rows, plan_visual
from paddle_vl_sp.export import DeepstackAdd, IndexBuilder

paddle.enable_static()
with paddle.static.program_guard(paddle.static.Program()):
    hidden, features = paddle.static.data("hidden", [1, 4, 3]), paddle.static.data("features", [2, 3])
    index, ids = paddle.static.data("index", [2], "int64"), paddle.static.data("ids", [1, 4], "int64")
    for use in (
        lambda: add_rows(hidden, features, VisualPlan.from_indices(index, index, (1, 4), 2)),
        lambda: DeepstackAdd()(hidden, features, index, index),
        lambda: IndexBuilder((1,), sequence_first=True)(ids),
        lambda: plan_visual(ids, (1,), SeqLayout(4), sequence_first=True, padded=True),
    ):
        try:
            use()
        except ValueError as error:
            print(error)
"""


@pytest.mark.parametrize("name", [pytest.param("op", marks=needs_operators), "python"])
def test_graphs_of_the_old_ir_are_refused(name):
    """In a process of its own, where the flag is read: the operators would end it."""
    env = os.environ | {
        "PYTHONPATH": str(load.HERE.parent),
        "FLAGS_enable_pir_api": "0",
        "PADDLE_VL_SP_BACKEND": name,
    }
    command = [sys.executable, "-W", "ignore", "-c", OLD_IR]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    words = "the old IR is not supported: unset FLAGS_enable_pir_api=0"
    assert done.stdout.splitlines()[-4:] == [words] * 4, done.stdout + done.stderr[-2000:]
