"""What an embedding or a layer of PaddleFleet is built from: its own objects where it is installed."""

import types

import paddle

WIDTH = 6
FIELDS = {
    "sequence_parallel": False,
    "multimodal_embedding": True,
    "pad_token_id": 0,
    "num_nextn_predict_layers": None,
    "mtp_load_weight_only": False,
    "enable_mtp_magic_send": False,
    "clone_scatter_output_in_embedding": True,
    "apply_rope_fusion": False,
    "hidden_size": WIDTH,
    "params_dtype": "float32",
    "deterministic_mode": False,
    "perform_initialization": True,
    "embedding_init_method": paddle.nn.initializer.Normal(0.0, 1.0),
    "hidden_dropout_prob": 0.0,
    "fp32_residual_connection": False,
    "sliding_window": None,
    "experimental_dataflow": False,
    "expert_model_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "multi_latent_attention": False,
    "gpt_model_use_experimental_version": False,
    "cp_balance_mode": "dualchunk_allgather",
    "max_sequence_length": 64,
    "use_accuracy_compatible": False,
    "layer_types": None,
    "num_empty_layers_add_in_head": 0,
    "recompute_granularity": None,
}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def fleet_config(**given):
    """PaddleFleet's own configuration with these fields; for the double exactly them, so that reading another raises.

    They are set after it was made: its constructor takes sequence parallelism back where no group is there yet.
    """
    import paddlefleet

    if getattr(paddlefleet, "IS_DOUBLE", False):
        return types.SimpleNamespace(**FIELDS | given)
    from paddlefleet.models.gpt.gpt_config import GPTConfig

    config = GPTConfig(num_hidden_layers=1, hidden_size=WIDTH, num_attention_heads=1)
    for field, value in (FIELDS | given).items():
        setattr(config, field, value)
    return config


def build_layer(cls, config, layer_number=0):
    """A layer without attention and MLP: PaddleFleet's specification where everything is the identity."""
    from paddlefleet.transformer.transformer_layer import TransformerLayerSublayersSpec

    return cls(config, TransformerLayerSublayersSpec(), layer_number=layer_number)


def scaled(base):
    """A subclass of a transformer layer whose attention multiplies by one parameter, so that layers differ."""

    class ScaledTransformerLayer(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(1.0))

        def _forward_attention(self, hidden_states, **kwargs):
            return hidden_states * self.scale, None

    return ScaledTransformerLayer
