"""Other packages' start-up messages, kept out of the answer."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what is written to stdout and stderr inside, by whatever way; stderr gets it after an error.

    File descriptors are redirected, since C++ does not know sys.stdout. Of much output, the end.
    """
    os.environ.setdefault("GLOG_minloglevel", "2")
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as noise, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(noise.fileno(), 1)
            os.dup2(noise.fileno(), 2)
            yield
        except BaseException:
            _restore(saved)
            noise.seek(0)
            sys.stderr.write(noise.read().decode(errors="replace")[-3000:])
            raise
        _restore(saved)


def _restore(saved: tuple[int, int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, copy in zip((1, 2), saved, strict=True):
        os.dup2(copy, number)
        os.close(copy)
