from paddle.distributed.fleet.meta_parallel import ScheduleNode
from paddlefleet.tensor_parallel.layers import ColumnParallelLinear


class GPTLMHead(ColumnParallelLinear):
    def __init__(self, **kwargs):
        skips = kwargs.pop("skip_weight_param_allocation")
        super().__init__(skip_weight_param_allocation=True, **kwargs)
        if not skips:
            self.weight = self.create_parameter([self.output_size_per_partition, self.input_size])
            kwargs["init_method"](self.weight)

    @property
    def embedding_weight(self):
        return self.weight

    def build_schedule_node(self):
        return ScheduleNode(self.forward, name="GPTLMHead")

    def forward(self, dict_args):
        logits, _ = super().forward(dict_args["hidden_states"], self.weight.T)
        return logits.transpose([1, 0, 2]) if self.config.sequence_parallel else logits
