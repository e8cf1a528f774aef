"""Qwen2.5-VL by `paddleformers-cli train x.yaml` on two CPU ranks, with the plugin and switches only, against one rank.

PaddleFormers' own example of sequence-parallel VL training is of this model, which needs no PaddleFleet. The same under
context parallelism, with `sep_parallel_size: 2` in the YAML. And this repository's examples for GPUs, with what a CPU
needs.
"""

import re
from functools import partial

import numpy as np
import pytest

import yaml_runs
from paddle_vl_sp.formers import tiny
from paddle_vl_sp.settings import CHECK, CONTEXT_PARALLEL, ENABLED, LOADER_PLANS, VISION_DP

DATA = "split_param=false"  # sharding of stage 1, without what it needs amp for
RUNS = {
    "one rank": (1, {ENABLED: "0"}),
    "plugin": (2, {}),
    "all switches": (2, {LOADER_PLANS: "1", VISION_DP: "1", CHECK: "1"}),
    "data parallel": (2, {yaml_runs.DATA: DATA}),
    "balanced": (2, {yaml_runs.DATA: DATA, VISION_DP: "data"}),
    "context parallel": (2, {CONTEXT_PARALLEL: "auto", LOADER_PLANS: "1", VISION_DP: "1"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml")


@pytest.fixture(scope="module")
def found(folder):
    return yaml_runs.trained_in_all_ways(folder, "qwen2_5_vl", RUNS)


def part(name, weights, rank):
    """Of a whole weight, on one of two tensor-parallel ranks."""
    return tiny.cut(name, weights[name], rank, 2)


@pytest.mark.parametrize("name", ["plugin", "all switches"])
def test_after_four_steps_the_weights_are_those_of_one_rank(found, name):
    """fp32, after AdamW: the tower's copies equal bit for bit, all parameters within 1e-5; host syncs without plans."""
    (one,), _ = found["one rank"]
    between, from_one = yaml_runs.distances(one, found[name][0], "model.visual.", part)
    assert between == 0
    assert from_one < 1e-5
    log = found[name][1]
    assert yaml_runs.said_syncs(log) == (3 if name == "plugin" else 0)
    assert (
        f"Qwen2.5-VL: {1 if name == 'plugin' else 2} replaced" in log
    )  # its forward; and its constructor, which shares


def test_data_parallel_ranks_balance_their_towers(found):
    """All weights those of unbalanced data parallelism within 1e-5, and the evaluation; work moved, in a report."""
    (wanted, _), plain = found["data parallel"]
    ranks, log = found["balanced"]
    between, apart = yaml_runs.distances(wanted, ranks, "", lambda key, weights, _: weights[key])
    assert between == 0
    assert apart < 1e-5
    assert abs(yaml_runs.said_evaluation(log) - yaml_runs.said_evaluation(plain)) < 1e-5
    ((busiest, at_home),) = re.findall(r"busiest tower over the mean: ([\d.]+), at home ([\d.]+)", log)
    assert float(busiest) < float(at_home)


def test_context_parallel_the_weights_are_those_of_one_rank(found):
    """fp32, after AdamW: all weights equal bit for bit on both ranks, within 1e-5 of one rank's; evaluation too."""
    yaml_runs.check_context_parallel(found["one rank"], found["context parallel"])


def test_the_examples_for_gpus_train_with_few_other_settings(found, folder):
    """By the examples' YAMLs, under tensor-parallel sequence parallelism and under context parallelism: fp32, what each
    parameter learned is the same to 1e-4."""
    start = dict(np.load(folder / "start.npz"))
    example = partial(yaml_runs.example, folder, "qwen2_5_vl", settings=yaml_runs.SMALLER)
    cut, log = example("sft_qwen2_5_vl_tp_sp", 2, "tensor_model_parallel_size=2", {VISION_DP: "1"})
    shared, other_log = example("sft_context_parallel", 2, "sep_parallel_size=2", {CONTEXT_PARALLEL: "auto"})
    assert all("global_step: 2" in each for each in (log, other_log))
    yaml_runs.check_learned_alike(start, cut, shared, part)
