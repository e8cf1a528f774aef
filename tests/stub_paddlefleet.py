"""Stand-ins for what PaddleFormers imports from paddlefleet: its fleet modules import on CPU.

    with stubbed_paddlefleet():
        from paddleformers.transformers.qwen3_vl import modeling_fleet

Supported: importing, and calling the methods of ``Qwen3VLTextTransformerLayer``. Every other
stand-in is an empty class, or a function that raises when called. On leaving, they go out of
``sys.modules`` again (what imported them keeps them): nothing else takes paddlefleet for installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import paddle

# Module -> the names read from it; a capital letter makes a class, a small one a function.
NAMES: dict[str, tuple[str, ...]] = {
    "paddlefleet": (),
    "paddlefleet.parallel_state": (),
    "paddlefleet.tensor_parallel": (),
    "paddlefleet.tensor_parallel.layers": ("ColumnParallelLinear", "RowParallelLinear"),
    "paddlefleet.fusions": (),
    "paddlefleet.fusions.fused_bias_dropout": ("get_bias_dropout_add",),
    "paddlefleet.models": (),
    "paddlefleet.models.common": (),
    "paddlefleet.models.common.vision_layer": (),
    "paddlefleet.models.common.vision_layer.vision_layer": ("VisionLayer",),
    "paddlefleet.models.multimodal": (),
    "paddlefleet.models.multimodal.llava_model": ("LLaVAModel",),
    "paddlefleet.models.gpt": ("GPTModel",),
    "paddlefleet.models.gpt.gpt_layer_specs": ("get_gpt_layer_local_spec",),
    "paddlefleet.models.gpt.gpt_config": ("GPTConfig",),
    "paddlefleet.gpt_builders": ("gpt_builder",),
    "paddlefleet.packed_seq_params": ("PackedSeqParams",),
    "paddlefleet.process_groups_config": ("ProcessGroupCollection",),
    "paddlefleet.fp8_utils": ("correct_amax_history_if_needed",),
    "paddlefleet.utils": ("WrappedTensor", "deprecate_inference_params", "get_model_config"),
    "paddlefleet.transformer": (),
    "paddlefleet.transformer.attention": ("SelfAttention", "SelfAttentionSublayersSpec"),
    "paddlefleet.transformer.dot_product_attention": ("DotProductAttention",),
    "paddlefleet.transformer.enums": ("AttnMaskType", "ModelType"),
    "paddlefleet.transformer.identity_op": ("IdentityOp",),
    "paddlefleet.transformer.layer": ("FleetLayer",),
    "paddlefleet.transformer.mlp": ("MLP", "MLPSublayersSpec"),
    "paddlefleet.transformer.paddle_norm": ("FusedRMSNorm", "LayerNorm"),
    "paddlefleet.transformer.transformer_block": (
        "TransformerBlock",
        "TransformerBlockSublayersSpec",
    ),
    "paddlefleet.transformer.transformer_config": ("TransformerConfig",),
    "paddlefleet.transformer.transformer_layer": (
        "TransformerLayer",
        "TransformerLayerSublayersSpec",
    ),
}
TELL_THE_TRUTH = (
    "paddleformers.quantization.quantization_utils",
    "paddleformers.transformers.model_utils",
    "paddleformers.peft.lora.lora_model",
    "paddleformers.nn.pp_model",
)
PLAIN_CLASSES = {"TransformerConfig", "GPTConfig"}
ENUMS = {
    "AttnMaskType": Enum("AttnMaskType", ["padding", "causal", "no_mask"]),
    "ModelType": Enum("ModelType", ["encoder_or_decoder", "encoder_and_decoder"]),
}


class TransformerLayer(paddle.nn.Layer):
    """What ``Qwen3VLTextTransformerLayer`` reads of its base: config, layer_number, full_recompute.

    Attention is the identity and the MLP doubles, so the layer's ``forward`` runs end to end.
    """

    def __init__(self, config: Any = None, layer_number: int = 0, full_recompute: bool = False) -> None:
        super().__init__()
        self.config = config or SimpleNamespace(sequence_parallel=False, apply_rope_fusion=False)
        self.layer_number = layer_number
        self.full_recompute = full_recompute

    def _forward_attention(self, hidden_states: paddle.Tensor, **unused: Any) -> tuple[Any, None]:
        return hidden_states, None

    def _forward_mlp(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        return hidden_states * 2.0


def _missing(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is a stand-in: paddlefleet is not installed")

    return call


def _stand_in(module: str, name: str) -> Any:
    if name == "TransformerLayer":
        return TransformerLayer
    if name in ENUMS:
        return ENUMS[name]
    if not name[0].isupper():
        return _missing(f"{module}.{name}")
    bases = (object,) if name in PLAIN_CLASSES else (paddle.nn.Layer,)
    members: dict[str, Any] = {"__module__": module}
    if name in PLAIN_CLASSES:
        members["__post_init__"] = lambda self: None
    return type(name, bases, members)


def _modules() -> dict[str, ModuleType]:
    modules = {}
    for path, names in NAMES.items():
        module = ModuleType(path)
        # paddleformers takes a package for installed only where its spec has a location.
        module.__spec__ = ModuleSpec(path, None, origin="<stub>", is_package=True)
        module.__spec__.has_location = True
        module.__path__ = []
        for name in names:
            setattr(module, name, _stand_in(path, name))
        modules[path] = module
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, module)
    return modules


@contextmanager
def stubbed_paddlefleet() -> Iterator[bool]:
    """Yields True where stand-ins were put in, False where the real package is installed."""
    if "paddlefleet" in sys.modules or find_spec("paddlefleet") is not None:
        yield False
        return
    # These ask whether paddlefleet is there while they are imported: let them see the truth.
    for name in TELL_THE_TRUTH:
        import_module(name)
    modules = _modules()
    sys.modules.update(modules)
    try:
        yield True
    finally:
        for path in modules:
            sys.modules.pop(path, None)
