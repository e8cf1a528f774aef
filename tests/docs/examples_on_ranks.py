"""What the examples and the demonstration compute on two ranks, all in one launch."""

import importlib
import sys

from docs_blocks import ROOT

EXAMPLES = ROOT / "examples"
ON_RANKS = ("audit_own_model", "balanced_towers", "context_parallel", "own_loop", "packed_ring", "vision_dp")


def on_a_rank(reference, progress):
    """The demonstration is the last: it makes a tensor-parallel group."""
    sys.path[:0] = [str(EXAMPLES), str(ROOT / "tools")]
    found = {name: importlib.import_module(name).on_a_rank() for name in ON_RANKS}
    return found | {"demo": importlib.import_module("demo_parts.training").on_ranks(2, reference, progress)}
