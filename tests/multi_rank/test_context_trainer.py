"""PaddleFormers' own trainer with sep_parallel_size=2 on two ranks against one process.

The bar: after four AdamW steps of two batches each, the weights are those of one process within 1e-5 of what was
learned, and the same bits on both ranks. Evaluation and checkpoints are those of one process as well.
"""

import numpy as np
import pytest
from context_training import STEPS, WAYS, of_one, on_ranks, trained

from arrays import same_bits
from paddle_vl_sp.formers import apply_to_paddleformers
from paddle_vl_sp.testing import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def one(folder):
    """The same for all ways that differ in nothing but how it is computed."""
    found = of_one(folder / "one")
    return {name: found.get(name, found["evaluated"]) for name in (*WAYS, "upstream, text")}


@pytest.fixture(scope="module")
def ranks(one, folder):
    return run_ranks(on_ranks, 2, 2, folder / "ranks", folder / "one", timeout=300)


def distance(found, wanted):
    """Of the weights, relative to what one process learned."""
    start, right, *_ = wanted
    joined = [np.concatenate([weights[name].ravel() for name in right]) for weights in (found[1], right, start)]
    return float(np.linalg.norm(joined[0] - joined[1]) / np.linalg.norm(joined[1] - joined[2]))


def logged(found, key):
    return [logs[key] for logs in found[2] if key in logs]


@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_of_one_process(ranks, one, way):
    first, second = (rank[way] for rank in ranks)
    assert same_bits(list(first[1].values()), list(second[1].values()))
    assert distance(first, one[way]) < 1e-5
    np.testing.assert_allclose(logged(first, "loss"), logged(one[way], "loss"), rtol=1e-5)


@pytest.mark.parametrize("way", ["auto", "Qwen2.5-VL"])
def test_the_report_is_of_all_ranks(ranks, one, way):
    """Exact, and equal on both: which rank had how many of the visual tokens."""
    first, second = (rank[way][3] for rank in ranks)
    assert first == second
    assert len(first["tokens_of_ranks"]) == 2
    assert sum(first["tokens_of_ranks"]) == first["visual_tokens"] == one[way][3]["visual_tokens"] > 0


@pytest.mark.parametrize(("way", "key"), [("auto", "eval_loss"), ("gather", "eval_loss"), ("gather", "eval_accuracy")])
def test_evaluation_is_that_of_one_process(ranks, one, way, key):
    """A loss alone is computed on the parts; predictions are of the whole sequence on every rank. fp32."""
    for rank in ranks:
        np.testing.assert_allclose(logged(rank[way], key), logged(one[way], key), rtol=1e-6)


def test_a_checkpoint_of_one_process_is_continued_by_ranks(ranks, one):
    """Weights, AdamW's moments, and where in the data it was; names and shapes are the same."""
    resumed = ranks[0]["resumed from one"]
    assert {name: value.shape for name, value in resumed[1].items()} == {
        name: value.shape for name, value in one["auto"][1].items()
    }
    assert len(logged(resumed, "loss")) == len(logged(one["auto"], "loss")) - STEPS // 2
    assert distance(resumed, one["auto"]) < 1e-5


def test_a_checkpoint_of_ranks_is_continued_by_one_process(ranks, one, folder):
    checkpoint = folder / "ranks" / "auto" / f"checkpoint-{STEPS // 2}"
    with apply_to_paddleformers(families="qwen3_vl"):
        resumed = trained(WAYS["auto"], folder / "back", 1, checkpoint)
    assert len(logged(resumed, "loss")) == len(logged(one["auto"], "loss")) - STEPS // 2
    assert distance(resumed, one["auto"]) < 1e-5


def test_upstream_splits_what_is_no_sequence(ranks):
    """The reason: it cuts the grids of images along their last axis, and batches of text train on parts alone."""
    assert "evenly divisible by Attr(num_or_sections)" in ranks[0]["upstream"]


def test_upstream_text_is_trained_in_parts(ranks, one):
    """The ranks agree with each other, and what they learned is not it; nothing is said."""
    first, second = (rank["upstream, text"] for rank in ranks)
    assert same_bits(list(first[1].values()), list(second[1].values()))
    assert distance(first, one["upstream, text"]) > 0.5


def test_the_axis_without_the_setting_is_refused(ranks):
    for rank in ranks:
        assert rank["no setting"].startswith("sep_parallel_size=2 with Qwen3VL")
