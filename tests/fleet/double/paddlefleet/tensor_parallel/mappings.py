import paddle
import paddle.distributed as dist
from paddlefleet.utils import get_tensor_model_parallel_group_if_none


class _CutRows(paddle.autograd.PyLayer):
    """Rows of rank r forward; all ranks' rows backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        part, rest = divmod(x.shape[0], group.nranks)
        assert rest == 0, "First dimension of the tensor should be divisible by tensor parallel size"
        return x[group.rank * part : (group.rank + 1) * part].contiguous()

    @staticmethod
    def backward(ctx, grad):
        parts = []
        dist.all_gather(parts, grad.contiguous(), group=ctx.group)
        return paddle.concat(parts)


def scatter_to_sequence_parallel_region(input_, group=None):
    group = get_tensor_model_parallel_group_if_none(group)
    return input_ if group is None or group.nranks == 1 else _CutRows.apply(input_, group)
