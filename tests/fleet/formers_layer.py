"""The installed PaddleFormers' Qwen3-VL text layer, compiled alone from its file: the module needs PaddleFleet."""

import ast
import functools
import importlib.util
import warnings
from collections import OrderedDict
from pathlib import Path

import paddle
import pytest
from paddle.distributed.fleet.utils import recompute

FILE = Path("transformers", "qwen3_vl", "modeling_fleet.py")
NAME = "Qwen3VLTextTransformerLayer"


def formers_layer():
    """PaddleFormers' own class body, on the TransformerLayer that is there."""
    from paddlefleet.transformer.transformer_layer import TransformerLayer

    names = {
        "paddle": paddle,
        "recompute": recompute,
        "OrderedDict": OrderedDict,
        "TransformerLayer": TransformerLayer,
        "PackedSeqParams": object,
        "__name__": "formers_layer",
    }
    exec(class_body(), names)
    return names[NAME]


@functools.cache
def class_body():
    spec = importlib.util.find_spec("paddleformers")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("paddleformers is not installed")
    path = Path(spec.submodule_search_locations[0]) / FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escape sequences elsewhere in the file
        tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == NAME]
    return compile(ast.Module(classes, type_ignores=[]), str(path), "exec")
