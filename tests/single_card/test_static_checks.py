"""What does not fit is an error while a graph is traced or run: no row is dropped, no process ends."""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec

from paddle_vl_sp import SeqLayout, VisualPlan, add_rows, plan_visual, replace_rows
from paddle_vl_sp.backends import load

MASK = [[True, False, True, False], [False, False, True, True]]
IDS = [[5, 0, 5, 0], [0, 0, 5, 5]]
FIT = {"hidden": ([2, 4, 3], "float32"), "features": ([4, 3], "float32"), "update": ([4], "int64")}
UNFIT = {
    "a row less": ({"hidden": ([2, 3, 3], "float32")}, r"for hidden states \[2, 4\] \+ \[H\] .*, got \[2, 3, 3\]"),
    "a transposed hidden": ({"hidden": ([4, 2, 3], "float32")}, r"for hidden states \[2, 4\] .*, got \[4, 2, 3\]"),
    "another width": ({"features": ([4, 2], "float32")}, r"features must be \[N, 3\] .*, got \[4, 2\]"),
    "features in batches": ({"features": ([1, 4, 3], "float32")}, r"features must be \[N, 3\] .*, got \[1, 4, 3\]"),
    "fewer features": ({"features": ([3, 3], "float32")}, "the plan is for 4 feature rows, got 3"),
    "integers": ({"hidden": ([2, 4, 3], "int64")}, "hidden must be floating point, got paddle.int64"),
    "integer features": ({"features": ([4, 3], "int64")}, "features must be floating point, got paddle.int64"),
    "short indices": ({"update": ([4], "int32")}, r"indices must be int64, got paddle.int32"),
}


@pytest.fixture(params=["op", "python"])
def backend_name(request, monkeypatch):
    if request.param == "op" and load.backend().name != "op":
        pytest.skip("no custom operators: the header of this report says why")
    if request.param == "python":
        monkeypatch.setattr(load, "backend", lambda: load.Backend("python", (), "as on a device without operators"))
    return request.param


def replaced(hidden, features, update, gather):
    return replace_rows(hidden, features, VisualPlan.from_indices(update, gather, (2, 4), 4))


def added(hidden, features, update, gather):
    return add_rows(hidden, features, VisualPlan.from_indices(update, gather, (2, 4), 4), inplace=True)


def inputs(changed):
    plan = plan_visual(np.array(MASK), None, SeqLayout(4), sequence_first=False)
    given = {name: paddle.ones(shape, dtype) for name, (shape, dtype) in (FIT | changed).items()}
    given["update"] = paddle.to_tensor(plan.update_indices.astype(given["update"].numpy().dtype))
    return [given["hidden"], given["features"], given["update"], paddle.to_tensor(plan.gather_indices)]


@pytest.mark.usefixtures("backend_name")
@pytest.mark.parametrize("full_graph", [True, False])
@pytest.mark.parametrize("rows", [replaced, added])
def test_what_fits_passes(rows, full_graph):
    """Exact, hidden as it is and flattened."""
    hidden, features, update, gather = inputs({})
    for shape in ([2, 4, 3], [8, 3]):
        graph = paddle.jit.to_static(rows, full_graph=full_graph)
        found = [way(hidden.reshape(shape) * 2, features, update, gather).numpy() for way in (rows, graph)]
        assert np.array_equal(*found)


@pytest.mark.usefixtures("backend_name")
@pytest.mark.parametrize("full_graph", [True, False])
@pytest.mark.parametrize("rows", [replaced, added])
@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_as_in_eager_mode(name, rows, full_graph):
    """The same words with the same numbers, whether a graph is traced, translated, or neither."""
    changed, words = UNFIT[name]
    for function in (rows, paddle.jit.to_static(rows, full_graph=full_graph)):
        with pytest.raises(ValueError, match=words):
            function(*inputs(changed))


@pytest.mark.parametrize("known", ["width", "rows", "features"])
def test_what_is_known_of_a_graph_is_checked_while_it_is_traced(known):
    """Sizes that come with the data are let through, and one that is written down is not."""
    spec = {
        "width": ([None, None, 3], [None, 2]),
        "rows": ([2, 3, None], [None, None]),
        "features": ([None, None, 3], [3, 3]),
    }[known]
    indices = [InputSpec([None], "int64")] * 2
    for hidden, features in (([None, None, 3], [None, 3]), spec):
        graph = paddle.jit.to_static(
            added, full_graph=True, input_spec=[InputSpec(hidden), InputSpec(features), *indices]
        )
        if (hidden, features) != spec:
            graph.concrete_program  # noqa: B018  (traces it)
            continue
        with pytest.raises(ValueError, match=r"features must be \[N, 3\]|for hidden states|for 4 feature rows"):
            graph.concrete_program  # noqa: B018


IN_A_PROCESS = """
import paddle
from paddle.static import InputSpec
from paddle_vl_sp.backends import load, operators

load.backend()

def rows(hidden, features, update, gather):
    return operators.{name}(hidden, features, update, gather)

sizes = (lambda shape: shape) if {known} else (lambda shape: [None] * len(shape))
given = {given}
tensors = [paddle.zeros(shape, dtype) for shape, dtype in given]
spec = [InputSpec(sizes(shape), dtype) for shape, dtype in given]
try:
    paddle.jit.to_static(rows, full_graph=True, input_spec=spec)(*tensors)
except ValueError as error:
    print("refused:", [line for line in str(error).splitlines() if "paddle_vl_sp: " in line][-1])
"""
AROUND = {
    "width": ([([2, 4, 3], "float32"), ([4, 2], "float32"), ([4], "int64"), ([4], "int64")], "hidden must be [.., H]"),
    "dtype": ([([2, 4, 3], "int64"), ([4, 3], "float32"), ([4], "int64"), ([4], "int64")], "rows must be float32"),
    "indices": ([([2, 4, 3], "float32"), ([4, 3], "float32"), ([4], "int32"), ([4], "int64")], "must be int64"),
    "lengths": ([([2, 4, 3], "float32"), ([4, 3], "float32"), ([4], "int64"), ([3], "int64")], "of one length"),
}


