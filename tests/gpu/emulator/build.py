"""Compiles the CUDA sources for the emulator, as C++; with mistakes planted in them, one of which may be chosen.

A mistake is (file, text), where the text is that of the source but for one expression in marks: [[right => wrong]].
The library that has them all computes the wrong one of them if the environment says so: CUDA_EMULATOR_MISTAKE.
"""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
OPS = HERE.parents[2] / "custom_ops"
LIBRARY = "libemulator.so"
SOURCES = ("index.cu", "rows.cu", "c_api.cu")
HEADERS = {"index.cu": ("query.cuh", "launch.cuh"), "rows.cu": ("pack.cuh", "launch.cuh")}  # of the kernels
SHARED = re.compile(r"__shared__ ([\w:]+) (\w+)\[([^\]]+)\];")
MARKED = re.compile(r"\[\[(.+?) => (.+?)\]\]", re.DOTALL)
Mistake = tuple[str, str]
OPTIONS = ("-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-w")


def plant(source: str, text: str, becomes: str) -> str:
    """The source with what is marked in the text changed."""
    right = MARKED.sub(r"\1", text)
    if right == text or source.count(right) != 1:
        raise ValueError(f"{right!r} is there {source.count(right)} times, expected once, with an expression in marks")
    return source.replace(right, MARKED.sub(becomes, text))


def translate(source: str) -> str:
    """C++ cannot say `__shared__`: the emulator holds that memory, so that it can poison it."""
    translated = SHARED.sub(r"auto& \2 = emulator::shared<\1[\3]>(__FILE__, __LINE__);", source)
    if "__shared__" in translated:
        raise ValueError("a __shared__ declaration of a form that the emulator does not know")
    return translated


def build(folder: Path, mistakes: Iterable[Mistake] = (), fixed: bool = False, reuse: Path | None = None) -> Path:
    """The library, built in `folder`: of the sources as they are, or with all these mistakes to choose from.

    fixed   all are made, whatever the environment says: for what must be known when it is compiled
    reuse   a folder built before, whose objects are taken where no mistake is in their source
    """
    folder.mkdir(parents=True, exist_ok=True)
    wrong_files = {file for file, _ in mistakes}
    for path in (*OPS.glob("*.cu"), *OPS.glob("*.cuh"), *OPS.glob("*.h")):
        text = path.read_text(encoding="utf-8")
        for number, (file, marked) in enumerate(mistakes, 1):
            if file == path.name:
                text = plant(text, marked, r"\2" if fixed else rf"(emulator::mistake() == {number} ? (\2) : (\1))")
        (folder / path.name).write_text(translate(text), encoding="utf-8")
    objects = []
    for source in (*SOURCES, str(HERE / "emulator.cc")):
        is_wrong = bool(wrong_files & {source, *HEADERS.get(source, ())})
        objects.append((folder if is_wrong or reuse is None else reuse) / f"{Path(source).stem}.o")
        if is_wrong or reuse is None:
            command = ["g++", *OPTIONS, f"-I{HERE}", f"-I{folder}", "-x", "c++", "-c", str(folder / source)]
            subprocess.run([*command, "-o", str(objects[-1])], check=True)
    library = folder / LIBRARY
    subprocess.run(["g++", "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library
