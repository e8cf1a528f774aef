"""Two pipeline stages by Paddle's PipelineParallel on real ranks, with deepstack layers in both, against one process.

Micro-batches have different numbers of visual tokens, and one has none: the stages exchange shapes every time.
"""

import sys
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import LayerDesc, PipelineLayer, PipelineParallel

from paddle_vl_sp.formers import deepstack
from paddle_vl_sp.formers.changes import replace, revert
from paddle_vl_sp.formers.families import qwen3_vl_fleet
from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import _default_group_for_all_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "fleet"))
from fleet_cases import BOTH, IMAGES, KIND_IDS, a_batch, build, config, reading_order, some_ids, table
from formers_layer import formers_layer

from fleet_parts import WIDTH, build_layer, scaled
from stub_paddlefleet import use_paddlefleet

NUM_LAYERS, NUM_LEVELS = 5, 4  # with the first layer [3, 3]: levels 0 and 1 in the first stage, 2 and 3 in the second
MICRO_BATCHES = (
    ((IMAGES, 0.5), (IMAGES, 0.1)),
    ((IMAGES, 0.3), ((), 0)),
    (((), 0), ((), 0)),
    ((BOTH, 0.5), (IMAGES, 0.9)),
)
WIRINGS = ("our embedding and layers", "their embedding and layers, replaced")


class First(paddle.nn.Layer):
    """The embedding, with features that a tower made."""

    def __init__(self, wiring):
        super().__init__()
        from paddle_vl_sp.fleet import VisualGPTEmbedding

        self.embedding = build(
            config(pipeline_model_parallel_size=2), VisualGPTEmbedding if wiring == WIRINGS[0] else None
        )
        self.gain = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(1.5))

    def forward(self, batch):
        features = {
            key: [x * self.gain for x in value] if isinstance(value, list) else value * self.gain
            for key, value in batch.items()
            if key.endswith("_embeds") and value is not None
        }
        return self.embedding(batch | features)


class Deep(paddle.nn.Layer):
    """One transformer layer that scales, and adds its level."""

    def __init__(self, wiring, number):
        super().__init__()
        from paddle_vl_sp.fleet import VisualTransformerLayer

        base = VisualTransformerLayer if wiring == WIRINGS[0] else replaced_layer()
        self.layer = build_layer(scaled(base), config(pipeline_model_parallel_size=2), number)
        self.layer.scale.set_value(np.array([0.8 + 0.1 * number], "float32"))

    def forward(self, given):
        return self.layer(given)


def replaced_layer():
    layer = formers_layer()
    replace(layer, "_deepstack_process", deepstack.deepstack)
    replace(layer, "forward", qwen3_vl_fleet.layer_forward)
    return layer


def loss_of(out, weight):
    return (out["hidden_states"] ** 2 * weight).mean()


def drawn(wiring, step):
    """The micro-batches of one step, and the weights of their losses."""
    for i, (kinds, density) in enumerate(MICRO_BATCHES[step]):
        if kinds == BOTH and wiring != WIRINGS[0]:
            kinds = IMAGES  # PaddleFleet's own embedding raises on both
        seed = 10 * step + i
        batch = a_batch(some_ids(kinds, 2, 8, seed, density or 0.5), kinds, NUM_LEVELS, seed)
        batch = {key: value for key, value in batch.items() if value is not None}
        yield batch, paddle.to_tensor(np.random.default_rng(seed).standard_normal((2, 8, 6)).astype("float32"))


