"""quiet: what others write is dropped, by whatever way; an error brings its end back, on stderr."""

import subprocess
import sys

NOISE = """
import logging, os, sys, warnings
from paddle_vl_sp.cli.quiet import quiet

def make_noise():
    print("by print")
    sys.stderr.write("by Python")
    os.write(1, b"by C++, on stdout")
    os.write(2, b"by C++, on stderr")
    warnings.warn("by a warning")
    logging.getLogger("somebody").warning("by a logger")

before = len(os.listdir("/proc/self/fd"))
print("before")
"""


def ran(code):
    return subprocess.run([sys.executable, "-c", NOISE + code], capture_output=True, text=True, check=False)


def test_nothing_is_seen_of_it():
    """Both files are as before afterwards, and no descriptor stays open."""
    done = ran("with quiet():\n    make_noise()\nprint('after', len(os.listdir('/proc/self/fd')) - before)")
    assert (done.stdout, done.stderr) == ("before\nafter 0\n", "")


def test_an_error_brings_it_back_on_stderr():
    """stdout stays parseable; the error goes on."""
    inside = "    with quiet():\n        make_noise()\n        1 / 0\n"
    done = ran(f"try:\n{inside}except ZeroDivisionError:\n    print('after')")
    assert done.stdout == "before\nafter\n"
    for way in ("by print", "by Python", "by C++, on stdout", "by C++, on stderr", "by a logger"):
        assert way in done.stderr
