"""What the examples compute on two ranks, all in one launch."""

import importlib
import sys

from docs_blocks import ROOT

EXAMPLES = ROOT / "examples"
ON_RANKS = ("audit_own_model", "context_parallel", "own_loop", "packed_ring", "vision_dp")


def on_a_rank():
    sys.path.insert(0, str(EXAMPLES))
    return {name: importlib.import_module(name).on_a_rank() for name in ON_RANKS}
