"""Which class a YAML, paddleformers-cli and AutoModel build for Qwen3-VL, by the installed PaddleFormers' own rule."""

from __future__ import annotations

from collections.abc import Iterator

from paddle_vl_sp.cli.installation import ON_FLEET, PASS, WARN, Check, importable

ARCHITECTURE = "Qwen3VLForConditionalGeneration"  # in the config.json of every Qwen3-VL
PLAIN = f"{ARCHITECTURE}Deprecated"
SUBJECT = "class of Qwen3-VL"
BUILT = "a YAML, paddleformers-cli and AutoModel"


def check_model_class() -> Iterator[Check]:
    """Each class has faults of its own: docs/paddleformers.md has the table."""
    from paddle_vl_sp.formers import auto

    try:
        cls = auto.class_of(ARCHITECTURE)
    except ImportError as error:
        if ON_FLEET not in str(error):
            raise
        message = f"{BUILT} would build Qwen3-VL on PaddleFleet, and fail without it; your own code can build {PLAIN}"
        because = "" if importable(ON_FLEET) else ON_FLEET
        yield Check(WARN, SUBJECT, message, f"install paddlefleet, or build {PLAIN} in your own code", because)
    except (AttributeError, KeyError) as error:
        message = f"this PaddleFormers does not say which: {type(error).__name__}: {error}"
        yield Check(WARN, SUBJECT, message, "look at type(model).__name__ of your model")
    else:
        kind = "the fleet class, on PaddleFleet" if auto.is_on_paddlefleet(cls) else "the plain class"
        yield Check(PASS, SUBJECT, f"{BUILT} build {cls.__name__} of {cls.__module__}: {kind}")
