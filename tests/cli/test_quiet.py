"""quiet: what others write is dropped, by whatever way; after an error its end comes back, on stderr."""

from commands import python

NOISE = """
import logging, os, sys, warnings
from paddle_vl_sp.cli.quiet import quiet

def make_noise():
    print("by print")
    sys.stderr.write("by Python")
    os.write(1, b"by C++, on stdout")
    os.write(2, b"by C++, on stderr")
    warnings.warn("by a warning")
    logging.getLogger("another").warning("by a logger")

before = len(os.listdir("/proc/self/fd"))
print("before")
"""


def test_nothing_of_it_is_seen():
    """Both files are as before afterwards, and no descriptor stays open."""
    done = python(f"{NOISE}with quiet():\n    make_noise()\nprint('after', len(os.listdir('/proc/self/fd')) - before)")
    assert (done.stdout, done.stderr) == ("before\nafter 0\n", "")


def test_after_an_error_it_is_on_stderr():
    """stdout stays parseable; the error goes on."""
    inside = "    with quiet():\n        make_noise()\n        1 / 0\n"
    done = python(f"{NOISE}try:\n{inside}except ZeroDivisionError:\n    print('after')")
    assert done.stdout == "before\nafter\n"
    for way in ("by print", "by Python", "by C++, on stdout", "by C++, on stderr", "by a logger"):
        assert way in done.stderr
