"""PaddleFormers' own Qwen3-VL, tiny and with random weights, on the CPU: for tests and demonstrations.

    model = tiny_qwen3_vl()
    batch = draw_batch([["image"], ["video", "image"]], seq_len=64, seed=0)
    loss = model(**batch, position_ids=positions(model, batch)).loss

One sample is a list of kinds; its placeholders, grids and pixels are drawn. Under tensor parallelism the same weights
are cut for one rank by `load_weights(model, weights, rank, nranks)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle.nn import Layer

IMAGE, VIDEO, START, END, PAD, VOCAB = 500, 501, 502, 503, 0, 512
MERGE, PATCH, FRAMES, CHANNELS = 2, 4, 2, 3
PATCH_SIZE = CHANNELS * FRAMES * PATCH * PATCH
GRIDS = ((4, 4), (2, 4), (4, 6), (2, 2))
WORDS = 480  # ids below are words

TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "pad_token_id": PAD,
    "eos_token_id": PAD,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "in_channels": CHANNELS,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "out_hidden_size": 64,
    "fuse_rms_norm": False,  # the fused kernel is not there on the CPU
    "_attn_implementation": "eager",
}
VISION = {  # Qwen3-VL's
    **TOWER,
    "depth": 4,
    "hidden_act": "gelu",
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1, 2, 3],
}
WINDOWS = {  # Qwen2.5-VL's: attention within windows of 2 x 2 merged patches, and over a frame in the last block
    **TOWER,
    "depth": 3,
    "window_size": 2 * MERGE * PATCH,
    "fullatt_block_indexes": [2],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    "rope_theta": 10000.0,
    "fuse_rms_norm": False,
    "use_cache": False,
    "pad_token_id": PAD,
    "_attn_implementation": "eager",
}


def tiny_qwen3_vl(seed: int = 0, **text: Any) -> Any:
    """The plain dense model in training mode; `text` goes into its text configuration."""
    from paddleformers.transformers.qwen3_vl import modeling
    from paddleformers.transformers.qwen3_vl.configuration import Qwen3VLConfig

    config = Qwen3VLConfig(text_config=TEXT | text, vision_config=dict(VISION), tie_word_embeddings=False, **TOKENS)
    return drawn(modeling.Qwen3VLForConditionalGenerationDeprecated, config, seed)


def tiny_qwen3_vl_moe(seed: int = 0, **text: Any) -> Any:
    """The plain MoE model; its module needs paddlefleet."""
    from paddleformers.transformers.qwen3_vl_moe import modeling
    from paddleformers.transformers.qwen3_vl_moe.configuration import Qwen3VLMoeConfig

    settings = TEXT | EXPERTS | {"rope_parameters": TEXT["rope_scaling"]} | text
    config = Qwen3VLMoeConfig(text_config=settings, vision_config=dict(VISION), tie_word_embeddings=False, **TOKENS)
    return drawn(modeling.Qwen3VLMoeForConditionalGenerationDeprecated, config, seed)


def tiny_qwen2_5_vl(seed: int = 0, **text: Any) -> Any:
    """Qwen2.5-VL in training mode; its batches are drawn with frames_apart=False."""
    from paddleformers.transformers.qwen2_5_vl import modeling
    from paddleformers.transformers.qwen2_5_vl.configuration import Qwen2_5_VLConfig

    known = {key: value for key, value in TEXT.items() if key not in ("rope_scaling", "head_dim")}
    known["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(text_config=known | text, vision_config=WINDOWS, tie_word_embeddings=False, **TOKENS)
    return drawn(modeling.Qwen2_5_VLForConditionalGeneration, config, seed)


def tiny_glm_ocr(seed: int = 0) -> Any:
    """GLM-OCR in training mode: images only."""
    from paddleformers.transformers.glm_ocr import modeling
    from paddleformers.transformers.glm_ocr.configuration import GlmOcrConfig

    text = {key: value for key, value in TEXT.items() if key != "rope_scaling"}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END}
    config = GlmOcrConfig(text_config=text, vision_config=TOWER | {"depth": 3, "image_size": 4 * PATCH}, **ids)
    return drawn(modeling.GlmOcrForConditionalGeneration, config, seed)


def drawn(model_class: Any, config: Any, seed: int) -> Any:
    """In training mode, with random weights by the seed."""
    paddle.seed(seed)
    model = model_class(config)
    model.train()
    return model


def tensor_parallel(nranks: int, seq_len: int, sequence_parallel: bool = True) -> dict[str, Any]:
    """The text settings of a model on `nranks` CPU ranks, for batches of `seq_len`."""
    return {
        "tensor_model_parallel_size": nranks,
        "sequence_parallel": sequence_parallel,
        "max_sequence_length": seq_len,
        "tensor_parallel_output": False,  # the parallel cross entropy has no CPU kernel
    }


def draw_batch(
    samples: Sequence[Sequence[str]], seq_len: int = 64, seed: int = 0, frames_apart: bool = True
) -> dict[str, Any]:
    """input_ids and labels [B, S], pixels [patches, 96], grids [items, 3]; keys only where there is something.

    frames_apart  every frame of a video is between its own start and end, as for Qwen3-VL; else the whole video is
    """
    rng = np.random.default_rng(seed)
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    ids = np.stack([_draw_row(rng, kinds, seq_len, grids, frames_apart) for kinds in samples])
    batch = {"input_ids": paddle.to_tensor(ids), "labels": paddle.to_tensor(shifted_labels(ids))}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            thw = np.asarray(grids[kind], dtype=np.int64)
            values = rng.standard_normal((int(thw.prod(axis=1).sum()), PATCH_SIZE)).astype("float32")
            batch |= {pixels: paddle.to_tensor(values), f"{kind}_grid_thw": paddle.to_tensor(thw)}
    return batch


def _draw_row(
    rng: np.random.Generator,
    kinds: Sequence[str],
    seq_len: int,
    grids: dict[str, list[tuple[int, int, int]]],
    frames_apart: bool,
) -> npt.NDArray[np.int64]:
    """One sample [S]."""
    row = list(rng.integers(1, WORDS, rng.integers(2, 6)))
    for kind in kinds:
        height, width = GRIDS[rng.integers(len(GRIDS))]
        frames = 1 if kind == "image" else int(rng.integers(1, 3))
        grids[kind].append((frames, height, width))
        times, together = (frames, 1) if frames_apart else (1, frames)
        for _ in range(times):
            row += [START, *[IMAGE if kind == "image" else VIDEO] * (together * height * width // MERGE**2), END]
            row += list(rng.integers(1, WORDS, rng.integers(1, 4)))
    if len(row) > seq_len:
        raise ValueError(f"a sample of {len(row)} tokens does not fit into seq_len {seq_len}: draw fewer items")
    return np.asarray(row + list(rng.integers(1, WORDS, seq_len - len(row))), dtype=np.int64)


def shifted_labels(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """labels[t] = ids[t + 1]; -100 at the end and wherever that is not a word."""
    labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -100)], axis=1)
    return np.where(labels < WORDS, labels, -100)


def positions(model: Layer, batch: dict[str, Any]) -> Any:
    """Position ids [3, B, S] by the model's own rule, as a collate function puts them into a batch."""
    grids = batch.get("image_grid_thw"), batch.get("video_grid_thw")
    return model.model.get_rope_index(batch["input_ids"], *grids)[0]


