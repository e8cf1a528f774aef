"""PaddleFormers' fleet Qwen3-VL for audits on real ranks, as it is or changed by this package."""

import contextlib
import dataclasses

import numpy as np
import paddle
import whole

from paddle_vl_sp import apply_to_qwen3_vl
from paddle_vl_sp.formers import tiny

FAULTS = {  # PaddleFormers' own, with the cause that the table names
    "upstream": "deepstack features under TP-SP: apply_to_qwen3_vl()",
    "upstream without SP": "q_norm/k_norm under TP",
}
SAMPLES = [["image"], ["image", "image"]]


@contextlib.contextmanager
def fleet_model(fault="", group=None, seed=2):
    """Under TP-SP, or under tensor parallelism alone if the fault says so; changed unless it is upstream's."""
    setting = dataclasses.replace(whole.SETTINGS[0], batches=((SAMPLES, seed),))
    with contextlib.nullcontext() if fault.startswith("upstream") else apply_to_qwen3_vl():
        model = whole.build(setting, group.nranks, sequence_parallel=not fault.endswith("without SP"))
        for name, parameter in model.named_parameters():
            parameter.set_value(paddle.to_tensor(drawn(name, parameter, group.rank, seed)))
        (batch,) = whole.draw(setting, tiny.tiny_qwen3_vl())
        batch = {name: paddle.to_tensor(value) for name, value in batch.items()}
        yield (lambda: model(**batch).loss), model


def drawn(name, parameter, rank, seed):
    """Copies are equal on all ranks, and a shard is each rank's own."""
    rng = np.random.default_rng([seed, *name.encode(), rank + 1 if parameter.is_distributed else 0])
    scale = 0.3 if "embed" in name else 0.1 if parameter.ndim == 1 else 0.5 / np.sqrt(parameter.shape[0])
    middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return (middle + scale * rng.standard_normal(parameter.shape)).astype("float32")
