"""The report of a run on one process: what is counted, when it is read, and that it costs nothing while it is off."""

import logging
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_vl_sp import RunReport, SeqLayout, VisualPlan, note_forward, plan_visual
from paddle_vl_sp import report as report_module
from paddle_vl_sp.testing import FakeGroup

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
from timing import counted_syncs

LEVELS = 3


def forward(mask, layout=None, padded=False, **more):
    """Notes one forward over a mask [B, S] and returns its plan."""
    layout = layout or SeqLayout(mask.shape[1])
    plan = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=True, padded=padded)
    note_forward(plan, **({"num_levels": LEVELS} | more))
    return plan


def some_mask(batch=2, seq_len=12, seed=0):
    return np.random.default_rng(seed).random((batch, seq_len)) < 0.5


def test_counts_of_one_rank():
    """By hand: two forwards of 2 x 12 tokens."""
    masks = [some_mask(seed=0), some_mask(seed=1)]
    with RunReport() as report:
        for mask in masks:
            forward(mask)
    visual = sum(int(mask.sum()) for mask in masks)
    assert report.read() == {
        "forwards": 2,
        "visual_tokens": visual,
        "tokens_of_ranks": [visual],
        "imbalance": 1.0,
        "worst_imbalance": 1.0,
        "empty_ranks": 0.0,
        "syncs_here": 2,
    }


def oracle(own, syncs):
    """The same dict, forward by forward."""
    ratios, empty = [], []
    for counts in zip(*own, strict=True):
        ratios.append(max(counts) / (sum(counts) / len(counts)) if sum(counts) else 1.0)
        empty.append(counts.count(0))
    return {
        "forwards": len(syncs),
        "visual_tokens": sum(map(sum, own)),
        "tokens_of_ranks": [sum(rank) for rank in own],
        "imbalance": sum(ratios) / len(ratios) if ratios else 1.0,
        "worst_imbalance": max(ratios, default=1.0),
        "empty_ranks": sum(empty) / len(empty) if empty else 0.0,
        "syncs_here": sum(syncs),
    }


