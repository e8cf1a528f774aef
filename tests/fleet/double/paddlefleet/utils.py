import paddle

from paddlefleet import parallel_state


def get_tensor_model_parallel_group_if_none(tp_group, is_expert=False, check_initialized=False):
    if not paddle.distributed.is_initialized():
        return None
    return tp_group or parallel_state.get_tensor_model_parallel_group(check_initialized=check_initialized)
