from dataclasses import dataclass

from paddle.distributed.fleet.meta_parallel import LayerSpec
from paddlefleet.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from paddlefleet.models.gpt.gpt_embedding import GPTEmbedding, GPTEmbeddingSpec
from paddlefleet.models.gpt.lm_head import GPTLMHead  # noqa: F401


@dataclass
class GPTSublayersSpec:
    embedding: LayerSpec
    transformer_layers: list


def get_gpt_spec(
    config,
    transformer_layers_spec,
    mtp_layers_spec,
    vocab_size,
    max_sequence_length,
    position_embedding_type="learned_absolute",
):
    embedding = LayerSpec(
        layer=GPTEmbedding,
        sublayers_spec=GPTEmbeddingSpec(LayerSpec(layer=LanguageModelEmbedding), None),
        extra_kwargs={
            "config": config,
            "vocab_size": vocab_size,
            "max_sequence_length": max_sequence_length,
            "position_embedding_type": position_embedding_type,
        },
    )
    return LayerSpec(layer=object, sublayers_spec=GPTSublayersSpec(embedding, transformer_layers_spec))
