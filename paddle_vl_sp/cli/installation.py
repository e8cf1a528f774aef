"""What is installed, as far as it can be seen without importing Paddle: the first half of `doctor`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import paddle_vl_sp
from paddle_vl_sp.settings import ENABLED, SWITCHES, setting

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
DOES_NOT_RUN = "does not run"
PADDLES = ("paddlepaddle", "paddlepaddle-gpu")
PADDLE = (
    "`pip install paddlepaddle` (CPU; for a GPU as Paddle's installation page says), then install this package again, "
    "so that operators are built for it"
)
FORMERS = 'pip install "paddleformers==1.2.0" "pyarrow<26"'
ON_FLEET = "paddlefleet"  # the package
FLEET = (
    "if you train on it, see PaddleFormers' installation page for paddlefleet's index: "
    "https://github.com/PaddlePaddle/PaddleFormers"
)


@dataclass(frozen=True)
class Check:
    """FAIL: something would raise or be wrong, and only that is exit code 1; WARN: it works, slower or with less.

    because  the subject that it follows from, whose line names it in the report
    """

    state: str
    subject: str
    message: str
    fix: str = ""
    because: str = ""


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
    yield Check(PASS, "paddle_vl_sp", f"{paddle_vl_sp.__version__} at {Path(paddle_vl_sp.__file__).parent}")
    yield _switches()
    yield Check(PASS, "numpy", installed("numpy"))
    yield _package("paddleformers", "nothing to replace; everything else works", FORMERS)
    yield _package(ON_FLEET, "paddle_vl_sp.fleet, and PaddleFormers' classes on it, cannot be used", FLEET)


def check_conflicts() -> Iterator[Check]:
    """Packages that are known to break each other."""
    both = [f"{name} {installed(name)}" for name in PADDLES if installed(name)]
    if len(both) > 1:
        yield Check(FAIL, "two Paddles", " and ".join(both), f"`pip uninstall {' '.join(PADDLES)}`, then {PADDLE}")
    yield _numpy_and_pyarrow()


def check_compilers(paddle_cuda: str) -> Iterator[Check]:
    """paddle_cuda  the version of Paddle's CUDA; empty where it has none"""
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), "")
    if shutil.which(compiler):
        says = _output([compiler, "--version"], "")
        broken = says.startswith(DOES_NOT_RUN)
        fix = "apt install --reinstall g++, or set CXX, if operators are to be built here" if broken else ""
        yield Check(WARN if broken else PASS, "compiler", f"{compiler} {says}" if broken else says, fix)
    else:
        missing = f"CXX={compiler}, which does not exist" if compiler else "none: operators cannot be built here"
        yield Check(WARN, "compiler", missing, "apt install g++, if operators are to be built here")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""
    nvcc = _find_nvcc(home)
    yield _cuda_home(home, nvcc)
    if nvcc:
        yield _nvcc(nvcc, paddle_cuda)
    elif paddle_cuda:
        fix = "install the CUDA toolkit, export CUDA_HOME, then install paddle-vl-sp again"
        yield Check(WARN, "nvcc", "none: operators for the GPU cannot be built here", fix)
    else:
        yield Check(PASS, "nvcc", "none, and Paddle for the CPU needs none")


def _find_nvcc(home: str) -> str:
    """Where setup.py looks for it."""
    places = (str(Path(home) / "bin" / "nvcc") if home else "", shutil.which("nvcc") or "", USUAL_NVCC)
    return next((place for place in places if place and Path(place).is_file()), "")


def _nvcc(nvcc: str, paddle_cuda: str) -> Check:
    says = _output([nvcc, "--version"], "release")
    release = says.partition("release ")[2]
    if paddle_cuda and _major(release) != _major(paddle_cuda):
        message = f"{nvcc}: {says}, and Paddle has CUDA {paddle_cuda}: operators for the GPU cannot be built with it"
        return Check(WARN, "nvcc", message, f"the toolkit of CUDA {_major(paddle_cuda)}: export CUDA_HOME")
    return Check(PASS, "nvcc", f"{nvcc}: {says}")


def _switches() -> Check:
    """An unknown word is removed from this process's environment, so that the other checks can go on."""
    given = " ".join(f"{name}={os.environ[name]}" for name in SWITCHES if name in os.environ)
    wrong = [name for name in SWITCHES if _is_unknown(name)]
    for name in wrong:
        del os.environ[name]
    if wrong:
        fix = "; ".join(f"{name} is one of {', '.join(SWITCHES[name])}" for name in wrong)
        return Check(FAIL, "switches", given, fix)
    if setting(ENABLED) == "0":
        return Check(WARN, "switches", f"{given}: the package changes nothing in PaddleFormers", f"unset {ENABLED}")
    return Check(PASS, "switches", given or "none set")


def _is_unknown(switch: str) -> bool:
    try:
        setting(switch)
    except ValueError:
        return True
    return False


def _package(name: str, without: str, fix: str) -> Check:
    if importable(name):
        return Check(PASS, name, installed(name) or "from a source tree")
    return Check(WARN, name, f"not installed: {without}", fix)


def _numpy_and_pyarrow() -> Check:
    """pyarrow 26 refuses the numpy 1.26 that PaddleFormers' fast_dataindex pins: then its command line dies."""
    numpy, pyarrow = installed("numpy"), installed("pyarrow")
    if not pyarrow:
        return Check(PASS, "numpy and pyarrow", "no pyarrow")
    both, fix = f"numpy {numpy}, pyarrow {pyarrow}", 'pip install "pyarrow<26"'
    if _major(pyarrow) >= 26 and _major(numpy) < 2:
        return Check(FAIL, "numpy and pyarrow", f"{both}: pyarrow 26 refuses numpy 1; paddleformers-cli dies", fix)
    try:
        importlib.import_module("pyarrow")
    except ImportError as error:
        return Check(FAIL, "numpy and pyarrow", f"{both}: {error}", fix)
    return Check(PASS, "numpy and pyarrow", both)


def _major(number: str) -> int:
    first = number.split(".")[0]
    return int(first) if first.isdecimal() else 0


def _cuda_home(home: str, nvcc: str) -> Check:
    if not home:
        return Check(PASS, "CUDA_HOME", "not set")
    if (Path(home) / "bin" / "nvcc").exists():
        return Check(PASS, "CUDA_HOME", home)
    fix = "unset CUDA_HOME" if nvcc else "install the CUDA toolkit and export CUDA_HOME=/usr/local/cuda"
    why = "it has no bin/nvcc" if Path(home).is_dir() else "there is no such folder"
    message = f"{home}: {why}, so CUDA operators cannot be built from it"
    return Check(WARN, "CUDA_HOME", message, fix)


def _output(command: list[str], word: str) -> str:
    """The first line of a program's output that has the word; or that it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{DOES_NOT_RUN}: {error}"
    return next((line for line in done.stdout.splitlines() if word in line), f"prints no {word or 'version'}")