@pytest.mark.skipif(load.backend().name != "op", reason="no custom operators: the header of this report says why")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("case", AROUND)
def test_operators_raise_where_they_ended_the_process(case, known, tmp_path):
    """In a process of its own, around the checks in Python: a ValueError when the graph runs, whatever it knew."""
    given, words = AROUND[case]
    script = tmp_path / "rows.py"  # tracing reads the source
    script.write_text(IN_A_PROCESS.format(name="add_rows", given=given, known=known))
    env = os.environ | {"PYTHONPATH": str(load.HERE.parent)}
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert words in done.stdout
    assert done.stdout.startswith("refused:")


@pytest.mark.usefixtures("backend_name")
def test_a_layer_to_be_saved_checks_what_is_known():
    """While it is traced, in either form; in eager mode too."""
    from paddle_vl_sp.export import DeepstackAdd

    indices = [InputSpec([None], "int64")] * 2
    for hidden, features in (("float32", [None, 2]), ("int64", [None, 3])):
        graph = paddle.jit.to_static(DeepstackAdd(), full_graph=True)
        with pytest.raises(ValueError, match=r"features must be \[N, 3\]|hidden must be floating point"):
            graph.forward.get_concrete_program(InputSpec([None, None, 3], hidden), InputSpec(features), *indices)
    with pytest.raises(ValueError, match=r"features must be \[N, 3\]"):
        DeepstackAdd()(paddle.zeros([1, 2, 3]), paddle.zeros([1, 2]), *[paddle.zeros([1], "int64")] * 2)


LOADED = """
import sys, paddle, paddle_vl_sp.export
program = paddle.jit.load(sys.argv[1])
plan = paddle.zeros([4], "int64"), paddle.zeros([4], "int64")
try:
    program(paddle.zeros([2, 4, 3]), paddle.zeros([4, 2]), *plan)
except ValueError as error:
    print("refused:", [line for line in str(error).splitlines() if "paddle_vl_sp: " in line][-1])
"""


@pytest.mark.skipif(load.backend().name != "op", reason="no custom operators: the header of this report says why")
def test_a_loaded_program_raises_too(tmp_path):
    """In a process of its own, with features of another width than the hidden states."""
    from paddle_vl_sp.export import DeepstackAdd, save

    save(DeepstackAdd(backend="op"), str(tmp_path / "add"))
    command = [sys.executable, "-W", "ignore", "-c", LOADED, str(tmp_path / "add")]
    env = os.environ | {"PYTHONPATH": str(load.HERE.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused:" in done.stdout
    assert "got [2, 4, 3] and [4, 2]" in done.stdout


def planned(hidden, features, ids, padded):
    plan = plan_visual(ids, (5,), SeqLayout(4), sequence_first=False, num_features=4, padded=padded)
    return add_rows(hidden * 2, features * 3, plan)


@pytest.mark.usefixtures("backend_name")
@pytest.mark.parametrize("padded", [True, False])
def test_a_plan_inside_the_default_to_static(padded):
    """Bit-exact with eager mode, gradients too, for several batches by one function."""
    graph = paddle.jit.to_static(planned)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        ids = paddle.to_tensor(rng.permutation(np.array(IDS).ravel()).reshape(2, 4))
        found = []
        for function in (planned, graph):
            hidden, features = (
                paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape), stop_gradient=False)
                for shape in ((2, 4, 3), (4, 3))
            )
            out = function(hidden, features, ids, padded)
            (out * out).sum().backward()
            found.append([out, hidden.grad, features.grad])
        for eager, static in zip(*found, strict=True):
            assert np.array_equal(eager.numpy(), static.numpy())


@pytest.mark.usefixtures("backend_name")
def test_a_plan_that_does_not_fit_inside_the_default_to_static():
    """In the words of eager mode."""
    graph = paddle.jit.to_static(planned)
    hidden, features = paddle.zeros([2, 4, 3]), paddle.zeros([4, 3])
    with pytest.raises(ValueError, match=r"tokens are \[2, 6\] but the layout is for seq_len 4"):
        graph(hidden, features, paddle.zeros([2, 6], "int64"), True)
    with pytest.raises(ValueError, match="tokens must be int32 or int64 ids, got float32"):
        graph(hidden, features, paddle.zeros([2, 4]), True)


def test_a_plan_of_unknown_length_in_a_traced_graph_is_refused():
    """Refused while it is traced, with the forms that a graph can have."""

    def plan(ids):
        return plan_visual(ids, (5,), SeqLayout(4), sequence_first=False, padded=True).update_indices

    graph = paddle.jit.to_static(plan, full_graph=True, input_spec=[InputSpec([None, None], "int64")])
    with pytest.raises(ValueError, match=r"a graph of unknown batch or length .* export.IndexBuilder"):
        graph(paddle.to_tensor(IDS))
