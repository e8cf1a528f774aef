"""What PaddleFormers' code was when it was read: whoever replaces a method must know the method."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# "Class.method": the first 16 digits of the sha256 of its source, for every text of it that is known.
SOURCES: dict[str, tuple[str, ...]] = {
    "Qwen3VLModelDeprecated.forward": ("745af1ed87fe646b",),
    "Qwen3VLTextModel.__init__": ("fb4a505451b444d2",),
    "Qwen3VLTextModel.forward": ("6eebd96dd42e01e6",),
    "Qwen3VLTextModel._deepstack_process": ("5d2f3c34ae40ba01",),
    "Qwen3VLMoeModelDeprecated.forward": ("84de824353cee7f6",),
    "Qwen3VLMoeTextModel.__init__": ("f2b1b38e665bb7f3",),
    "Qwen3VLMoeTextModel.forward": ("8f1ed8c9f0439b4a",),
    "Qwen3VLMoeTextModel._deepstack_process": ("5d2f3c34ae40ba01",),
    "Qwen3VLTextTransformerLayer.forward": ("e38f015741320629",),
    "Qwen3VLTextTransformerLayer._deepstack_process": ("ce230972aa9e41c6",),
    "Qwen3VLModelDist.forward": ("dd7ce8eb1e4b0f1e",),
}
# What is called but may be overridden: only its parameters must be as known.
SIGNATURES: dict[str, tuple[str, ...]] = {
    f"{owner}.{method}": ("self", pixels, grid)
    for owner in ("Qwen3VLModelDeprecated", "Qwen3VLMoeModelDeprecated")
    for method, pixels, grid in (
        ("get_image_features", "pixel_values", "image_grid_thw"),
        ("get_video_features", "pixel_values_videos", "video_grid_thw"),
    )
}
KNOWN_VERSIONS = ("1.2.0",)
OURS = "_paddle_vl_sp_original"  # on a function of ours: what it replaces


def leant_on(owner_name: str) -> list[str]:
    """The methods of a class that ours call."""
    return [name.partition(".")[2] for name in SIGNATURES if name.startswith(f"{owner_name}.")]


def fingerprint(function: Callable[..., Any]) -> str:
    """The first 16 hexadecimal digits of the sha256 of the function's source; "no source" where there is none."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return "no source"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def unknown(owner: type, method: str) -> str:
    """Why this method is not the one that is known; empty where it is. Of a method of ours, what it replaces counts."""
    name = f"{owner.__name__}.{method}"
    function = owner.__dict__.get(method)
    function = getattr(function, OURS, function)
    if function is None:
        return f"{name} is not there"
    if name in SIGNATURES:
        return _unknown_parameters(name, function)
    found = fingerprint(function)
    if found in SOURCES[name]:
        return ""
    return f"{name} has fingerprint {found}, known is {' or '.join(SOURCES[name])} ({_where(function, owner)})"


def formers_version() -> str:
    try:
        return version("paddleformers")
    except PackageNotFoundError:
        return "of unknown version"


def _unknown_parameters(name: str, function: Any) -> str:
    parameters = tuple(inspect.signature(function).parameters)
    if parameters == SIGNATURES[name]:
        return ""
    return f"{name} takes ({', '.join(parameters)}), known is ({', '.join(SIGNATURES[name])})"


def _where(function: Any, owner: type) -> str:
    """Whose code it is: a newer PaddleFormers, or somebody who replaced the method before us."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    place = f"{code.co_filename}:{code.co_firstlineno}" if code else "no Python code"
    if function.__module__ != owner.__module__:
        return f"replaced by {function.__module__}, {place}"
    return place
