"""PaddleFormers' text-only modules, which need paddlefleet and paddlefleet_ops: over stand-ins where there are none."""

from paddle_vl_sp.formers import tiny_text
from stub_paddlefleet import stubbed_paddlefleet

with stubbed_paddlefleet():  # once imported, these modules stay
    from paddleformers.transformers.qwen2 import modeling as qwen2
    from paddleformers.transformers.qwen3 import modeling as qwen3
    from paddleformers.transformers.qwen3_moe import modeling as qwen3_moe
    from paddleformers.transformers.qwen3_next import modeling as qwen3_next

MODULES = {module.__name__: module for module in (qwen2, qwen3, qwen3_moe, qwen3_next)}
BUILDERS = {
    "qwen2": tiny_text.tiny_qwen2,
    "qwen3": tiny_text.tiny_qwen3,
    "qwen3_moe": tiny_text.tiny_qwen3_moe,
    "qwen3_next": tiny_text.tiny_qwen3_next,
}
