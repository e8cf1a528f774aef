"""PaddleFormers' own trainer under tensor-parallel sequence parallelism, on real ranks, against the same on one."""

import numpy as np
import paddle
import pytest

from paddle_vl_sp.formers import PlanningCollate, apply_to_qwen3_vl, report_to, tiny
from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel

SEQ_LEN, STEPS = 96, 6
SAMPLES = ([["image"], ["image"]], [["image", "image"], ["image"]], [["video"], ["video", "video"]])
WAYS = ("upstream", "patched", "plans of the loader", "vision dp")


class Batches(paddle.io.Dataset):
    def __init__(self, model, collate):
        self.batches = []
        for i, samples in enumerate(SAMPLES):
            batch = tiny.draw_batch(samples, SEQ_LEN, seed=i)
            self.batches.append(collate(batch | {"position_ids": tiny.positions(model, batch)}))

    def __len__(self):
        return STEPS

    def __getitem__(self, i):
        return self.batches[i % len(SAMPLES)]


def trained(model, folder, nranks, collate=dict):
    """The tower after some steps, and the run's report."""
    from paddleformers.trainer import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=2,
        report_to=[],
        save_strategy="no",
        device="cpu",
        disable_tqdm=True,
        amp_master_grad=False,
        max_grad_norm=0.0,  # upstream, its clipping expects an optimizer that mixed precision or sharding has wrapped
        tensor_model_parallel_size=nranks,
        sequence_parallel=nranks > 1,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Batches(model, collate), data_collator=lambda samples: samples[0]
    )
    report = report_to(trainer)
    trainer.train()
    return {name: value for name, value in tiny.weights_of(model).items() if "visual" in name}, report.summary


def on_ranks(nranks, folder):
    """What this rank has after each way of training."""
    enable_tensor_parallel_on_cpu()
    group = init_tensor_parallel(nranks)
    weights, found = tiny.weights_of(tiny.tiny_qwen3_vl()), {}

    def model():
        built = tiny.tiny_qwen3_vl(**tiny.tensor_parallel(nranks, SEQ_LEN))
        tiny.load_weights(built, weights, group.rank, nranks)
        return built

    planned = PlanningCollate(dict, (tiny.IMAGE, tiny.VIDEO), nranks, "flattened", tiny.MERGE)
    found["upstream"] = trained(model(), folder, nranks)
    with apply_to_qwen3_vl():
        found["patched"] = trained(model(), folder, nranks)
        found["plans of the loader"] = trained(model(), folder, nranks, planned)
        shared = model()
    with apply_to_qwen3_vl(shared, vision_dp=True):
        found["vision dp"] = trained(shared, folder, nranks)
    return found


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    paddle.set_device("cpu")
    with apply_to_qwen3_vl():
        return trained(tiny.tiny_qwen3_vl(), str(tmp_path_factory.mktemp("one")), 1)


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def found(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    return run_ranks(on_ranks, request.param, request.param, folder, timeout=300)


def distance(tower, other):
    one, two = (np.concatenate([weights[name].ravel() for name in tower]) for weights in (tower, other))
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


@pytest.mark.parametrize("way", WAYS[1:])
def test_the_towers_are_one_and_that_of_one_rank(found, on_one, way):
    """Bit-exact among the ranks; within fp32 of the tower trained on one rank."""
    towers = [rank[way][0] for rank in found]
    assert [distance(tower, towers[0]) for tower in towers] == [0.0] * len(towers)
    assert distance(towers[0], on_one[0]) < 1e-4


def test_upstream_they_drift_apart(found, on_one):
    """The reason."""
    towers = [rank["upstream"][0] for rank in found]
    assert max(distance(tower, towers[0]) for tower in towers) > 1e-3
    assert distance(towers[0], on_one[0]) > 1e-3


@pytest.mark.parametrize("way", WAYS[1:])
def test_the_report_is_that_of_the_group(found, on_one, way):
    """Equal on all ranks, with the tokens that one rank counts."""
    told = [rank[way][1] for rank in found]
    assert all(summary == told[0] for summary in told)
    assert told[0]["visual_tokens"] == sum(told[0]["tokens_of_ranks"]) == on_one[1]["visual_tokens"]
    assert len(told[0]["tokens_of_ranks"]) == len(found)
    assert (told[0]["syncs_here"] == 0) == (way == "plans of the loader")
