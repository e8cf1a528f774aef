"""The report of a run on real ranks: the same on all, and what the plans of all ranks say."""

import numpy as np
import pytest

from paddle_vl_sp import RunReport, SeqLayout, plan_visual
from paddle_vl_sp.formers import PlanningCollate, apply_to_qwen3_vl, tiny
from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel

SEQ_LEN = 96
SAMPLES = ([["image", "image"]], [["image", "image"], ["image"], [], ["image", "image", "image"]], [[], []])


def batches():
    return [tiny.draw_batch(samples, SEQ_LEN, seed=i) for i, samples in enumerate(SAMPLES)]


def reports(nranks):
    """What each way of running tells."""
    enable_tensor_parallel_on_cpu()
    group = init_tensor_parallel(nranks)
    model = tiny.tiny_qwen3_vl(**tiny.tensor_parallel(nranks, SEQ_LEN))
    planned = PlanningCollate(dict, (tiny.IMAGE, tiny.VIDEO), nranks, "flattened", tiny.MERGE)
    told = {"rank": group.rank}

    def read(collate=dict):
        with RunReport() as report:
            for batch in map(collate, batches()):
                model(**batch, position_ids=tiny.positions(model, batch)).loss.backward()
        return report.read()

    with apply_to_qwen3_vl():
        told |= {"planned here": read(), "planned by the loader": read(planned)}
    with apply_to_qwen3_vl(model, vision_dp=True):
        told["vision dp"] = read()
    return told


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def told(request):
    return run_ranks(reports, request.param, request.param, timeout=240)


def tokens(nranks):
    """[forwards with visual tokens, ranks]: the visual tokens of every rank, the batch flattened before the cut."""
    counts = []
    for batch in batches():
        flat = np.isin(batch["input_ids"].numpy(), (tiny.IMAGE, tiny.VIDEO)).reshape(1, -1)
        layouts = [SeqLayout(flat.shape[1], sp_size=nranks, sp_rank=rank) for rank in range(nranks)]
        plans = [plan_visual(flat, None, layout, sequence_first=False) for layout in layouts]
        counts.append([len(plan.update_indices) for plan in plans])
    return np.array([row for row in counts if any(row)])


@pytest.mark.parametrize("way", ["planned here", "planned by the loader", "vision dp"])
def test_every_rank_tells_the_same_and_it_is_right(told, way):
    """Exact counts from plans made one by one; ratios to pytest's 1e-6."""
    wanted = tokens(len(told))
    for rank in told:
        got = rank[way]
        assert got == told[0][way]
        assert got["forwards"] == len(wanted) == 2
        assert got["tokens_of_ranks"] == wanted.sum(axis=0).tolist()
        assert got["visual_tokens"] == wanted.sum()
        assert got["imbalance"] == pytest.approx((wanted.max(axis=1) / wanted.mean(axis=1)).mean())
        assert got["empty_ranks"] == (wanted == 0).sum(axis=1).mean()


def test_host_syncs_of_the_visual_path(told):
    """One a forward where the model plans, under sequence parallelism too; none with the loader's plans."""
    assert (told[0]["planned here"]["syncs_here"], told[0]["planned by the loader"]["syncs_here"]) == (2, 0)


def test_only_shared_work_has_an_imbalance(told):
    """The key is there with Vision DP alone, and within its bounds."""
    assert "vision_imbalance" not in told[0]["planned here"]
    assert 1.0 <= told[0]["vision dp"]["vision_imbalance"] <= len(told)
