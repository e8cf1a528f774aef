"""The `custom_register_path` of YAML runs on CPU ranks: what PaddleFormers lacks without a GPU, then our own plugin.

VLSP_MODEL   the model_type of the checkpoint
VLSP_START   the file of whole weights that a run begins with; one that is not there yet is written
VLSP_END     the file, by rank, of the weights it ends with
VLSP_TENSOR_PARALLEL   over how many of the ranks the weights are cut: all, or 1
"""

import importlib
import json
import os
import runpy
from pathlib import Path

import numpy as np
import paddle
from paddleformers.cli.train.sft.sft_trainer import SFTTrainer

import gloo_threads
from paddle_vl_sp.cli.plugin_path import PLUGIN
from paddle_vl_sp.formers import tiny
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu
from yaml_data import MODELS

FIXED_START = 151652
RANK, NRANKS = int(os.environ["PADDLE_TRAINER_ID"]), int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))
TENSOR_PARALLEL = int(os.environ["VLSP_TENSOR_PARALLEL"])
MODEL = os.environ["VLSP_MODEL"]
ON_FLEET = MODEL == "qwen3_vl"

paddle.set_device("cpu")
gloo_threads.give_way(RANK)
enable_tensor_parallel_on_cpu()

modeling = importlib.import_module(f"paddleformers.transformers.{MODEL}.modeling{'_fleet' if ON_FLEET else ''}")


def with_the_checkpoints_start(function):
    """The fleet class has the start token of the large tokenizer fixed."""
    config = json.loads(Path(os.environ["VLSP_CHECKPOINT"], "config.json").read_text())
    code, start = function.__code__, config["vision_start_token_id"]
    constants = tuple(start if constant == FIXED_START else constant for constant in code.co_consts)
    function.__code__ = code.replace(co_consts=constants)


if ON_FLEET:
    with_the_checkpoints_start(modeling.Qwen3VLModelDist.get_rope_index)


def from_pretrained(cls, *_, config=None, **__):
    """The checkpoint has no weights: they come from VLSP_START."""
    return cls._from_config(config, dtype="float32")


def load(model, weights):
    rank = RANK % TENSOR_PARALLEL
    if not ON_FLEET:
        tiny.load_weights(model, weights, rank, TENSOR_PARALLEL)
        return
    import whole

    whole.load(model, weights, whole.SETTINGS[0], rank, TENSOR_PARALLEL)


def with_weights(original):
    def __init__(self, *args, **named):  # noqa: N807
        model, file = named["model"], Path(os.environ["VLSP_START"])
        if not file.exists():
            np.savez(file, **tiny.weights_of(model))
        load(model, dict(np.load(file)))
        original(self, *args, **named)

    return __init__


def then_saved(original):
    def train(self, *args, **named):
        result = original(self, *args, **named)
        np.savez(f"{os.environ['VLSP_END']}-{RANK}.npz", **tiny.weights_of(self.model))
        return result

    return train


getattr(modeling, MODELS[MODEL][0]).from_pretrained = classmethod(from_pretrained)
SFTTrainer.__init__, SFTTrainer.train = with_weights(SFTTrainer.__init__), then_saved(SFTTrainer.train)
runpy.run_path(str(PLUGIN))