def on_one(wiring, step):
    """Loss and gradients by hand, in plain Paddle, on the whole batch: of the embedding, then of each layer's scale."""
    weights, gain = paddle.to_tensor(table(), stop_gradient=False), paddle.to_tensor([1.5], stop_gradient=False)
    scales = [paddle.to_tensor([0.8 + 0.1 * number], stop_gradient=False) for number in range(NUM_LAYERS)]
    total = 0.0
    for batch, weight in drawn(wiring, step):
        ids = batch["input_ids"].numpy()
        kinds = [kind for kind in BOTH if f"{kind}_embeds" in batch]
        visual = np.isin(ids, [KIND_IDS[kind] for kind in kinds])
        rows = np.eye(ids.size, dtype=np.float32)[:, np.flatnonzero(visual)]  # [B * S, N], one where a row goes

        def placed(number, batch=batch, kinds=kinds, rows=rows, shape=(*ids.shape, WIDTH)):
            features = paddle.to_tensor(reading_order(batch, kinds, number)) * gain
            return (paddle.to_tensor(rows) @ features).reshape(shape)

        hidden = paddle.nn.functional.embedding(batch["input_ids"], weights)
        if kinds:
            hidden = paddle.where(paddle.to_tensor(visual).unsqueeze(-1), placed(0), hidden)
        for number, scale in enumerate(scales):
            hidden = hidden * scale
            if kinds and number < NUM_LEVELS:
                hidden = hidden + placed(1 + number)
        loss = (hidden**2 * weight).mean() / len(MICRO_BATCHES[step])
        loss.backward()
        total += float(loss)
    return total, [[gradient_of(gain), gradient_of(weights)], *([gradient_of(scale)] for scale in scales)]


def gradient_of(parameter):
    return np.zeros(parameter.shape, "float32") if parameter.grad is None else parameter.grad.numpy()


def measure():
    """For each wiring and step: the loss's error, and the worst gradient's of this rank's layers."""
    use_paddlefleet()
    strategy = fleet.DistributedStrategy()
    p2p = {"use_batch_p2p_comm": False, "enable_dynamic_shape": True}  # gloo has no batched exchange
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 2, "pp_configs": p2p}
    strategy.pipeline_configs = {"accumulate_steps": 2, "micro_batch_size": 1}
    with _default_group_for_all_ranks():
        fleet.init(is_collective=True, strategy=strategy)
    if not hasattr(dist.ParallelEnv, "_device_id"):
        dist.ParallelEnv._device_id = 0  # PipelineLayer reads it, and Paddle for the CPU never sets it
    groups, found = fleet.get_hybrid_communicate_group(), {}
    for wiring in WIRINGS:
        wanted = [on_one(wiring, step) for step in range(len(MICRO_BATCHES))]
        found[wiring] = piped(wiring, groups, strategy, wanted)
    revert()
    return found


def piped(wiring, groups, strategy, wanted):
    described = [LayerDesc(First, wiring), *(LayerDesc(Deep, wiring, number) for number in range(NUM_LAYERS))]
    model = PipelineLayer(described, topology=groups.topology(), loss_fn=loss_of, seg_method="uniform")
    runner = PipelineParallel(model, groups, strategy)
    first, told = groups.get_stage_id() * (len(described) // 2), []
    for step, (loss, gradients) in enumerate(wanted):
        model.clear_gradients(set_to_zero=False)
        got = float(runner.forward_backward_pipeline(iter(list(drawn(wiring, step)))))
        errors = [
            float(np.linalg.norm(gradient_of(p) - right) / max(np.linalg.norm(right), 1e-30))
            for layer, rights in zip(model.run_function, gradients[first:], strict=False)
            for p, right in zip(sorted(layer.parameters(), key=lambda p: p.size), rights, strict=True)
        ]
        told.append((abs(got - loss), max(errors), len(errors)))
    return told


@pytest.mark.parametrize("wiring", WIRINGS)
def test_two_stages_are_one_process(found, wiring):
    """fp32 rounding: the loss and every gradient of both stages, step after step."""
    for rank in found:
        for loss, gradient, count in rank[wiring]:
            assert count >= 3
            assert loss < 1e-6
            assert gradient < 1e-6


@pytest.fixture(scope="module")
def found():
    return run_ranks(measure, 2, timeout=120)
