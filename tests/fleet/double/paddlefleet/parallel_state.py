"""The groups of this rank; `set_groups` stands for initialize_model_parallel."""

_groups = {"tensor": None, "context": None}


def set_groups(tensor=None, context=None):
    _groups.update(tensor=tensor, context=context)


def get_tensor_model_parallel_group(check_initialized=True):
    assert not check_initialized or _groups["tensor"] is not None, "tensor model parallel group is not initialized"
    return _groups["tensor"]


def get_context_parallel_world_size():
    return 1 if _groups["context"] is None else _groups["context"].nranks


def get_pipeline_model_parallel_world_size():
    return 1
