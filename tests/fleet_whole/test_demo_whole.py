"""tools/demo.py where PaddleFleet is there: the default class is shown, and what is claimed of it holds."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("paddlefleet", reason="the default class is built over an installed paddlefleet")

ROOT = Path(__file__).parents[2]


def test_the_default_class_is_shown(tmp_path):
    """Exit code 0, which is equal bits on one rank, upstream's fault on two, right gradients and equal copies here."""
    command = [sys.executable, "-W", "ignore", ROOT / "tools" / "demo.py", "--steps", "2", "--pictures", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "\nQwen3VLForConditionalGeneration\n  the default" in done.stdout
    assert "2 of 2 steps have the same loss and gradients, bit for bit" in done.stdout
    assert "pp_layers" not in done.stdout + done.stderr
