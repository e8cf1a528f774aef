"""stdout and stderr as a caller may hand them over: closed, full, a pipe that nothing reads, another alphabet."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


class Writer:
    """Of the answer, to stdout as it was when the process started."""

    def __init__(self) -> None:
        self._is_closed = sys.stdout is None
        _open_what_is_closed()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # letters that it does not have, as numbers

    def write(self, text: str) -> None:
        """OSError where it cannot be written. What a closed pipe, such as that of `head`, does not take is lost."""
        if self._is_closed:
            raise OSError("stdout is closed")
        try:
            print(text, flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the rest, when Python ends
            if not isinstance(error, BrokenPipeError):
                raise


def _open_what_is_closed() -> None:
    """Or the next file that is opened would get the number of a closed one, and what is written to that."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (until Python ends)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
