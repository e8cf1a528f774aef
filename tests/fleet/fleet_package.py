"""Which `paddlefleet` is tested: the installed one, or the double where there is none."""

import importlib.util
import sys
from pathlib import Path

DOUBLE = Path(__file__).parent / "double"


def use_paddlefleet():
    """Makes `import paddlefleet` work."""
    if importlib.util.find_spec("paddlefleet") is None:
        sys.path.insert(0, str(DOUBLE))


def drop_double():
    """Other tests of the same run must not see the double."""
    sys.path.remove(str(DOUBLE))
    for name in list(sys.modules):
        if name.split(".")[0] == "paddlefleet" or name.startswith("paddle_vl_sp.fleet"):
            del sys.modules[name]
