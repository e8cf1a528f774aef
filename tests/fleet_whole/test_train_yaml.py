"""`paddleformers-cli train x.yaml` on two CPU ranks, with the plugin and switches only, against one rank."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("paddlefleet", reason="the command line builds the fleet class, over an installed paddlefleet")

import whole

import yaml_runs
from paddle_vl_sp.settings import AUDIT, CHECK, CONTEXT_PARALLEL, ENABLED, LOADER_PLANS

RUNS = {  # name: ranks, switches
    "one rank": (1, {}),
    "plugin": (2, {AUDIT: "strict"}),
    "plans": (2, {LOADER_PLANS: "1"}),
    "plans, checked": (2, {LOADER_PLANS: "1", CHECK: "1"}),
    "context parallel": (2, {CONTEXT_PARALLEL: "auto"}),
    "upstream": (2, {ENABLED: "0", LOADER_PLANS: "1", AUDIT: "1"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml")


@pytest.fixture(scope="module")
def found(folder):
    return yaml_runs.trained_in_all_ways(folder, "qwen3_vl", RUNS)


part = partial(whole.cut, nranks=2)


def distances(found, name):
    (one,), _ = found["one rank"]
    return yaml_runs.distances(one, found[name][0], ".vision_model.", part)


@pytest.mark.parametrize("name", ["plugin", "plans", "plans, checked"])
def test_after_four_steps_the_weights_are_those_of_one_rank(found, name):
    """fp32, after AdamW: copies equal bit for bit, all parameters within 1e-5; host syncs only without plans."""
    between, from_one = distances(found, name)
    assert between == 0
    assert from_one < 1e-5
    assert yaml_runs.said_syncs(found[name][1]) == (3 if name == "plugin" else 0)


def test_context_parallel_the_weights_are_those_of_one_rank(found):
    """fp32, after AdamW: all weights equal bit for bit on both ranks, within 1e-5 of one rank's; evaluation too."""
    yaml_runs.check_context_parallel(found["one rank"], found["context parallel"])


def test_upstream_the_copies_drift(found):
    """The reason; with PADDLE_VL_SP=0 the other switches do nothing."""
    between, from_one = distances(found, "upstream")
    assert between > 1e-3
    assert from_one > 1e-3
    assert "the data loader plans" not in found["upstream"][1]


def test_the_audit_sees_both(found):
    """In the log of the first rank: no wrong gradient with the plugin, deepstack's without it."""
    assert f"{AUDIT}: gradients over ranks 0, 1: nothing wrong found" in found["plugin"][1]
    told = found["upstream"][1]
    assert f"{AUDIT}: gradients over ranks 0, 1: " in told
    assert "deepstack features under TP-SP: apply_to_qwen3_vl()" in told


@pytest.mark.usefixtures("found")
def test_the_example_trains_as_on_one_rank(folder):
    """By the example's YAML with what a CPU needs: fp32, what each parameter learned is that of one rank to 1e-4."""
    start = dict(np.load(folder / "start.npz"))
    example = partial(yaml_runs.example, folder, "qwen3_vl", "sft_qwen3_vl_tp_sp", settings=yaml_runs.SMALLER)
    (one,), _ = example(1, "tensor_model_parallel_size=1 sequence_parallel=false", {})
    ranks, log = example(2, "tensor_model_parallel_size=2", {AUDIT: "1"})
    assert "global_step: 2" in log
    yaml_runs.check_learned_alike(start, ranks, [one, one], part)
