"""The operators inside static graphs, with shapes unknown when the graph is built: bit-exact with eager."""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec

from paddle_vl_sp import SeqLayout, VisualPlan, add_rows, plan_visual, replace_rows
from paddle_vl_sp.backends import load, operators

pytestmark = pytest.mark.skipif(
    load.backend().name != "op", reason="no custom operators: the header of this report says why"
)
DYNAMIC = [
    InputSpec([None, None, 4], "float32"),
    InputSpec([None, 4], "float32"),
    InputSpec([None], "int64"),
    InputSpec([None], "int64"),
]
SHAPES = [(2, 12), (1, 7), (3, 5)]


class Rows(paddle.nn.Layer):
    def __init__(self, name):
        super().__init__()
        self.apply = getattr(operators, name)
        self.scale = self.create_parameter([4], default_initializer=paddle.nn.initializer.Constant(1.5))

    def forward(self, hidden, features, update, gather):
        return self.apply(hidden * self.scale, features * self.scale, update, gather)


def drawn(batch, seq_len, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, seq_len)) < 0.5
    plan = plan_visual(paddle.to_tensor(mask), None, SeqLayout(seq_len), sequence_first=False)
    hidden = paddle.to_tensor(rng.standard_normal((batch, seq_len, 4), dtype=np.float32), stop_gradient=False)
    features = paddle.to_tensor(rng.standard_normal((int(mask.sum()), 4), dtype=np.float32), stop_gradient=False)
    return hidden, features, plan.update_indices, plan.gather_indices


@pytest.mark.parametrize("full_graph", [True, False])
@pytest.mark.parametrize("name", ["replace_rows", "add_rows"])
def test_forward_and_backward_of_a_graph_with_unknown_shapes(name, full_graph):
    """Bit-exact with eager mode, in several shapes by one graph, gradients too."""
    layer = Rows(name)
    graph = paddle.jit.to_static(Rows(name), input_spec=DYNAMIC, full_graph=full_graph)
    for batch, seq_len in SHAPES:
        found = []
        for model in (layer, graph):
            inputs = drawn(batch, seq_len)
            out = model(*inputs)
            model.clear_gradients()
            (out * out).sum().backward()
            found.append([out, inputs[0].grad, inputs[1].grad, model.scale.grad])
        for eager, static in zip(*found, strict=True):
            assert np.array_equal(eager.numpy(), static.numpy())


FIRST_USE = """
import paddle
from paddle.static import InputSpec
from paddle_vl_sp import VisualPlan, add_rows, backend

def add(hidden, features, indices):
    return add_rows(hidden, features, VisualPlan.from_indices(indices, indices, (-1, -1), -1))

spec = [InputSpec([None, None, 3]), InputSpec([None, 3]), InputSpec([None], "int64")]
graph = paddle.jit.to_static(add, input_spec=spec, full_graph=True)
print(graph(paddle.zeros([1, 4, 3]), paddle.ones([2, 3]), paddle.arange(2)).sum().item(), backend().name)
"""


