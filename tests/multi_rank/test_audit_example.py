"""examples/audit_own_model.py: what it prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_finds_its_fault_and_no_other():
    """The two parameters before the block are partial, the others whole; all are whole once it is fixed."""
    command = [sys.executable, str(ROOT / "examples" / "audit_own_model.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("fixed\n")
    lines = {line.split()[0]: line for line in before.splitlines() if " ! " in line}
    assert lines.keys() == {"embed", "scale"}
    assert all("partial !" in line and "the sum over ranks 0, 1 completes it" in line for line in lines.values())
    assert after.startswith("gradients over ranks 0, 1: nothing wrong found; 5 whole")