def weights_of(model: Layer) -> dict[str, npt.NDArray[Any]]:
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


def gradients_of(model: Layer) -> dict[str, npt.NDArray[Any]]:
    """The gradients there are: a text-only batch gives the tower none."""
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def drop_gradients(model: Layer) -> None:
    model.clear_gradients(set_to_zero=False)  # a parameter's own clear_gradient leaves zeros


def load_weights(model: Layer, weights: dict[str, npt.NDArray[Any]], rank: int = 0, nranks: int = 1) -> None:
    """Loads the weights of a one-rank model, cut for `rank` of `nranks`."""
    for name, parameter in model.named_parameters():
        parameter.set_value(paddle.to_tensor(cut(name, weights[name], rank, nranks)).astype(parameter.dtype))


def cut(name: str, weight: npt.NDArray[Any], rank: int, nranks: int) -> npt.NDArray[Any]:
    """The part of a weight that rank `rank` holds; the tower and the norms are whole everywhere."""
    if name.startswith("model.visual."):
        return weight
    if name.endswith(("qkv_proj.weight", "qkv_proj.bias")):
        return np.split(weight, nranks, axis=-1)[rank]
    if name.endswith("up_gate_proj.weight"):
        halves = np.split(weight, 2, axis=1)
        return np.concatenate([np.split(half, nranks, axis=1)[rank] for half in halves], axis=1)
    if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
        return np.split(weight, nranks, axis=0)[rank]
    return weight


def sum_marked_gradients(model: Layer, group: Any) -> None:
    """What the trainer does before an optimizer step: sums the gradients of sequence-parallel parameters."""
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.grad is not None:
            paddle.distributed.all_reduce(parameter.grad, group=group)
