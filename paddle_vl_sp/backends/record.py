"""What a library of operators was built for, as setup.py has written it into the file."""

from __future__ import annotations

import re
from pathlib import Path


def build_info(library: Path) -> dict[str, str]:
    """The record, read from the file without loading it; empty where there is none.

    paddle, commit  the Paddle it was built against
    cuda            the architectures that it holds machine code for, such as "80,90"; "0": only the CPU
    ptx             those whose PTX it holds
    why             why there is no CUDA, where it was wanted
    """
    found = re.search(rb"vlsp-build ((?:\w+=\S* )+)", library.read_bytes())
    return dict(pair.split("=", 1) for pair in found[1].decode().split()) if found else {}


def is_built_for(running: dict[str, str], info: dict[str, str]) -> bool:
    return {key: info.get(key) for key in running} == running


def why_no_cuda(info: dict[str, str]) -> str:
    return info.get("why", "it was not asked for, or Paddle had none").replace("_", " ")


def architectures(info: dict[str, str]) -> str:
    """ "machine code for sm_80, sm_90 and PTX of 90" """
    ptx = info.get("ptx", "")
    code = f"machine code for sm_{info['cuda'].replace(',', ', sm_')}"
    return f"{code} and PTX of {ptx.replace(',', ', ')}" if ptx else f"{code} and no PTX"


def runs_on(info: dict[str, str], capability: tuple[int, int]) -> bool:
    """Whether the library has kernels for a GPU of this compute capability.

    Machine code runs on its own major version, from its minor version on; PTX on everything later. Of an architecture
    with an "a" both run on the very same only, and with an "f" both run as machine code does.
    """
    machine = any(_machine_code_runs(name, capability) for name in _names(info, "cuda"))
    return machine or any(_ptx_runs(name, capability) for name in _names(info, "ptx"))


def _names(info: dict[str, str], key: str) -> list[str]:
    return [name for name in info.get(key, "").split(",") if name not in ("", "0")]


def _machine_code_runs(name: str, capability: tuple[int, int]) -> bool:
    major, minor = _version(name)
    return capability == (major, minor) or (
        not name.endswith("a") and capability[0] == major and capability[1] >= minor
    )


def _ptx_runs(name: str, capability: tuple[int, int]) -> bool:
    return _machine_code_runs(name, capability) or (name.isdecimal() and capability >= _version(name))


def _version(name: str) -> tuple[int, int]:
    """ "90a" -> (9, 0)"""
    number = name.rstrip("af")
    return int(number[:-1]), int(number[-1])
