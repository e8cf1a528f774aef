"""Chooses, once, which implementation serves: the custom operators or plain Paddle. `backend()` says which and why."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

from paddle_vl_sp import by_rule, reference
from paddle_vl_sp.choices import check_choice, is_on
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.log import logger

BACKENDS = ("auto", "op", "python")
SWITCH = "PADDLE_VL_SP_BACKEND"
CHECK = "PADDLE_VL_SP_CHECK"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Backend:
    """name is "op" or "python"; devices are those the operators serve, plain Paddle serves all others."""

    name: str
    devices: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        where = f" on {' and '.join(self.devices)}" if self.devices else ""
        return f"{self.name}{where}: {self.reason}"


@functools.cache
def backend() -> Backend:
    """Which implementation serves, decided at the first call.

    PADDLE_VL_SP_BACKEND=auto (default) takes the custom operators where they load and plain Paddle elsewhere, with one
    warning; op insists on them; python never loads them.
    """
    wanted = os.environ.get(SWITCH, "auto")
    check_choice(SWITCH, wanted, BACKENDS)
    if wanted == "python":
        return Backend("python", (), f"{SWITCH}=python")
    try:
        info = _load_operators(HERE)
    except OperatorsUnavailable as why:
        if wanted == "op":
            raise OperatorsUnavailable(f"{SWITCH}=op insists on the operators: {why}; {rebuild()}") from None
        logger.warning("plain Paddle serves, the custom operators do not: %s; %s", why, rebuild())
        return Backend("python", (), str(why))
    devices = ("cpu",) if info["cuda"] == "0" else ("cpu", "gpu")
    return Backend("op", devices, f"operators built for Paddle {info['paddle']}")


def checking() -> bool:
    """Whether PADDLE_VL_SP_CHECK=1 asks for comparisons with the usual ways, asked anew every time."""
    return is_on(CHECK, "0")


class OperatorsUnavailable(ImportError):
    """The custom operators are not there, or are for another Paddle."""


def rebuild() -> str:
    """What gives this installation its operators."""
    hidden = _hidden_package()
    if hidden:
        return f"start from another folder than {HERE.parent}: there, Python finds the installed package in {hidden}"
    compiler = "" if shutil.which(os.environ.get("CXX", "g++")) else "install a C++ compiler (apt install g++), then "
    if (HERE.parent / "custom_ops").is_dir():
        return f"{compiler}pip install --no-build-isolation --no-deps --editable {HERE.parent}"
    return f"{compiler}in the folder of the source: pip install --no-build-isolation --no-deps --force-reinstall ."


def _hidden_package() -> Path | None:
    """An installed package with operators that this one, imported from its source, stands in front of."""
    for found in importlib.metadata.distributions(name="paddle-vl-sp"):
        folder = Path(str(found.locate_file("paddle_vl_sp"))).resolve()
        if folder != HERE.resolve() and any(folder.glob("_ops*.so")):
            return folder
    return None


def _load_operators(folder: Path) -> dict[str, str]:
    libraries = sorted(folder.glob("_ops*.so"))
    if not libraries:
        raise OperatorsUnavailable(f"there are no compiled operators in {folder}")
    info = build_info(libraries[-1])
    running = running_paddle()
    if not is_built_for(running, info):  # loading it could abort the process
        raise OperatorsUnavailable(
            f"the operators were built for Paddle {info.get('paddle')} ({info.get('commit')}), "
            f"this is {running['paddle']} ({running['commit']})"
        )
    try:
        load_op_meta_info_and_register_op(str(libraries[-1]))
    except (OSError, RuntimeError, ValueError) as error:
        raise OperatorsUnavailable(f"{libraries[-1].name} does not load: {error}") from error
    from paddle_vl_sp import native

    native.learn_references(libraries[-1])
    return info


def running_paddle() -> dict[str, str]:
    return {"paddle": paddle.version.full_version, "commit": paddle.version.commit}


def is_built_for(running: dict[str, str], info: dict[str, str]) -> bool:
    return {key: info.get(key) for key in running} == running


def build_info(library: Path) -> dict[str, str]:
    """What a library of operators was built for (paddle, commit, cuda), read from the file without loading it."""
    found = re.search(rb"vlsp-build ((?:\w+=\S* )+)", library.read_bytes())
    return dict(pair.split("=", 1) for pair in found[1].decode().split()) if found else {}


def build_plan(
    tokens: Tensor,
    ids: tuple[int, ...] | None,
    layout: SeqLayout,
    sequence_first: bool,
    num_features: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Any]:
    """update and gather; counts [2] as a tensor where padded, else as numbers on the host."""
    serving = _serving(tokens)
    if padded:
        update, gather, counts = serving.build_plan(tokens, ids, layout, sequence_first, num_features, True)
        return update, gather, counts
    if is_tracing():
        raise ValueError(
            "an exact plan has a size that is in the data, which a traced graph does not know: padded=True, or "
            "export.IndexBuilder"
        )
    if serving is not reference and tokens.place.is_cpu_place():
        update, gather, counts = serving.build_plan(tokens, ids, layout, sequence_first, -1, False)
        return update, gather, counts.numpy()
    update, gather, counts = serving.build_plan(tokens, ids, layout, sequence_first, -1, True)
    counts = counts.numpy()  # the one synchronisation, for both numbers
    n = int(counts[0])
    return update[:n], gather[:n], counts


def replace_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    return _moving(hidden).replace_rows(hidden, features, update, gather)


def add_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor, inplace: bool) -> Tensor:
    serving = _moving(hidden)
    if not inplace or is_tracing():  # a graph reuses memory as it sees fit
        return serving.add_rows(hidden, features, update, gather)
    needs_new_graph = hidden.stop_gradient and not features.stop_gradient and paddle.is_grad_enabled()
    if serving is reference or needs_new_graph or not hidden.is_contiguous():
        return paddle.assign(serving.add_rows(hidden, features, update, gather), output=hidden)
    return serving.add_rows_inplace(hidden, features, update, gather)


def joint_order(tokens: Tensor, ids: tuple[int, ...], num_image: int, num_video: int) -> tuple[Tensor, Any]:
    order, counts = reference.joint_order(tokens, ids, num_image, num_video)
    return order, counts.numpy()


def joint_rows(image: Tensor, video: Tensor, order: Any) -> Tensor:
    if isinstance(order, np.ndarray):
        order = on_place(order, image.place)
    return reference.joint_rows(image, video, order)


def on_place(x: Any, place: Any) -> Tensor:
    """x on the place, without waiting for the device; the host memory of a numpy array is free at return."""
    tensor = paddle.to_tensor(x, place=paddle.CPUPlace()) if isinstance(x, np.ndarray) else x
    return tensor.to(place, blocking=False)


def is_tracing() -> bool:
    """Whether a static graph is being made, so that tensors have no place and shapes may not be numbers."""
    return not paddle.in_dynamic_mode()


def _moving(hidden: Tensor) -> ModuleType:
    """The module whose row operations serve; in a graph plain Paddle's must not ask for shapes."""
    serving = _serving(hidden)
    return by_rule if serving is reference and is_tracing() else serving


def _serving(x: Tensor) -> ModuleType:
    """The module whose functions serve where x lives, or, while a graph is traced, where it will run."""
    if not is_tracing():
        device = "cpu" if x.place.is_cpu_place() else "gpu" if x.place.is_gpu_place() else "other"
    else:
        device = paddle.get_device().split(":")[0]
    if device not in backend().devices:
        return reference
    from paddle_vl_sp import native

    return native
