"""Runs saved programs on saved inputs, in a process that knows nothing else: what a server would do with them.

    python tools/run_static.py FOLDER [--import paddle_vl_sp.export]

FOLDER holds NAME.json, a program, and NAME.CASE.in.npz, arrays under the names of its inputs, in their order. Every
case is run by paddle.jit.load and by the inference predictor, into NAME.CASE.{jit,predictor}.npz: arrays "0", "1"..,
or "error" with what was raised. Needs Paddle and numpy; nothing of paddle_vl_sp is imported unless it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import inference

Arrays = dict[str, npt.NDArray[Any]]
Program = Callable[[Arrays], list[npt.NDArray[Any]]]


def loaded(path: Path) -> Program:
    layer = paddle.jit.load(str(path))

    def run(inputs: Arrays) -> list[npt.NDArray[Any]]:
        outputs = layer(*(paddle.to_tensor(x) for x in inputs.values()))
        return [x.numpy() for x in (outputs if isinstance(outputs, list | tuple) else [outputs])]

    return run


def predictor(path: Path) -> Program:
    config = inference.Config(f"{path}.json", f"{path}.pdiparams")
    config.disable_gpu()
    config.disable_glog_info()
    ready = inference.create_predictor(config)

    def run(inputs: Arrays) -> list[npt.NDArray[Any]]:
        for name in ready.get_input_names():
            ready.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(inputs[name]))
        ready.run()
        return [ready.get_output_handle(name).copy_to_cpu() for name in ready.get_output_names()]

    return run


def outcome(program: Program, inputs: Arrays) -> Arrays:
    """The outputs by number, or the error as an array of one text: a length that does not fit is a case, too."""
    try:
        return {str(i): x for i, x in enumerate(program(inputs))}
    except (OSError, RuntimeError, ValueError) as error:
        return {"error": np.array(str(error))}


def run_all(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        path = file.with_suffix("")
        for way in (loaded, predictor):
            program = way(path)
            for case in sorted(folder.glob(f"{path.name}.*.in.npz")):
                inputs = dict(np.load(case))
                target = case.name.removesuffix("in.npz") + ("jit" if way is loaded else "predictor")
                np.savez(folder / target, **outcome(program, inputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--import", dest="module", help="a module to import first, for operators of its own")
    asked = parser.parse_args()
    if asked.module:
        importlib.import_module(asked.module)
    run_all(asked.folder)


if __name__ == "__main__":
    main()
