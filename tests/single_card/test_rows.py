"""replace_rows and add_rows: movement bit-exact, sums rounded once; gradients those of the reference and of a limit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import paddle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paddle.autograd import PyLayer

import oracle
from arrays import drawn, same_bits
from paddle_vl_sp import SeqLayout, VisualPlan, add_rows, plan_visual, replace_rows
from paddle_vl_sp.backends import load, operators
from strategies import IMAGE, VIDEO, batches, cuts

KINDS = (IMAGE, VIDEO)
DTYPES = ["float32", "float16", "bfloat16"]
ROWS = {"replace": replace_rows, "add": add_rows}


def a_plan(sequence_first=False, padded=False, seed=0, batch=2, seq_len=12, sp_size=2, sp_rank=1):
    mask = np.random.default_rng(seed).random((batch, seq_len)) < 0.5
    layout = SeqLayout(seq_len, sp_size=sp_size, sp_rank=sp_rank)
    return plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=sequence_first, padded=padded), mask


@pytest.mark.usefixtures("implementation")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_plan_then_apply_is_scatter_then_cut(data):
    """Bit-exact for both: the full sequence written token by token, then cut, against this rank's rows alone."""
    cut = data.draw(cuts(max_units=3))
    ids = data.draw(batches(cut))
    sequence_first, padded = data.draw(st.booleans()), data.draw(st.booleans())
    visual = np.isin(ids, KINDS)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    width = data.draw(st.integers(1, 9))
    full = rng.standard_normal((*ids.shape, width)).astype(np.float32)
    features = rng.standard_normal((visual.sum(), width)).astype(np.float32)
    for layout in cut.layouts():
        positions = layout.positions()
        plan = plan_visual(paddle.to_tensor(ids), KINDS, layout, sequence_first=sequence_first, padded=padded)
        hidden = paddle.to_tensor(oracle.cut(full, positions, sequence_first))
        for name, write in (("replace", lambda row, feature: feature), ("add", lambda row, feature: row + feature)):
            expected = oracle.full_then_cut(full, features, visual, positions, sequence_first, write)
            got = ROWS[name](hidden, paddle.to_tensor(features), plan)
            assert np.array_equal(got.numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("feature_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS)
def test_values_and_gradients_in_every_pair_of_types(name, dtype, feature_dtype, sequence_first, padded):
    """Bit-exact against float32 followed by one cast: features first rounded to hidden's dtype, sums rounded once."""
    plan, mask = a_plan(sequence_first, padded)
    update, gather = plan.update_indices.numpy(), plan.gather_indices.numpy()
    update, gather = update[update >= 0], gather[gather >= 0]
    hidden = drawn([*plan.row_shape, 7], dtype, 1, stop_gradient=False)
    features = drawn([int(mask.sum()), 7], feature_dtype, 2, stop_gradient=False)
    out_grad = drawn(hidden.shape, dtype, 3)

    out = ROWS[name](hidden, features, plan)
    paddle.autograd.backward([out], [out_grad])

    rows = hidden.astype("float32").numpy().reshape(-1, 7)
    picked = features.astype(dtype).astype("float32").numpy()[gather]
    rows[update] = picked if name == "replace" else rows[update] + picked
    expected = paddle.to_tensor(rows.reshape(hidden.shape)).astype(dtype)
    assert out.dtype == hidden.dtype
    assert same_bits(out, expected)

    flat_grad = out_grad.astype("float32").numpy().reshape(-1, 7)
    feature_grad = np.zeros([int(mask.sum()), 7], np.float32)
    feature_grad[gather] = flat_grad[update]
    assert features.grad.dtype == features.dtype
    assert same_bits(features.grad, paddle.to_tensor(feature_grad).astype(feature_dtype))
    if name == "replace":
        flat_grad[update] = 0
    assert same_bits(hidden.grad, paddle.to_tensor(flat_grad.reshape(hidden.shape)).astype(dtype))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", ROWS)
def test_gradients_against_finite_differences(name):
    """float64, central differences of a smooth loss: within 1e-6."""
    plan, mask = a_plan()
    weight = drawn([*plan.row_shape, 3], "float64", 5)
    points = [drawn([*plan.row_shape, 3], "float64", 6, False), drawn([int(mask.sum()), 3], "float64", 7, False)]

    def loss(hidden, features):
        return (paddle.sin(ROWS[name](hidden, features, plan)) * weight).sum()

    loss(*points).backward()
    for which, point in enumerate(points):
        slope = np.zeros(point.shape)
        for place in np.ndindex(*point.shape):
            step = np.zeros(point.shape)
            step[place] = 1e-6
            ends = [[p.detach() + (sign * step if i == which else 0) for i, p in enumerate(points)] for sign in (1, -1)]
            slope[place] = (loss(*ends[0]).item() - loss(*ends[1]).item()) / 2e-6
        assert np.abs(slope - point.grad.numpy()).max() < 1e-6


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("leading", ["row_shape", "flat"])
def test_any_leading_shape_of_the_plan(leading):
    """Bit-exact against numpy: the plan's own shape, or its rows in one."""
    plan, mask = a_plan()
    shape = [*plan.row_shape, 4] if leading == "row_shape" else [plan.num_rows, 4]
    hidden, features = drawn(shape, "float32"), drawn([int(mask.sum()), 4], "float32", 1)
    expected = hidden.numpy().reshape(plan.num_rows, 4)
    expected[plan.update_indices.numpy()] += features.numpy()[plan.gather_indices.numpy()]
    got = add_rows(hidden, features, plan)
    assert got.shape == shape
    assert np.array_equal(got.numpy().ravel(), expected.ravel())


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("num_rows", [0, 4])
@pytest.mark.parametrize("num_features", [0, 3])
@pytest.mark.parametrize("name", ROWS)
def test_no_visual_token_stays_in_the_graph(name, num_rows, num_features):
    """Bit-exact: hidden unchanged; the gradient of the features is zero, not missing."""
    nothing = paddle.zeros([0], dtype="int64")
    plan = VisualPlan.from_indices(nothing, nothing, [1, num_rows], num_features)
    hidden = drawn([1, num_rows, 5], "float32", 0, stop_gradient=False)
    features = drawn([num_features, 5], "float32", 1, stop_gradient=False)
    out = ROWS[name](hidden, features, plan)
    assert np.array_equal(out.numpy(), hidden.numpy())
    (out * 2).sum().backward()
    assert features.grad is not None
    assert features.grad.shape == [num_features, 5]
    assert not features.grad.numpy().any()
    assert (hidden.grad.numpy() == 2).all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("width", [0, 1, 3, 8, 1000])
def test_any_width(width):
    """Bit-exact against numpy, from nothing to more than a block of threads."""
    plan, mask = a_plan(sequence_first=True)
    hidden, features = drawn([*plan.row_shape, width], "float32"), drawn([int(mask.sum()), width], "float32", 1)
    expected = hidden.numpy().reshape(plan.num_rows, width)
    expected[plan.update_indices.numpy()] += features.numpy()[plan.gather_indices.numpy()]
    assert np.array_equal(add_rows(hidden, features, plan).numpy().reshape(plan.num_rows, width), expected)


@pytest.mark.usefixtures("implementation")
class TestInPlace:
    """add_rows(inplace=True): the values and gradients of the copy, in the tensor that was given."""

    @pytest.mark.parametrize("hidden_needs", [False, True])
    @pytest.mark.parametrize("features_need", [False, True])
    @pytest.mark.parametrize("through", ["result", "given"])
    def test_gradients_reach_both_through_either_name(self, hidden_needs, features_need, through):
        """Bit-exact with the copy; none where none is needed."""
        plan, mask = a_plan()
        grads = []
        for inplace in (False, True):
            source = drawn([*plan.row_shape, 4], "float32", 1, stop_gradient=not hidden_needs)
            features = drawn([int(mask.sum()), 4], "float32", 2, stop_gradient=not features_need)
            hidden = source * 2
            aside = (hidden * 3).sum()
            out = add_rows(hidden, features, plan, inplace=inplace)
            assert (out is hidden) == inplace
            used = hidden if inplace and through == "given" else out
            loss = (used * used).sum() + aside
            if hidden_needs or features_need:
                loss.backward()
            grads.append([used.numpy(), *(None if x.grad is None else x.grad.numpy() for x in (source, features))])
        assert (grads[0][1] is not None) == hidden_needs
        assert (grads[0][2] is not None) == features_need
        for copied, in_place in zip(*grads, strict=True):
            assert np.array_equal(copied, in_place)

    def test_a_leaf_that_needs_a_gradient_is_refused_before_it_changes(self):
        """Refused, and bit-exact what it was."""
        plan, mask = a_plan()
        hidden = drawn([*plan.row_shape, 4], "float32", 1, stop_gradient=False)
        before = hidden.numpy()
        with pytest.raises(ValueError, match="a leaf that needs a gradient"):
            add_rows(hidden, drawn([int(mask.sum()), 4], "float32"), plan, inplace=True)
        assert np.array_equal(hidden.numpy(), before)

    def test_a_value_another_operation_saved_is_refused_in_the_backward_pass(self):
        """Paddle's own error about versions."""
        plan, mask = a_plan()
        source = drawn([*plan.row_shape, 4], "float32", 1, stop_gradient=False)
        hidden = source * 1
        square = hidden * hidden
        add_rows(hidden, drawn([int(mask.sum()), 4], "float32"), plan, inplace=True)
        with pytest.raises(Exception, match="version"):
            square.sum().backward()

    def test_a_view_that_is_not_contiguous_is_written_too(self):
        """Bit-exact with the copy, in the tensor that was given."""
        plan, mask = a_plan(sequence_first=True)
        features = drawn([int(mask.sum()), 4], "float32", 2)
        batch_first = drawn([plan.row_shape[1], plan.row_shape[0], 4], "float32", 1)
        hidden = batch_first.transpose([1, 0, 2])
        assert not hidden.is_contiguous()
        expected = add_rows(hidden.clone(), features, plan)
        assert add_rows(hidden, features, plan, inplace=True) is hidden
        assert np.array_equal(hidden.numpy(), expected.numpy())


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("way", [replace_rows, add_rows])
def test_strided_tensors_are_read_as_what_they_hold(way):
    """Bit-exact with contiguous ones: hidden states, features and the gradient that comes back, all transposed."""
    plan, mask = a_plan(sequence_first=True)
    sources = [drawn([4, *plan.row_shape[::-1]], "float32", 1), drawn([4, int(mask.sum())], "float32", 2)]
    out_grad = drawn([4, *plan.row_shape[::-1]], "float32", 3)
    results = []
    for strided in (True, False):
        views = [x.transpose(list(range(x.ndim))[::-1]) for x in (*sources, out_grad)]
        assert not any(view.is_contiguous() for view in views)
        hidden, features, grad = [view.detach() if strided else view.contiguous().detach() for view in views]
        hidden.stop_gradient = features.stop_gradient = False
        out = way(hidden, features, plan)
        results.append([x.numpy() for x in (out, *paddle.grad([out], [hidden, features], [grad]))])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("inplace", [False, True])
def test_recompute_gives_the_same_gradients(inplace):
    """Bit-exact with and without, copied and in place."""
    from paddle.distributed.fleet.utils import recompute

    plan, mask = a_plan()
    weight = drawn([4, 4], "float32", 3, stop_gradient=False)
    grads = []
    for call in (lambda fn, *args: fn(*args), recompute):
        hidden = drawn([*plan.row_shape, 4], "float32", 1, stop_gradient=False)
        features = drawn([int(mask.sum()), 4], "float32", 2, stop_gradient=False)
        out = call(lambda h, f: add_rows(paddle.matmul(h, weight), f, plan, inplace=inplace).tanh(), hidden, features)
        weight.clear_gradient()
        out.sum().backward()
        grads.append([x.grad.numpy() for x in (hidden, features, weight)])
    for plain, recomputed in zip(*grads, strict=True):
        assert np.array_equal(plain, recomputed)


# What a hook may keep of a gradient: the tensor, or a part of its memory by another name.
KEEP = {
    "hook": lambda grad: grad,
    "detached": lambda grad: grad.detach(),
    "flat view": lambda grad: grad.reshape([-1]),
    "slice": lambda grad: grad[0],
    "numpy view": lambda grad: np.from_dlpack(grad.detach()),
}


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("features_need", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kept_by", ["retain_grads", *KEEP])
def test_a_kept_gradient_is_not_added_to(inplace, features_need, kept_by):
    """Exact: hidden has a second user, and the gradient of the result is kept: the sum must not end up in it."""
    plan, mask = a_plan()
    source = drawn([*plan.row_shape, 4], "float32", 1, stop_gradient=False)
    hidden = source * 1
    aside = (hidden * 5).sum()
    features = drawn([int(mask.sum()), 4], "float32", stop_gradient=not features_need)
    out = add_rows(hidden, features, plan, inplace=inplace)
    kept = []
    if kept_by == "retain_grads":
        out.retain_grads()
    else:
        out.register_hook(lambda grad: kept.append(KEEP[kept_by](grad)))
    (out.sum() + aside).backward()
    (grad,) = kept or [out.grad]
    assert (np.asarray(grad) == 1).all()
    assert (source.grad.numpy() == 6).all()


class Tap(PyLayer):
    """The identity, which notes where the gradients that pass are in memory."""

    addresses: ClassVar = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Tap.addresses.append(grad.data_ptr())
        return grad


def gradient_is_copied(inplace):
    """Whether add_rows copies a gradient that no user keeps, instead of returning it."""
    plan, mask = a_plan()
    hidden = Tap.apply(drawn([*plan.row_shape, 4], "float32", 1, stop_gradient=False))
    features = drawn([int(mask.sum()), 4], "float32", 2, stop_gradient=False)
    Tap.addresses.clear()
    Tap.apply(add_rows(hidden, features, plan, inplace=inplace)).sum().backward()
    of_out, of_hidden = Tap.addresses
    return of_out != of_hidden


@pytest.mark.skipif(load.backend().name != "op", reason="no custom operators: the header of this report says why")
class TestGradientsWithoutACopy:
    """The gradient that add_rows receives is what it returns, where its references show that no user keeps it."""

    @pytest.fixture
    def library(self):
        """The library, which learns the references again when the test is over."""
        library = load.library_path(load.HERE)
        yield library
        operators.learn_references(library)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_a_gradient_that_no_user_keeps_is_not_copied(self, inplace):
        assert not gradient_is_copied(inplace)

    @pytest.mark.parametrize(
        "counted", [lambda keep: 4, lambda keep: 5 - keep], ids=["kept or not, as many", "each way its own"]
    )
    def test_every_gradient_is_copied_where_references_say_nothing(self, library, counted, monkeypatch, caplog):
        calls = []

        def references(operators, add, keep):
            calls.append(add)
            return counted(len(calls) == 1)

        monkeypatch.setattr(operators, "_references", references)
        monkeypatch.setattr("paddle_vl_sp.log._warned", set())
        with caplog.at_level("WARNING", logger="paddle_vl_sp"):
            operators.learn_references(library)
        assert "every gradient of add_rows is copied" in caplog.text
        assert gradient_is_copied(inplace=False)
        assert gradient_is_copied(inplace=True)

    @pytest.mark.parametrize("loaded", ["without gradients", "in a static graph"])
    def test_references_are_learnt_in_any_mode(self, library, loaded):
        operators.ctypes.CDLL(str(library)).vlsp_set_unshared_references(0)
        assert gradient_is_copied(inplace=False)
        if loaded == "without gradients":
            with paddle.no_grad():
                operators.learn_references(library)
        else:
            paddle.enable_static()
            try:
                operators.learn_references(library)
                assert not paddle.in_dynamic_mode()
            finally:
                paddle.disable_static()
        assert not gradient_is_copied(inplace=False)


HUGE_PAGES = """
import re, sys
from pathlib import Path

import paddle

from paddle_vl_sp import SeqLayout, add_rows, plan_visual, replace_rows

def asked(tensor):  # the flag "hg" of its mapping
    at = tensor.data_ptr() + (1 << 21)
    maps = Path("/proc/self/smaps").read_text()
    for begin, end, flags in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", maps, re.M | re.S):
        if int(begin, 16) <= at < int(end, 16):
            return "hg" in flags.split()

plan = plan_visual(paddle.ones([1, 64], dtype="bool"), None, SeqLayout(64), sequence_first=False)
hidden, features, grad = (paddle.ones(shape) for shape in [[1, 64, 1 << 17], [64, 1 << 17], [1, 64, 1 << 17]])
hidden.stop_gradient = features.stop_gradient = False
out = {"add": add_rows, "replace": replace_rows}[sys.argv[1]](hidden, features, plan)
grads = paddle.grad([out], [hidden, features], [grad])
print(*map(asked, [hidden, grad, out, *grads]))
"""


@pytest.mark.skipif(load.backend().name != "op", reason="no custom operators: the header of this report says why")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a Linux without huge pages")
@pytest.mark.parametrize("name", ROWS)
def test_large_results_ask_for_huge_pages(name):
    """In a process whose memory is mapped anew. Paddle's own tensors do not, as the gradient that add passes on."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-W", "ignore", "-c", HUGE_PAGES, name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"False False True {name == 'replace'} True"


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", [*ROWS, "add in place"])
def test_no_grad_makes_no_graph(name):
    """The result is a leaf that needs no gradient."""
    plan, mask = a_plan()
    weight = drawn([4], "float32", 1, stop_gradient=False)
    features = drawn([int(mask.sum()), 4], "float32", 2, stop_gradient=False)
    with paddle.no_grad():
        hidden = drawn([*plan.row_shape, 4], "float32", 3) * weight
        out = (
            add_rows(hidden, features, plan, inplace=True)
            if name == "add in place"
            else ROWS[name](hidden, features, plan)
        )
    assert out.stop_gradient
    assert out.is_leaf


@pytest.mark.usefixtures("implementation")
def test_adding_in_place_without_grad_to_what_has_a_graph():
    """As Paddle's own in-place operations: the value changes, the graph stays that of the old value."""
    plan, mask = a_plan()
    source = drawn([*plan.row_shape, 4], "float32", 1, stop_gradient=False)
    hidden = source * 2
    with paddle.no_grad():
        add_rows(hidden, drawn([int(mask.sum()), 4], "float32", 2, stop_gradient=False), plan, inplace=True)
    hidden.sum().backward()
    assert (source.grad.numpy() == 2).all()


def test_features_are_not_kept_for_the_backward_pass():
    """The operator keeps the indices and a number: the features' memory goes with their last user."""
    import gc
    import weakref

    plan, mask = a_plan()
    source = drawn([int(mask.sum()), 4], "float32", 1, stop_gradient=False)
    features = source + 0
    alive = weakref.ref(features)
    out = add_rows(drawn([*plan.row_shape, 4], "float32"), features, plan)
    del features
    gc.collect()
    assert alive() is None
    out.sum().backward()
    assert source.grad.numpy().sum() == 4 * len(plan.gather_indices)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", ROWS)
class TestRefusals:
    """What was got, what was expected, and the hidden states untouched."""

    @pytest.fixture
    def case(self):
        plan, mask = a_plan()
        return plan, drawn([*plan.row_shape, 4], "float32"), drawn([int(mask.sum()), 4], "float32")

    def refused(self, name, hidden, features, plan, message):
        before = hidden.numpy().copy()
        with pytest.raises(ValueError, match=message):
            ROWS[name](hidden, features, plan)
        assert np.array_equal(hidden.numpy(), before)

    def test_features_fewer_or_more_than_planned(self, name, case):
        """Both numbers."""
        plan, hidden, features = case
        n = features.shape[0]
        self.refused(name, hidden, features[:-1], plan, f"the plan is for {n} feature rows, got {n - 1}")
        self.refused(
            name, hidden, paddle.concat([features, features]), plan, f"the plan is for {n} feature rows, got {2 * n}"
        )

    def test_widths_that_differ(self, name, case):
        """Both widths."""
        plan, hidden, features = case
        self.refused(name, hidden, features[:, :3], plan, r"features must be \[N, 4\] .* got \[\d+, 3\]")

    def test_a_plan_for_other_hidden_states(self, name, case):
        """Both shapes."""
        plan, hidden, features = case
        swapped = hidden.transpose([1, 0, 2])
        self.refused(name, swapped, features, plan, r"the plan is for hidden states \[2, 6\] .* got\s+\[6, 2, 4\]")
        self.refused(name, hidden[:, :-1], features, plan, r"\[2, 6\] .* got\s+\[2, 5, 4\]")

    def test_a_plan_on_the_host(self, name, case):
        """The call that brings it to the device."""
        _, hidden, features = case
        plan = plan_visual(np.ones((2, 6), dtype=bool), None, SeqLayout(6), sequence_first=False)
        self.refused(name, hidden, features, plan, r"plan\.to\(hidden\.place\)")

    def test_arrays_that_are_no_tensors(self, name, case):
        """The type that was got."""
        plan, hidden, features = case
        self.refused(name, hidden, features.numpy(), plan, "features must be a Paddle tensor, got ndarray")

    def test_integers(self, name, case):
        """The dtype that was got."""
        plan, hidden, features = case
        self.refused(name, hidden.astype("int64"), features, plan, "hidden must be floating point, got paddle.int64")
        self.refused(name, hidden, features.astype("int32"), plan, "features must be floating point, got paddle.int32")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("update", "gather"),
    [([1, 9, 3, -5, 2], [0, 1, 7, 2, 2]), ([0, 1, 2, 3], [1, 0, -1, 3]), ([0, 1, 2, 4], [1, 0, 2, 2]), ([9], [0])],
)
def test_pairs_outside_their_tables_are_skipped(name, update, gather):
    """Bit-exact: an index that does not fit is never followed, whatever brought it there."""
    plan = VisualPlan.from_indices(paddle.to_tensor(update), paddle.to_tensor(gather), (1, 4), -1)
    hidden, features = drawn([1, 4, 3], "float32", 1, False), drawn([3, 3], "float32", 2, False)
    out = ROWS[name](hidden, features, plan)
    expected, rows = hidden.numpy()[0].copy(), features.numpy()
    fitting = [(u, g) for u, g in zip(update, gather, strict=True) if 0 <= u < 4 and 0 <= g < 3]
    for u, g in fitting:
        expected[u] = rows[g] if name == "replace" else expected[u] + rows[g]
    assert np.array_equal(out.numpy()[0], expected)
    out.sum().backward()
    assert features.grad.numpy()[:, 0].tolist() == [sum(g == row for _, g in fitting) for row in range(3)]
    replaced = [u for u, _ in fitting] if name == "replace" else []
    assert hidden.grad.numpy()[0, :, 0].tolist() == [float(row not in replaced) for row in range(4)]


DOUBLE = {
    "add": (add_rows, lambda hidden, features, at: hidden + at @ features),
    "replace": (replace_rows, lambda hidden, features, at: hidden * (1 - at.sum(-1, keepdim=True)) + at @ features),
}


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("wanted", ["both", "features", "hidden"])
def test_gradients_of_gradients(name, wanted):
    """A penalty on the gradients against the same by a matrix, in float64: 1e-12; of both, and of one alone.

    The penalty has a linear part, too: the gradient of replaced rows is zero, and so is that of its square.
    """
    if load.backend().name != "op":
        pytest.skip("plain Paddle has no second gradient of scatter, and says so")
    move, by_matrix = DOUBLE[name]
    plan = plan_visual(paddle.to_tensor([[False, True, True, False]]), None, SeqLayout(4), sequence_first=False)
    at = paddle.zeros([4, 2], "float64")
    at[1, 0] = at[2, 1] = 1.0

    def penalty(way):
        hidden, features = drawn([1, 4, 3], "float64", 1, False), drawn([2, 3], "float64", 2, False)
        out = way(hidden * 2, features * features)
        asked = {"both": [hidden, features], "features": [features], "hidden": [hidden]}[wanted]
        grads = paddle.grad((out**3).sum(), asked, create_graph=True)
        weights = [drawn(grad.shape, "float64", 3 + len(grad.shape)) for grad in grads]
        sum((grad * (grad + weight)).sum() for grad, weight in zip(grads, weights, strict=True)).backward()
        return hidden.grad.numpy(), features.grad.numpy()

    got = penalty(lambda hidden, features: move(hidden, features, plan))
    for ours, theirs in zip(got, penalty(lambda hidden, features: by_matrix(hidden, features, at)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("wanted", ["features", "hidden"])
def test_there_is_no_third_gradient_and_the_second_says_so(name, wanted):
    """An error where a third one would lack a part; a second one of a second call to the same function goes on."""
    if load.backend().name != "op":
        pytest.skip("plain Paddle has no second gradient of scatter, and says so")
    plan = plan_visual(paddle.to_tensor([[False, True, True, False]]), None, SeqLayout(4), sequence_first=False)
    hidden, features = drawn([1, 4, 3], "float64", 1, False), drawn([2, 3], "float64", 2, False)
    out = DOUBLE[name][0](hidden * 2, features * features, plan)
    asked = {"features": features, "hidden": hidden}[wanted]
    (first,) = paddle.grad((out**3).sum(), asked, create_graph=True)
    (second,) = paddle.grad((first**2).sum(), asked, retain_graph=True)
    with pytest.raises(ValueError, match="replace_rows and add_rows have no third gradient: leave create_graph out"):
        paddle.grad((first**2).sum(), asked, create_graph=True)
    (first**2).sum().backward()
    assert np.array_equal(asked.grad.numpy(), second.numpy())


def test_in_place_has_no_second_gradient_and_says_so():
    """An error in place of a wrong number."""
    plan = plan_visual(paddle.to_tensor([[False, True]]), None, SeqLayout(2), sequence_first=False)
    hidden, features = drawn([1, 2, 3], "float32", 1, False), drawn([1, 3], "float32", 2, False)
    out = add_rows(hidden * 2, features * features, plan, inplace=True)
    with pytest.raises((RuntimeError, OSError), match=r"has no second gradient|grad op"):
        sum(
            (grad * grad).sum() for grad in paddle.grad((out**3).sum(), [hidden, features], create_graph=True)
        ).backward()
