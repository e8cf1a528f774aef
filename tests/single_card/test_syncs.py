"""How often the host asks for a value: exact counts, as the CPU can count them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from paddle_vl_sp import SeqLayout, VisualPlan, add_rows, joint_features, plan_visual, replace_rows
from paddle_vl_sp.backends import dispatch, host, plain
from strategies import IMAGE, VIDEO

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
from timing import counted_syncs

LAYOUT = SeqLayout(16, sp_size=2, sp_rank=1)
IDS = np.random.default_rng(0).choice([1, IMAGE, VIDEO], (3, 16))
COUNTS = [int((kind == IDS).sum()) for kind in (IMAGE, VIDEO)]


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """What the CPU counts is what a device would wait for: the host reads no tensor because it could."""
    monkeypatch.setattr(plain, "is_on_host", lambda x: False)


def syncs(run):
    with counted_syncs() as counts:
        run()
    return counts[0]


@pytest.mark.usefixtures("implementation")
def test_an_exact_plan_costs_one_and_a_padded_one_none():
    """Exact counts, with operators and without."""
    ids = paddle.to_tensor(IDS)
    for num_features in (None, sum(COUNTS)):
        options = {"sequence_first": True, "num_features": num_features}
        assert syncs(lambda options=options: plan_visual(ids, (IMAGE, VIDEO), LAYOUT, **options)) == 1
        assert syncs(lambda options=options: plan_visual(ids, (IMAGE, VIDEO), LAYOUT, padded=True, **options)) == 0


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("padded", [False, True])
def test_rows_cost_none_forward_and_backward(padded):
    """None at all, of either form of plan."""
    plan = plan_visual(paddle.to_tensor(IDS), (IMAGE, VIDEO), LAYOUT, sequence_first=True, padded=padded)
    source = paddle.randn([*plan.row_shape, 4])
    features = paddle.randn([sum(COUNTS), 4])
    source.stop_gradient = features.stop_gradient = False

    def step():
        travelled = VisualPlan.from_indices(plan.update_indices, plan.gather_indices, plan.row_shape, sum(COUNTS))
        hidden = add_rows(replace_rows(source * 2, features, travelled), features, travelled, inplace=True)
        (hidden * hidden).sum().backward()

    assert syncs(step) == 0


@pytest.mark.parametrize("padded", [False, True])
def test_only_tensors_in_memory_of_the_host_are_read_by_it(padded, monkeypatch):
    """In plain Paddle numpy plans, and sorts pairs, for tensors on a CPU, and for no other tensor."""
    of_place = plain.is_on_host
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "_implementation", lambda _: plain)
    asked = []
    for name in ("build_plan", "pairs_to_move"):
        original = getattr(host, name)
        monkeypatch.setattr(host, name, lambda *args, f=original, name=name: asked.append(name) or f(*args))

    def step():
        plan = plan_visual(paddle.to_tensor(IDS), (IMAGE, VIDEO), LAYOUT, sequence_first=True, padded=padded)
        hidden, features = paddle.randn([*plan.row_shape, 4]), paddle.randn([sum(COUNTS), 4])
        add_rows(replace_rows(hidden, features, plan), features, plan)

    step()
    assert asked == ["build_plan", "pairs_to_move", "pairs_to_move"]
    monkeypatch.setattr(plain, "is_on_host", of_place)
    step()
    assert len(asked) == 3
    monkeypatch.undo()
    for kind in ("gpu_pinned", "gpu", "xpu", "custom"):
        assert not plain.is_on_host(SimpleNamespace(place=SimpleNamespace(is_cpu_place=lambda kind=kind: False)))


def test_a_plan_from_the_host_costs_none():
    """None at all, the copy to the device included."""
    plan = plan_visual(IDS, (IMAGE, VIDEO), LAYOUT, sequence_first=True)
    hidden, features = paddle.randn([*plan.row_shape, 4]), paddle.randn([sum(COUNTS), 4])
    assert syncs(lambda: add_rows(hidden, features, plan.to(hidden.place))) == 0


def test_joining_image_and_video_costs_one_and_none_with_ids_on_the_host():
    """Exact counts, for three levels."""
    image, video = (paddle.randn([count, 4]) for count in COUNTS)
    ids = paddle.to_tensor(IDS)
    assert syncs(lambda: joint_features([image] * 3, [video] * 3, ids, (IMAGE, VIDEO))) == 1
    assert syncs(lambda: joint_features([image] * 3, [video] * 3, IDS, (IMAGE, VIDEO))) == 0
