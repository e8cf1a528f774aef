"""Finds and loads the custom operators, once; `backend()` says which implementation is in use and why."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import paddle
from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

from paddle_vl_sp.backends.record import architectures, build_info, is_built_for, runs_on, why_no_cuda
from paddle_vl_sp.log import logger
from paddle_vl_sp.settings import BACKEND, setting

HERE = Path(__file__).parents[1]  # the package, where setup.py puts the library


@dataclass(frozen=True)
class Backend:
    """name is "op" or "python"; devices are those with operators: on all others plain Paddle is used."""

    name: str
    devices: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        where = f" on {' and '.join(self.devices)}" if self.devices else ""
        return f"{self.name}{where}: {self.reason}"


@functools.cache
def backend() -> Backend:
    """Which implementation is in use, decided at the first call.

    PADDLE_VL_SP_BACKEND=auto (default) uses the custom operators where they load, else plain Paddle with one warning;
    op requires them: an ImportError where they do not load; python never loads them.

    >>> backend().name in ("op", "python")
    True
    """
    wanted = setting(BACKEND)
    if wanted == "python":
        return Backend("python", (), f"{BACKEND}=python")
    try:
        info = _load_operators(HERE)
    except OperatorsUnavailable as why:
        if wanted == "op":
            raise OperatorsUnavailable(f"{BACKEND}=op requires the operators: {why}; {rebuild()}") from None
        logger.warning("the custom operators are not available, plain Paddle is used: %s; %s", why, rebuild())
        return Backend("python", (), str(why))
    devices = ("cpu",) if info["cuda"] == "0" else ("cpu", "gpu")
    without = f", without CUDA: {why_no_cuda(info)}" if "why" in info else ""
    return Backend("op", devices, f"operators built for Paddle {info['paddle']}{without}")


@functools.cache
def has_kernels_for(gpu: int) -> bool:
    """Whether the operators can run on that GPU, compared once; if not, one warning, and plain Paddle is used there."""
    if backend().name != "op":
        return False
    lacking = missing_kernels(build_info(library_path(HERE)), gpu)
    if lacking and setting(BACKEND) == "op":
        raise OperatorsUnavailable(f"{BACKEND}=op requires the operators on gpu:{gpu}: {lacking}; {rebuild()}")
    if lacking:
        logger.warning(
            "the operators have nothing to run on gpu:%s, plain Paddle is used there: %s; %s", gpu, lacking, rebuild()
        )
    return not lacking


def missing_kernels(info: dict[str, str], gpu: int) -> str:
    """Why operators with this record cannot run on a GPU; empty where they can."""
    if info["cuda"] == "0":
        return f"they were built without CUDA, since {why_no_cuda(info)}"
    major, minor = paddle.device.cuda.get_device_capability(gpu)
    if runs_on(info, (major, minor)):
        return ""
    return f"they hold {architectures(info)}, which it cannot run: build with PADDLE_CUDA_ARCH_LIST={major}.{minor}"


class OperatorsUnavailable(ImportError):
    """The custom operators are missing, broken, or built for another Paddle."""


def rebuild() -> str:
    """The command that builds the operators for this installation."""
    hidden = _hidden_package()
    if hidden:
        return f"start from another folder than {HERE.parent}: there, Python finds the installed package in {hidden}"
    compiler = "" if shutil.which(os.environ.get("CXX", "g++")) else "install a C++ compiler (apt install g++), then "
    if (HERE.parent / "custom_ops").is_dir():
        return f"{compiler}pip install --no-build-isolation --no-deps --editable {HERE.parent}"
    return f"{compiler}in the folder of the source: pip install --no-build-isolation --no-deps --force-reinstall ."


def _hidden_package() -> Path | None:
    """An installed package with operators that this one, imported from its source, hides."""
    for found in importlib.metadata.distributions(name="paddle-vl-sp"):
        folder = Path(str(found.locate_file("paddle_vl_sp"))).resolve()
        if folder != HERE.resolve() and library_path(folder).is_file():
            return folder
    return None


def library_path(folder: Path) -> Path:
    """Where the operators for this Python are: beside them may be those for another."""
    return folder / f"_ops{sysconfig.get_config_var('EXT_SUFFIX')}"


def _load_operators(folder: Path) -> dict[str, str]:
    library = library_path(folder)
    if not library.is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("_ops*.so")))
        only = f" for this Python, only {others}" if others else ""
        raise OperatorsUnavailable(f"there are no compiled operators in {folder}{only}")
    info = build_info(library)
    running = running_paddle()
    if not is_built_for(running, info):  # loading it could abort the process
        raise OperatorsUnavailable(
            f"the operators were built for Paddle {info.get('paddle')} ({info.get('commit')}), "
            f"this is {running['paddle']} ({running['commit']})"
        )
    from paddle_vl_sp.backends import operators

    try:
        load_op_meta_info_and_register_op(str(library))
        operators.set_up(library)
    except (OSError, RuntimeError, ValueError) as error:
        raise OperatorsUnavailable(f"{library.name} does not load: {error}") from error
    return info


def running_paddle() -> dict[str, str]:
    return {"paddle": paddle.version.full_version, "commit": paddle.version.commit}