@given(st.lists(st.integers(0, 20), max_size=5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_summary_over_ranks_against_the_slow_way(syncs, nranks, draw):
    """Equal to a loop over forwards and ranks."""
    own = [[draw.choice([0, draw.randrange(1000)]) for _ in syncs] for _ in range(nranks)]
    facts = np.array(list(zip(own[0], syncs, strict=True)), np.int64).reshape(-1, 2)
    got = report_module._summary(np.array(own, np.int64).reshape(nranks, -1), facts)
    wanted = oracle(own, syncs)
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert got[key] == pytest.approx(wanted[key]), key


def test_windows_and_what_is_outside():
    """Exact counts: only what happened while it was open, from the forward that is asked for."""
    forward(some_mask())  # before it was opened
    report = RunReport()
    report.start()
    report.start()
    for seed in range(5):
        forward(some_mask(seed=seed))
    report.stop()
    report.stop()
    forward(some_mask())
    assert report.num_forwards == 5
    assert [report.read(since)["forwards"] for since in (0, 3, 5)] == [5, 2, 0]
    assert report.read(3)["visual_tokens"] == sum(int(some_mask(seed=seed).sum()) for seed in (3, 4))


def test_a_report_is_of_one_group(caplog):
    """The forwards of another group are not counted, and a warning names both."""
    with RunReport() as report, caplog.at_level(logging.WARNING, "paddle_vl_sp"):
        forward(some_mask())
        forward(some_mask(), SeqLayout(12, sp_size=2, sp_rank=1), group=FakeGroup(1, 2))
    assert report.num_forwards == 1
    assert "that of the first (no group); those of ranks [0, 1] are left out" in caplog.text


def test_two_reports_at_once():
    """Each counts its own time."""
    with RunReport() as whole:
        forward(some_mask())
        with RunReport() as part:
            forward(some_mask())
    assert (whole.num_forwards, part.num_forwards) == (2, 1)


def test_nothing_was_seen():
    """Zeros, and ratios of one."""
    with RunReport() as report:
        forward(np.zeros((2, 12), bool))
    assert report.read() == oracle([[]], [])
    assert "0 forwards" in report_module.summary_line(report.read())


def test_an_evaluation_is_not_counted():
    """Neither its forwards nor its shares."""
    with RunReport() as report:
        with paddle.no_grad():
            forward(some_mask())
            report_module.note_shared(1.5)
        forward(some_mask())
    assert report.num_forwards == 1
    assert "vision_imbalance" not in report.read()


def test_padded_plans_are_read_when_the_report_is():
    """No read of a device until then; then the exact count."""
    mask = some_mask()
    with RunReport() as report, counted_syncs() as syncs:
        forward(mask, padded=True)
        assert syncs[0] == 0
    assert report.read()["visual_tokens"] == int(mask.sum())


def test_counts_do_not_pile_up_unread(monkeypatch):
    """Read in between, and still exact."""
    monkeypatch.setattr(report_module, "PENDING", 4)
    with RunReport() as report:
        for seed in range(9):
            forward(some_mask(seed=seed))
    assert len(report._pending) == 1
    assert report.read()["visual_tokens"] == sum(int(some_mask(seed=seed).sum()) for seed in range(9))


def test_without_a_report_nothing_is_computed(monkeypatch):
    """No count is asked for: on a device it would be launches, or a host sync."""
    monkeypatch.setattr(VisualPlan, "counts", property(lambda self: pytest.fail("the plan was counted")))
    forward(some_mask())


def test_plans_on_the_host_count_too():
    """Exact."""
    mask = some_mask()
    plan = plan_visual(mask, None, SeqLayout(12), sequence_first=True)
    with RunReport() as report:
        note_forward(plan, paddle.zeros([1, 8]), batch=2, num_levels=1)  # as in 0.1.0
    assert report.read()["visual_tokens"] == int(mask.sum())


def test_shares_of_the_tower_fall_into_their_window():
    """Exact means, from the forward that is asked for."""
    with RunReport() as report:
        for seed, imbalance in enumerate((1.0, 1.5, 2.0)):
            report_module.note_shared(imbalance)
            forward(some_mask(seed=seed))
    assert [report.read(since).get("vision_imbalance") for since in range(4)] == [1.5, 1.75, 2.0, None]


def test_every_plan_is_told_at_level_debug(caplog):
    """The exact line, and none at other levels."""
    mask = np.array([[0, 1, 1, 0, 0, 1, 0, 0]], bool)
    with caplog.at_level(logging.DEBUG, "paddle_vl_sp"):
        forward(mask, SeqLayout(8, sp_size=2, sp_rank=1))
    assert caplog.messages == [
        "paddle_vl_sp: plan: 1 of 3 visual tokens in 4 rows [4, 1], 3 levels, 1 host syncs; "
        "first (row, feature row): (1, 2)"
    ]
    caplog.clear()
    forward(mask)
    assert not caplog.messages


class Share:
    """What a balanced step tells: patches of two ranks."""

    def __init__(self, at_home, encoded, sent):
        self.patches_at_home, self.patches_encoded = np.array(at_home), np.array(encoded)
        self.imbalance_at_home, self.imbalance = max(at_home) * 2 / sum(at_home), max(encoded) * 2 / sum(encoded)
        self.moved_patches, self.sent_rows = 4 * sent, sent

    def report(self):
        return "a step"


def test_balanced_towers():
    """By hand: the means and sums of the forwards that are asked for; patches of all of them."""
    with RunReport() as report:
        for share in (Share([8, 0], [4, 4], 1), Share([4, 12], [8, 8], 2)):
            report_module.note_balanced(share, 10, 100)
            forward(some_mask())
    found = report.read()
    assert (found["vision_imbalance_at_home"], found["vision_imbalance"]) == (1.75, 1.0)
    assert (found["vision_rows_moved"], found["vision_bytes_moved"]) == (3, 12 * 10 + 3 * 100)
    assert (found["vision_patches_at_home"], found["vision_patches_encoded"]) == ([12, 12], [12, 12])
    later = report.read(1)
    assert (later["vision_imbalance_at_home"], later["vision_rows_moved"]) == (1.5, 2)
    assert "busiest tower over the mean: 1.00, at home 1.75; 0.00 MiB moved" in report_module.summary_line(found)
