"""The doctor on what is installed: versions, packages that do not go together, compilers. Imports no Paddle."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import paddle_vl_sp
from paddle_vl_sp.cli.checkup import FAIL, PASS, WARN, Check
from paddle_vl_sp.settings import ENABLED, SWITCHES, setting

PADDLES = ("paddlepaddle", "paddlepaddle-gpu")
PADDLE = (
    "`pip install paddlepaddle` (CPU; for a GPU as Paddle's installation page says), then install this package again, "
    "so that operators are built for it"
)
FORMERS = 'pip install "paddleformers==1.2.0" "pyarrow<26"'
FLEET = (
    "if you train on it, see PaddleFormers' installation page for paddlefleet's index: "
    "https://github.com/PaddlePaddle/PaddleFormers"
)


def installed(package: str) -> str:
    """Its version; empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def importable(package: str) -> bool:
    """Also where it comes from a source tree and no installation."""
    return importlib.util.find_spec(package) is not None


def check_versions() -> Iterator[Check]:
    yield Check(PASS, "system", f"Python {platform.python_version()}, {platform.platform()}")
    yield Check(PASS, "paddle_vl_sp", f"{paddle_vl_sp.__version__} at {Path(__file__).parents[1]}")
    yield _check_switches()
    yield from _packages()


def check_clashes() -> Iterator[Check]:
    """What is known to break each other."""
    both = [f"{name} {installed(name)}" for name in PADDLES if installed(name)]
    if len(both) > 1:
        mend = f"`pip uninstall {' '.join(PADDLES)}`, then {PADDLE}"
        yield Check(FAIL, "two Paddles", " and ".join(both), mend)
    yield _numpy_and_pyarrow()


def check_compilers(paddle_has_cuda: bool) -> Iterator[Check]:
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), "")
    if shutil.which(compiler):
        yield Check(PASS, "compiler", first_line(compiler, "--version"))
    else:
        missing = f"CXX={compiler}, which is not there" if compiler else "none: operators cannot be built here"
        yield Check(WARN, "compiler", missing, "apt install g++, if operators are to be built here")
    yield from _check_cuda(paddle_has_cuda)


def first_line(*command: str) -> str:
    """What the program says first; or that it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not run: {error}"
    return next(iter(done.stdout.splitlines()), f"{command[0]} says nothing")


def _is_unknown(switch: str) -> bool:
    try:
        setting(switch)
    except ValueError:
        return True
    return False


def _check_switches() -> Check:
    """An unknown word is taken out of this process's environment, so that the rest can be looked at."""
    told = " ".join(f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ)
    wrong = [name for name in SWITCHES if _is_unknown(name)]
    for name in wrong:
        del os.environ[name]
    if wrong:
        mend = "; ".join(f"{name} is one of {', '.join(SWITCHES[name])}" for name in wrong)
        return Check(FAIL, "switches", told, mend)
    if os.environ.get(ENABLED) == "0":
        return Check(WARN, "switches", f"{told}: the package changes nothing in PaddleFormers", f"unset {ENABLED}")
    return Check(PASS, "switches", told or "none set")


def _packages() -> Iterator[Check]:
    yield Check(PASS, "numpy", installed("numpy"))
    if importable("paddleformers"):
        yield Check(PASS, "paddleformers", installed("paddleformers") or "from a source tree")
    else:
        yield Check(WARN, "paddleformers", "not installed: nothing to replace; everything else works", FORMERS)
    if importable("paddlefleet"):
        yield Check(PASS, "paddlefleet", installed("paddlefleet") or "from a source tree")
    else:
        told = "not installed: paddle_vl_sp.fleet, and PaddleFormers' classes on it, cannot be used"
        yield Check(WARN, "paddlefleet", told, FLEET)


def _numpy_and_pyarrow() -> Check:
    """pyarrow 26 refuses the numpy 1.26 that PaddleFormers' fast_dataindex pins: then its command line dies."""
    numpy, pyarrow = installed("numpy"), installed("pyarrow")
    if not pyarrow:
        return Check(PASS, "numpy and pyarrow", "no pyarrow")
    told = f"numpy {numpy}, pyarrow {pyarrow}"
    mend = 'pip install "pyarrow<26"'
    if major(pyarrow) >= 26 and major(numpy) < 2:
        return Check(FAIL, "numpy and pyarrow", f"{told}: pyarrow 26 refuses numpy 1; paddleformers-cli dies", mend)
    try:
        importlib.import_module("pyarrow")
    except ImportError as error:
        return Check(FAIL, "numpy and pyarrow", f"{told}: {error}", mend)
    return Check(PASS, "numpy and pyarrow", told)


def major(told: str) -> int:
    number = told.split(".")[0]
    return int(number) if number.isdigit() else 0


def _check_cuda(paddle_has_cuda: bool) -> Iterator[Check]:
    bad, home = (FAIL if paddle_has_cuda else WARN), os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    if home is None:
        yield Check(PASS, "CUDA_HOME", "not set")
    elif (Path(home) / "bin" / "nvcc").exists():
        on_path = str(Path(home) / "bin" / "nvcc")
        yield Check(PASS, "CUDA_HOME", home)
    else:
        mend = "unset CUDA_HOME" if on_path else "install the CUDA toolkit and export CUDA_HOME=/usr/local/cuda"
        what = "there is no such folder" if not Path(home).is_dir() else "it has no bin/nvcc"
        yield Check(bad, "CUDA_HOME", f"{home}: {what}, so CUDA operators cannot be built from it", mend)
    if on_path:
        yield Check(PASS, "nvcc", f"{on_path}: {_nvcc_release(on_path)}")
    elif paddle_has_cuda:
        mend = "install the CUDA toolkit, export CUDA_HOME, then install paddle-vl-sp again"
        yield Check(WARN, "nvcc", "none: operators for the GPU cannot be built here", mend)
    else:
        yield Check(PASS, "nvcc", "none, and Paddle for the CPU needs none")


def _nvcc_release(nvcc: str) -> str:
    try:
        done = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    return next((line for line in done.stdout.splitlines() if "release" in line), "says no release")
