"""Over which ranks PADDLE_VL_SP_AUDIT audits a trainer, and when it cannot."""

from types import SimpleNamespace

import pytest

from paddle_vl_sp.formers import audit
from paddle_vl_sp.testing import FakeGroup


def trainer(pipeline=1, sharding="", accumulation=1, on_fleet=False):
    args = SimpleNamespace(
        pipeline_model_parallel_size=pipeline, sharding=sharding, gradient_accumulation_steps=accumulation
    )
    return SimpleNamespace(args=args, using_fleet_model=on_fleet)


def topology(tensor=1, sep=1):
    groups = FakeGroup(0, tensor), FakeGroup(0, sep)
    return SimpleNamespace(
        get_model_parallel_group=lambda: groups[0],
        get_sep_parallel_group=lambda: groups[1],
        get_sep_parallel_world_size=lambda: sep,
    )


@pytest.mark.parametrize(
    ("groups", "size"),
    [(None, None), (topology(), None), (topology(tensor=2), 2), (topology(sep=4), 4)],
)
def test_the_group_is_the_one_with_copies(monkeypatch, groups, size):
    """Tensor parallel, or sep; none on one process."""
    monkeypatch.setattr(audit, "topology", lambda: groups)
    group, why_not = audit._group_of(trainer())
    assert (None if group is None else group.nranks, why_not) == (size, "")


@pytest.mark.parametrize(
    ("given", "groups", "words"),
    [
        ({"pipeline": 2}, topology(tensor=2), "pipeline stage"),
        ({"sharding": "[<ShardingOption.SHARD_GRAD_OP: 'stage2'>]"}, topology(tensor=2), "stages 2 and 3"),
        ({"accumulation": 4, "on_fleet": True}, topology(tensor=2), "gradient_accumulation_steps"),
        ({}, topology(tensor=2, sep=2), "two groups"),
    ],
)
def test_what_is_not_audited(monkeypatch, given, groups, words):
    """The reason, for the warning."""
    monkeypatch.setattr(audit, "topology", lambda: groups)
    monkeypatch.setattr(audit, "_steps_by_itself", lambda trainer: trainer.using_fleet_model)
    group, why_not = audit._group_of(trainer(**given))
    assert group is None
    assert words in why_not


def test_balanced_towers_are_not_audited(monkeypatch):
    """A tower's gradient is of other ranks' images; without data-parallel ranks nothing is balanced."""
    monkeypatch.setattr(audit, "topology", lambda: topology(tensor=2))
    monkeypatch.setattr(audit, "is_any_balanced", lambda: True)
    for ranks, is_audited in ((1, True), (2, False)):
        monkeypatch.setattr(audit, "data_group", lambda ranks=ranks: FakeGroup(0, ranks))
        group, why_not = audit._group_of(trainer())
        assert (group is not None, "share their towers' work" not in why_not) == (is_audited, is_audited)
