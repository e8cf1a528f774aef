"""PaddleFormers' default Qwen3-VL, on PaddleFleet, tiny and with random weights, on CPU ranks; needs paddlefleet.

    weights = draw_weights(tiny_qwen3_vl_fleet())
    model = tiny_qwen3_vl_fleet(**tiny.tensor_parallel(nranks, seq_len))
    load_weights(model, weights, rank, nranks)

Batches are those of `tiny.draw_batch`, with `tiny.positions` of the plain model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle.nn import Layer

from paddle_vl_sp.formers.tiny import TEXT, TOKENS, VISION, VOCAB

Weights = Mapping[str, npt.NDArray[Any]]


def tiny_qwen3_vl_fleet(**text: Any) -> Any:
    """In training mode; `text` goes into its text configuration."""
    from paddleformers.transformers.qwen3_vl.configuration import Qwen3VLConfig
    from paddleformers.transformers.qwen3_vl.modeling_fleet import Qwen3VLForConditionalGeneration

    nranks = text.get("tensor_model_parallel_size", 1)
    config = Qwen3VLConfig(
        text_config=TEXT | {"tie_word_embeddings": False} | text,
        vision_config=VISION | {"num_heads": 4, "tensor_model_parallel_size": nranks},
        tie_word_embeddings=False,
        **TOKENS,
    )
    config.tensor_model_parallel_size = nranks
    config.sequence_parallel = text.get("sequence_parallel", False)
    model = Qwen3VLForConditionalGeneration(config)
    model.train()
    return model


def draw_weights(model: Layer) -> dict[str, npt.NDArray[Any]]:
    """Random weights that are nowhere zero or one, the same in every process."""
    rng, weights = np.random.default_rng(0), {}
    for name, parameter in model.named_parameters():
        scale = 0.3 if "embed" in name else 0.1 if parameter.ndim == 1 else 0.5 / np.sqrt(parameter.shape[0])
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[name] = (middle + scale * rng.standard_normal(parameter.shape)).astype("float32")
    return weights


def load_weights(model: Layer, weights: Weights, rank: int = 0, nranks: int = 1) -> None:
    """Loads the weights of a one-rank model, cut for `rank` of `nranks`."""
    for name, parameter in model.named_parameters():
        parameter.set_value(paddle.to_tensor(cut(name, weights[name], rank, nranks)))


def cut(name: str, weight: npt.NDArray[Any], rank: int, nranks: int) -> npt.NDArray[Any]:
    """The part of a weight that a rank holds: attention and MLP of both towers, and the vocabulary, are cut."""
    is_vision = ".vision_model." in name
    if is_vision and ".decoder.layers." not in name:
        return weight
    if "up_gate_proj" in name and not is_vision:
        halves = np.split(weight, 2, axis=-1)
        return np.concatenate([np.split(half, nranks, axis=-1)[rank] for half in halves], axis=-1)
    if "qkv_proj" in name or "up_gate_proj" in name:
        return np.split(weight, nranks, axis=-1)[rank]
    is_vocabulary = weight.ndim == 2 and weight.shape[0] == VOCAB
    if name.endswith(("o_proj.weight", "down_proj.weight")) or is_vocabulary:
        return np.split(weight, nranks, axis=0)[rank]
    return weight
