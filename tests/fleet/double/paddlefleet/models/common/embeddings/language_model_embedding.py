import paddle
from paddlefleet.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from paddlefleet.transformer.layer import FleetLayer
from paddlefleet.utils import get_tensor_model_parallel_group_if_none


class EmbedTokens(paddle.nn.Layer):
    """Stands for the vocabulary-parallel table; every rank holds all of it."""

    def __init__(self, num_embeddings, config):
        super().__init__()
        self.reduce_scatter_embeddings = False
        self.weight = self.create_parameter([num_embeddings, config.hidden_size], dtype=config.params_dtype)
        config.embedding_init_method(self.weight)

    def forward(self, input_ids):
        return paddle.nn.functional.embedding(input_ids, self.weight)


class LanguageModelEmbedding(FleetLayer):
    def __init__(
        self,
        config,
        vocab_size,
        max_sequence_length,
        position_embedding_type="learned_absolute",
        num_tokentypes=0,
        scatter_to_sequence_parallel=True,
        tp_group=None,
    ):
        super().__init__(config)
        self.sequence_parallel = config.sequence_parallel
        self.scatter_to_sequence_parallel = scatter_to_sequence_parallel
        self.reduce_scatter_embeddings = False
        self.tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        self.embed_tokens = EmbedTokens(vocab_size, config)
        self.embedding_dropout = paddle.nn.Dropout(config.hidden_dropout_prob)

    @property
    def embedding_weight(self):
        return self.embed_tokens.weight

    def forward(self, input_ids, position_ids, tokentype_ids=None):
        embeddings = self.embed_tokens(input_ids)  # [B, S, H]
        if self.config.fp32_residual_connection:
            embeddings = embeddings.astype("float32")
        if self.sequence_parallel and self.scatter_to_sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings.transpose([1, 0, 2]), self.tp_group)
        return self.embedding_dropout(embeddings)
