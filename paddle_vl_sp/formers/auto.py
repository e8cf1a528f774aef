"""Which class PaddleFormers' AutoModel builds, by its own rule."""

from __future__ import annotations

import re


def class_of(architecture: str) -> type:
    """By AutoModel's own rule, for the configuration of a checkpoint; nothing is loaded but the class."""
    from paddleformers.transformers.auto.modeling import AutoModelForConditionalGeneration as Auto

    found: type = Auto._get_model_class_from_config(None, "config.json", {"architectures": [architecture]})
    return found


def is_on_paddlefleet(cls: type) -> bool:
    return any(re.search(r"^paddlefleet\b|_fleet$", base.__module__) for base in cls.__mro__)
