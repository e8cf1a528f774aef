"""The double of PaddleFleet in tests/fleet, filled up with stand-ins: PaddleFormers' fleet modules import on CPU.

    with stubbed_paddlefleet():
        from paddleformers.transformers.qwen3_vl import modeling_fleet

Classes that the double has are the double's, so ``Qwen3VLTextTransformerLayer`` runs. Every other stand-in is an empty
class, or a function that raises when called. On leaving, all go out of ``sys.modules`` again (what imported them keeps
them): nothing else takes paddlefleet for installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import paddle

from paddle_vl_sp.formers.known import Swapped

DOUBLE = Path(__file__).parent / "fleet" / "double"
# Module -> the names read from it that the double has not; a capital letter makes a class, a small one a function.
NAMES: dict[str, tuple[str, ...]] = {
    "paddlefleet.tensor_parallel.layers": ("RowParallelLinear",),
    "paddlefleet.fusions": (),
    "paddlefleet.fusions.fused_bias_dropout": ("get_bias_dropout_add",),
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
    "paddlefleet.transformer.attention": ("SelfAttention", "SelfAttentionSublayersSpec"),
    "paddlefleet.transformer.dot_product_attention": ("DotProductAttention",),
    "paddlefleet.transformer.enums": ("AttnMaskType", "ModelType"),
    "paddlefleet.transformer.identity_op": ("IdentityOp",),
    "paddlefleet.transformer.mlp": ("MLP", "MLPSublayersSpec"),
    "paddlefleet.transformer.paddle_norm": ("FusedRMSNorm", "LayerNorm"),
    "paddlefleet.transformer.transformer_block": ("TransformerBlock", "TransformerBlockSublayersSpec"),
    "paddlefleet.transformer.transformer_config": ("TransformerConfig",),
    "paddlefleet.transformer.transformer_layer": ("TransformerLayerSublayersSpec",),
}
OPS = {"paddlefleet_ops": ("is_deep_ep_available", "deep_gemm")}  # a package of its own, which may lack alone
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


def _missing(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is a stand-in: paddlefleet is not installed")

    return call


def _stand_in(module: str, name: str) -> Any:
    if name in ENUMS:
        return ENUMS[name]
    if name == "is_deep_ep_available":
        return lambda: False
    if not name[0].isupper():
        return _missing(f"{module}.{name}")
    bases = (object,) if name in PLAIN_CLASSES else (paddle.nn.Layer,)
    members: dict[str, Any] = {"__module__": module}
    if name in PLAIN_CLASSES:
        members["__post_init__"] = lambda self: None
    return type(name, bases, members)


def _fill_up(modules: dict[str, tuple[str, ...]]) -> None:
    """Adds what PaddleFormers imports to the double's modules, and the modules that the double has not."""
    for path, names in modules.items():
        parent, _, leaf = path.rpartition(".")
        if find_spec(path) is None:
            module = ModuleType(path)
            # paddleformers takes a package for installed only where its spec has a location.
            module.__spec__ = ModuleSpec(path, None, origin="<stub>", is_package=True)
            module.__spec__.has_location = True
            module.__path__ = []
            sys.modules[path] = module
            if parent:
                setattr(import_module(parent), leaf, module)
        for name in names:
            setattr(import_module(path), name, _stand_in(path, name))


@contextmanager
def stubbed_paddlefleet(is_known: bool = True) -> Iterator[bool]:
    """Yields True where the double was put in, False where the real package is installed.

    is_known  its classes are taken for known, so that nothing is tried
    """
    if "paddlefleet" in sys.modules or find_spec("paddlefleet") is not None:
        with _stubbed_ops():
            yield False
        return
    # These ask whether paddlefleet is there while they are imported: let them see the truth.
    for name in TELL_THE_TRUTH:
        import_module(name)
    use_paddlefleet()
    try:
        _fill_up(NAMES)
        with _stubbed_ops(), _known_double() if is_known else nullcontext():
            yield True
    finally:
        drop_double()


@contextmanager
def _stubbed_ops() -> Iterator[None]:
    (name,) = OPS
    if name in sys.modules or find_spec(name) is not None:
        yield
        return
    _fill_up(OPS)
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _known_double() -> Iterator[None]:
    unknown = Swapped.unknown
    with mock.patch.object(Swapped, "unknown", lambda self, cls: "" if _is_double(cls) else unknown(self, cls)):
        yield


def _is_double(cls: type) -> bool:
    return str(getattr(sys.modules.get(cls.__module__), "__file__", "")).startswith(str(DOUBLE))


def use_paddlefleet() -> None:
    """Makes `import paddlefleet` find the installed package, or the double where there is none."""
    if find_spec("paddlefleet") is None:
        sys.path.insert(0, str(DOUBLE))


def drop_double() -> None:
    """Other tests of the same run must not see it."""
    sys.path.remove(str(DOUBLE))
    for name in list(sys.modules):
        if name.split(".")[0] == "paddlefleet" or name.startswith("paddle_vl_sp.fleet"):
            del sys.modules[name]
