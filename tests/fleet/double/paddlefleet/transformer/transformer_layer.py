import paddle
from paddle.distributed.fleet.utils import recompute
from paddlefleet.transformer.layer import FleetLayer


class TransformerLayer(FleetLayer):
    """Attention that mixes nothing and an MLP that scales: enough to carry a dict and to be recomputed."""

    def __init__(self, config, sublayers_spec=None, layer_number=1, hidden_dropout_prob=None, pg_collection=None):
        super().__init__(config)
        self.layer_number = layer_number
        self.full_recompute = config.full_recompute
        self.scale = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(1.0))

    def forward(self, dict_args):
        if self.full_recompute:
            hidden = recompute(self._forward_impl, hidden_states=dict_args["hidden_states"])
        else:
            hidden = self._forward_impl(**dict_args)
        return {**dict_args, "hidden_states": hidden}

    def _forward_impl(self, hidden_states, **kwargs):
        hidden, _ = self._forward_attention(hidden_states=hidden_states, **kwargs)
        return self._forward_mlp(hidden)

    def _forward_attention(self, hidden_states, **kwargs):
        return hidden_states * self.scale, None

    def _forward_mlp(self, hidden_states):
        return hidden_states