def test_operators_that_are_loaded_while_a_graph_is_traced(tmp_path):
    """In a process of its own, where nothing has used the operators before."""
    script = tmp_path / "first_use.py"  # tracing reads the source
    script.write_text(FIRST_USE)
    env = os.environ | {"PYTHONPATH": str(load.HERE.parent)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["6.0 op"], done.stderr[-2000:]


@pytest.fixture
def static_mode():
    paddle.enable_static()
    yield
    paddle.disable_static()


@pytest.mark.usefixtures("static_mode")
def test_a_gradient_that_is_fetched_is_not_written_over():
    """Exact: tanh's gradient is computed in place, in the gradient that add_rows returns, not in the fetched one."""
    program = paddle.static.Program()
    with paddle.static.program_guard(program):
        hidden = paddle.static.data("hidden", [1, 4, 3])
        features = paddle.static.data("features", [2, 3])
        hidden.stop_gradient = features.stop_gradient = False
        update, gather = (paddle.static.data(name, [2], "int64") for name in ("update", "gather"))
        out = operators.add_rows(paddle.tanh(hidden), features, update, gather)
        fetched = paddle.static.gradients([(out * 2).sum()], [out, hidden, features])
    feed = {"hidden": np.full((1, 4, 3), 0.5), "features": np.ones((2, 3))}
    feed = {name: x.astype(np.float32) for name, x in feed.items()} | {"update": np.array([1, 2])}
    run = paddle.static.Executor(paddle.CPUPlace()).run
    out_grad, hidden_grad, feature_grad = run(program, feed | {"gather": np.array([0, 1])}, fetched)
    assert (out_grad == 2).all()
    assert (feature_grad == 2).all()
    assert np.allclose(hidden_grad, 2 * (1 - np.tanh(0.5) ** 2), rtol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_an_index_builder_that_is_saved_and_loaded(tmp_path, padded):
    """Exact, in several shapes by one program."""
    layout = SeqLayout(8, sp_size=2, sp_rank=1)

    class Indices(paddle.nn.Layer):
        def forward(self, ids):
            return operators.build_plan(ids, (5, 6), layout, True, -1, padded)

    builder = paddle.jit.to_static(Indices(), input_spec=[InputSpec([None, None], "int64")], full_graph=True)
    paddle.jit.save(builder, str(tmp_path / "indices"))
    loaded = paddle.jit.load(str(tmp_path / "indices"))
    for batch, seq_len in ((1, 8), (3, 8), (2, 16)):
        ids = np.random.default_rng(batch).integers(0, 8, (batch, seq_len))
        expected = plan_visual(
            ids, (5, 6), SeqLayout(seq_len, sp_size=2, sp_rank=1), sequence_first=True, padded=padded
        )
        update, gather, counts = loaded(paddle.to_tensor(ids))
        assert update.tolist() == expected.update_indices.tolist()
        assert gather.tolist() == expected.gather_indices.tolist()
        assert counts.tolist() == expected.counts.tolist()


def test_a_length_that_does_not_divide_is_refused_when_it_arrives():
    """Refused by the operator, with the next length that fits."""
    with pytest.raises(ValueError, match="the length 9 is not divisible by 2; the next length that fits is 10"):
        operators.build_plan(paddle.zeros([1, 9], "int64"), (1,), SeqLayout(8, sp_size=2), True, -1, False)


@pytest.mark.parametrize("cp_mode", ["zigzag", "contiguous"])
@pytest.mark.parametrize("remainder", ["error", "front"])
def test_the_rule_in_the_operator_is_the_rule_of_the_layout(cp_mode, remainder):
    """Exact, for every rank: all tokens visual, so the rows' features name the positions that are owned."""
    for cp_size in range(1, 5):
        for sp_size in range(1, 5):
            unit = 1 if remainder == "front" and (cp_mode == "contiguous" or cp_size == 1) else 2 * cp_size * sp_size
            for seq_len in (0, unit, 3 * unit, 7 * unit):
                for cp_rank in range(cp_size):
                    for sp_rank in range(sp_size):
                        layout = SeqLayout(
                            seq_len,
                            cp_size=cp_size,
                            cp_rank=cp_rank,
                            cp_mode=cp_mode,
                            sp_size=sp_size,
                            sp_rank=sp_rank,
                            remainder=remainder,
                        )
                        all_visual = paddle.ones([1, seq_len], dtype="bool")
                        _, gather, _ = operators.build_plan(all_visual, None, layout, False, -1, False)
                        assert gather.tolist() == layout.positions().tolist()


def test_what_guards_memory_in_the_operator_itself():
    """Messages for people come earlier, from Python; these stop a caller who goes around it."""
    hidden, features, update, gather = drawn(2, 6)
    with pytest.raises(ValueError, match=r"hidden must be \[.., H\] and features \[N, H\], got \[2, 6, 4\] and"):
        operators.replace_rows(hidden, features[:, :2], update, gather)
    with pytest.raises(ValueError, match="must be int64 and of one length"):
        operators.replace_rows(hidden, features, update[:-1], gather)
    with pytest.raises(ValueError, match="tokens must be"):
        operators.build_plan(paddle.zeros([8], "int64"), (1,), SeqLayout(8), True, -1, False)


class PublicRows(paddle.nn.Layer):
    """What a user's model calls, with a plan that travelled as arrays; -1 stands for sizes that are not known yet."""

    def forward(self, hidden, features, update, gather):
        plan = VisualPlan.from_indices(update, gather, (-1, -1), -1)
        return add_rows(replace_rows(hidden, features, plan), features, plan, inplace=True)


@pytest.mark.parametrize("backend_name", ["op", "python"])
@pytest.mark.parametrize("full_graph", [True, False])
def test_the_public_functions_inside_a_traced_model(full_graph, backend_name, monkeypatch):
    """Bit-exact with eager mode, with operators and without."""
    if backend_name == "python":
        monkeypatch.setattr(load, "backend", lambda: load.Backend("python", (), "as on a device without operators"))
    graph = paddle.jit.to_static(PublicRows(), input_spec=DYNAMIC if full_graph else None, full_graph=full_graph)
    for batch, seq_len in SHAPES:
        inputs = drawn(batch, seq_len)
        assert np.array_equal(graph(*inputs).numpy(), PublicRows()(*inputs).numpy())


def added_beside(hidden, features, update, gather):
    """A value of the hidden states from before the addition is used after it."""
    plan = VisualPlan.from_indices(update, gather, (-1, -1), -1)
    hidden = hidden * 2
    before = hidden * hidden
    out = add_rows(hidden, features, plan, inplace=not paddle.in_dynamic_mode())
    return before.sum() + (out * out).sum()


@pytest.mark.parametrize("backend_name", ["op", "python"])
def test_in_place_in_a_graph_leaves_earlier_values_alone(backend_name, monkeypatch):
    """Bit-exact with a copy in eager mode, loss and gradients: inplace=True is a wish that a graph does not follow."""
    graph = paddle.jit.to_static(added_beside, input_spec=DYNAMIC, full_graph=True)
    if backend_name == "python":
        monkeypatch.setattr(load, "backend", lambda: load.Backend("python", (), "as on a device without operators"))
    found = []
    for function in (added_beside, graph):
        inputs = drawn(2, 12)
        loss = function(*inputs)
        loss.backward()
        found.append([loss, inputs[0].grad, inputs[1].grad])
    for eager, static in zip(*found, strict=True):
        assert np.array_equal(eager.numpy(), static.numpy())


def test_an_exact_plan_in_a_traced_graph_is_refused():
    """Refused while it is traced, with the forms that a graph can have."""

    def plan(tokens):
        return plan_visual(tokens, (1,), SeqLayout(4), sequence_first=True).update_indices

    graph = paddle.jit.to_static(plan, full_graph=True, input_spec=[InputSpec([1, 4], "int64")])
    with pytest.raises(ValueError, match="an exact plan has a size that is in the data"):
        graph(paddle.to_tensor([[0, 1, 1, 0]]))


@pytest.mark.parametrize(
    "table", [[[4, 3, 0], [0, 2, 3]], [[0, 9, 0]], [[-1, 2, 0]], [[2, -1, 0]], [[0, 3, 0], [2, 2, 3]], [[7, 2, 0]]]
)
def test_a_table_that_leads_out_of_the_tokens_is_refused(table):
    """Refused by the operator, before memory is touched."""
    tokens = paddle.zeros([1, 8], "int64")
    with pytest.raises(ValueError, match=r"interval \d of the table, .* is not a run after \d within 8 positions"):
        operators.build_plan_of(tokens, paddle.to_tensor(table), (1,), SeqLayout(8), 3, False, -1, False)
