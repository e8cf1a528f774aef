"""Compiles the CUDA sources for the emulator, as C++; a change of the source first plants a mistake."""

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
Change = tuple[str, str, str]  # file, old text, new text


def translate(source: str) -> str:
    """C++ cannot say `__shared__`: the emulator holds that memory, so that it can poison it."""
    translated = SHARED.sub(r"auto& \2 = emulator::shared<\1[\3]>(__FILE__, __LINE__);", source)
    if "__shared__" in translated:
        raise ValueError("a __shared__ declaration of a form that the emulator does not know")
    return translated


def build(folder: Path, changes: Iterable[Change] = (), reuse: Path | None = None) -> Path:
    """The library, built in `folder`; from `reuse`, a folder built before, come the objects that no change touches."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = {file for file, _, _ in changes}
    touched = {source for source in SOURCES if changed & {source, *HEADERS.get(source, ())}}
    for path in (*OPS.glob("*.cu"), *OPS.glob("*.cuh"), *OPS.glob("*.h")):
        text = path.read_text(encoding="utf-8")
        for file, old, new in changes:
            if file == path.name:
                if text.count(old) != 1:
                    raise ValueError(f"{file}: {old!r} is there {text.count(old)} times, expected once")
                text = text.replace(old, new)
        (folder / path.name).write_text(translate(text), encoding="utf-8")
    objects = []
    for source in (*SOURCES, str(HERE / "emulator.cc")):
        name = Path(source).stem + ".o"
        if reuse is not None and source not in touched:
            objects.append(reuse / name)
            continue
        options = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-w", f"-I{HERE}", f"-I{folder}", "-x", "c++"]
        subprocess.run(["g++", *options, "-c", str(folder / source), "-o", str(folder / name)], check=True)
        objects.append(folder / name)
    library = folder / LIBRARY
    subprocess.run(["g++", "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library
