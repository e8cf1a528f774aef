"""Index arrays that stay on a device: copied once, and not at all while a CUDA graph is captured."""

from unittest import mock

import numpy as np
import paddle
import pytest
from paddle.base import core

from paddle_vl_sp import SeqLayout, plan_visual
from paddle_vl_sp.attention import (
    flashmask,
    gated_delta_net_sp,
    gather_attention,
    packed_attention,
    shard_batch,
    visible,
)
from paddle_vl_sp.attention import unshard as attention_unshard
from paddle_vl_sp.backends import copies as copying
from paddle_vl_sp.backends import operators, plain
from paddle_vl_sp.backends.copies import check_not_capturing, on_place
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.gather import gather_rows, take_rows
from paddle_vl_sp.comm.resident import Resident
from paddle_vl_sp.comm.uneven import UnevenRows, rank_after_rank
from paddle_vl_sp.testing import FakeGroup


class Gpu:
    def is_gpu_place(self):
        return True


GPU = Gpu()


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(core, "is_cuda_graph_capturing", lambda: True)


@pytest.fixture
def copies(monkeypatch):
    """Every array that is copied from the host to a device."""
    found = []
    original = copying.on_place

    def copy(x, place):
        copied = original(x, place)
        found.append(x)
        return copied

    monkeypatch.setattr(copying, "on_place", copy)
    return found


def test_an_array_is_copied_once_to_each_place(copies):
    """Exact: one copy, the same tensor again."""
    index = Resident(np.array([2, 0, 1]))
    first = index.on(paddle.CPUPlace())
    assert first is index.on(paddle.CPUPlace())
    assert first.tolist() == [2, 0, 1]
    assert len(copies) == 1


@pytest.mark.parametrize(("array", "stretch"), [([], (0, 0)), ([3], (3, 1)), ([4, 5, 6], (4, 3)), ([4, 6], None)])
def test_a_stretch_needs_no_copy(array, stretch, copies):
    """Exact: rows that follow each other are a view."""
    index = Resident(np.array(array, dtype=np.int64))
    assert index.stretch == stretch
    x = paddle.arange(8).reshape([8, 1])
    assert take_rows(x, index).flatten().tolist() == array
    assert len(copies) == (stretch is None)


def test_no_copy_is_captured(capturing, copies):
    """Refused by name, with what to do; what is there already may be used, and a CPU captures nothing."""
    index = Resident(np.array([2, 0, 1]))
    with pytest.raises(ValueError, match=r"being captured, and indices .* run the same forward"):
        index.on(GPU)
    assert not copies
    index._copies[str(GPU)] = here = paddle.zeros([3])
    assert index.on(GPU) is here
    index.on(paddle.CPUPlace())
    visible._visible_by_bounds.cache_clear()
    with pytest.raises(ValueError, match="being captured"):
        visible.visible_rows(SeqLayout(8), True, None, GPU)


def test_nothing_is_refused_without_capture():
    check_not_capturing(GPU)
    check_not_capturing("gpu:0")


@pytest.mark.parametrize("place", [GPU, "gpu:1"])
def test_no_host_array_is_captured_by_any_way(capturing, place):
    """A loader's plan, and any array; what is already on a device moves, and so does all on the CPU."""
    plan = plan_visual(np.array([[1, 1, 0]]), [1], SeqLayout(3), sequence_first=True)
    with pytest.raises(ValueError, match="being captured"):
        plan.to(place)
    with pytest.raises(ValueError, match="being captured"):
        on_place(paddle.zeros([2]), place)
    moved = mock.Mock(spec=paddle.Tensor, **{"place.is_cpu_place.return_value": False})
    assert on_place(moved, place) is moved.to.return_value
    assert on_place(np.arange(3), "cpu").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "use", [plain._own_columns, lambda tokens, layout: operators.build_plan(tokens, (1,), layout, True, -1, True)]
)
def test_no_table_is_captured(capturing, use):
    """The intervals of packed rows are a host array: more of them than the kernels take as arguments are copied."""
    layout = SeqLayout(32, cp_size=2, cp_mode="zigzag", cu_seqlens=range(0, 33, 4))
    tokens = mock.Mock(spec=paddle.Tensor, place=GPU, shape=[1, 32], dtype=paddle.int64)
    with pytest.raises(ValueError, match="being captured"):
        use(tokens, layout)


