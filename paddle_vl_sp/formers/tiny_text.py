"""PaddleFormers' own text-only models, tiny and with random weights, on the CPU; their modules need paddlefleet.

Batches are those of `tiny.draw_batch` with samples of text: ``draw_batch([[], []], seq_len=64)``.
"""

from __future__ import annotations

from typing import Any

from paddle_vl_sp.formers.tiny import EXPERTS, TEXT, drawn

WORDS_ALONE: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "rope_scaling"} | {
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MIXED = {  # Qwen3-Next's: three kinds of layers are there, as well as experts and a dense one
    **WORDS_ALONE,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
    "mlp_only_layers": [2],
    "partial_rotary_factor": 0.5,
    "_attn_implementation": "sdpa",  # its mask is None, with which eager attention is not causal
}


def tiny_qwen2(seed: int = 0, **text: Any) -> Any:
    """The plain dense model in training mode; `text` goes into its configuration."""
    from paddleformers.transformers.qwen2 import configuration, modeling

    return drawn(modeling.Qwen2ForCausalLMDeprecated, configuration.Qwen2Config(**WORDS_ALONE | text), seed)


def tiny_qwen3(seed: int = 0, **text: Any) -> Any:
    """The plain dense model."""
    from paddleformers.transformers.qwen3 import configuration, modeling

    return drawn(modeling.Qwen3ForCausalLMDeprecated, configuration.Qwen3Config(**WORDS_ALONE | text), seed)


def tiny_qwen3_moe(seed: int = 0, **text: Any) -> Any:
    """The plain model with experts."""
    from paddleformers.transformers.qwen3_moe import configuration, modeling

    config = configuration.Qwen3MoeConfig(**WORDS_ALONE | EXPERTS | text)
    return drawn(modeling.Qwen3MoeForCausalLMDeprecated, config, seed)


def tiny_qwen3_next(seed: int = 0, **text: Any) -> Any:
    """Gated DeltaNet and full attention, experts and a dense layer."""
    from paddleformers.transformers.qwen3_next import configuration, modeling

    config = configuration.Qwen3NextConfig(**MIXED | EXPERTS | text)
    model = drawn(modeling.Qwen3NextForCausalLM, config, seed)
    embeddings = model.model.embed_tokens.weight
    # of size one: with small ones, one bit of a weight moves a gradient by 1e-5
    embeddings.set_value(embeddings / embeddings.std())
    return model
