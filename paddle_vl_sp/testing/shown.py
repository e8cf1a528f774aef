"""The output of ranks while they run, line by line, each with its rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class ShownOutput:
    """Prints what is new in the file of each rank, from an offset on, in whole lines: `[rank 1] loss 2.5`."""

    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        self._files = [file.open("rb") for file, _ in files]
        self._rests = [b""] * len(files)  # what comes after the last line end
        for opened, (_, offset) in zip(self._files, files, strict=True):
            opened.seek(offset)

    def __enter__(self) -> ShownOutput:
        return self

    def __exit__(self, *unused: object) -> None:
        """Prints what is left, a last line without its end too."""
        self.update()
        for rank, file in enumerate(self._files):
            self._print(rank, [self._rests[rank]] if self._rests[rank] else [])
            file.close()

    def update(self) -> None:
        for rank, file in enumerate(self._files):
            *lines, self._rests[rank] = (self._rests[rank] + file.read()).split(b"\n")
            self._print(rank, lines)

    def _print(self, rank: int, lines: list[bytes]) -> None:
        for line in lines:
            print(f"[rank {rank}] {line.decode(errors='replace')}", flush=True)