def test_a_traced_graph_keeps_nothing():
    """Exact: a value of one program must not be handed to the next."""
    index = Resident(np.array([2, 0, 1]))

    @paddle.jit.to_static(full_graph=True)
    def gathered(x):
        return paddle.gather(x, index.on(None))

    x = paddle.to_tensor([5.0, 6.0, 7.0])
    assert gathered(x).tolist() == [7.0, 5.0, 6.0]
    assert not index._copies


def test_rows_of_equal_counts_are_kept():
    """Exact: the same value, so that its indices stay on the device."""
    assert rank_after_rank((1, 2)) is rank_after_rank((1, 2))
    rows = UnevenRows((2, 0, 3), np.array([2, 0, 3, 1, 4]))
    for name, expected in (
        ("in_order", [2, 0, 3, 1, 4]), ("back", [1, 3, 0, 2, 4]), ("from_padded", [6, 0, 7, 1, 8]),
        ("to_padded", [1, 3, 5, 5, 5, 5, 0, 2, 4]),
    ):  # fmt: skip
        assert getattr(rows, name) is getattr(rows, name)
        assert getattr(rows, name).array.tolist() == expected
    assert rows.among_others(0) is rows.among_others(0)
    assert rows.among_others(0).array.tolist() == [2, 0, 2, 1, 2]
    assert rows.rows_of(2) is rows.rows_of(2)


TWO = FakeGroup(1, 2)
ZIGZAG = SeqLayout(16, cp_size=2, cp_rank=1, cu_seqlens=(0, 4, 16))


def heads(*counts, rows=8):
    return [paddle.rand([1, rows, n, 8]) for n in counts]


def whole(x, *_):
    return paddle.concat([x, x])


def first_half(x, *_):
    return x


FORWARDS = {
    "packed": lambda: packed_attention(*heads(2, 2, 2, rows=16), cu_seqlens=(0, 4, 16)),
    "gather": lambda: gather_attention(*heads(2, 2, 2), layout=ZIGZAG, group=TWO),
    "gather, row indices": lambda: gather_attention(
        *heads(2, 2, 2), layout=SeqLayout(16, cp_size=2, cp_rank=1), group=TWO,
        startend_row_indices=paddle.full([1, 1, 16, 1], 16, "int32"),
    ),
    "linear, states": lambda: gated_delta_net_sp(
        *heads(2, 2, 2), *(-paddle.rand([1, 8, 2]) for _ in "gb"), conv_weight=paddle.rand([48, 4]),
        layout=ZIGZAG, group=TWO, method="state",
    ),
    "unshard": lambda: attention_unshard(paddle.rand([1, 8, 2]), ZIGZAG, TWO, axis=1, cu_seqlens=(0, 3, 13)),
    "shard_batch": lambda: shard_batch({"input_ids": paddle.ones([1, 16], "int64")}, ZIGZAG)["input_ids"],
    "all ranks' rows": lambda: gather_rows(
        [paddle.rand([2, 3])], rank_after_rank((3, 2)), TWO, "max", "partial", False
    )[0],
    "all ranks' rows, sum": lambda: gather_rows(
        [paddle.rand([2, 3])], rank_after_rank((3, 2)), TWO, "sum", "partial", False
    )[0],
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_the_second_forward_copies_nothing(name, copies, monkeypatch):
    """None at all, with collectives on doubles: neither through Resident nor by to_tensor of an array."""
    monkeypatch.setattr(collectives, "all_gather", whole)
    monkeypatch.setattr(collectives, "all_reduce_sum", first_half)
    monkeypatch.setattr(flashmask, "can_run", lambda *_: True)  # plain Paddle's masks are on the host
    with mock.patch.object(paddle.nn.functional, "flashmask_attention", lambda q, *_, **__: q * 1):
        FORWARDS[name]()
        copies.clear()
        with mock.patch.object(paddle, "to_tensor", side_effect=AssertionError("an array was copied")):
            FORWARDS[name]()
    assert not copies
