"""What is around PaddleFleet's embedding and LM head, in one process: a table, a linear layer, a configuration."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.formers.contracts.ranks import as_rank
from paddle_vl_sp.testing import FakeGroup

WIDTH, VOCAB = 6, 16
IDS = {"image": 3, "video": 4}


class Config(SimpleNamespace):
    """Settings that are not named are off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__.get(name)


def config(nranks: int) -> Config:
    return Config(
        hidden_size=WIDTH,
        vocab_size=VOCAB,
        params_dtype="float32",
        sequence_parallel=nranks > 1,
        multimodal_embedding=True,
        image_token_id=IDS["image"],
        video_token_id=IDS["video"],
        hidden_dropout_prob=0.0,
        num_nextn_predict_layers=0,
        tensor_model_parallel_size=nranks,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        use_cpu_initialization=True,
    )


class _Table(Layer):  # type: ignore[misc]
    def __init__(self, is_cut: bool, rank: int, nranks: int) -> None:
        super().__init__()
        self.reduce_scatter_embeddings, self.of = is_cut, (rank, nranks)
        self.weight = self.create_parameter([VOCAB, WIDTH])
        rows = np.random.default_rng(1).standard_normal((VOCAB, WIDTH))
        self.weight.set_value(rows.astype("float32"))

    def forward(self, ids: Tensor) -> Tensor:
        rows = paddle.nn.functional.embedding(ids, self.weight)  # [B, S, H]
        return _cut(rows.transpose([1, 0, 2]), *self.of) if self.reduce_scatter_embeddings else rows


class _LanguageEmbedding(Layer):  # type: ignore[misc]
    """Cuts the sequence by itself, unless what is built of it turns that off."""

    def __init__(self, rank: int, nranks: int) -> None:
        super().__init__()
        self.sequence_parallel = self.scatter_to_sequence_parallel = self.reduce_scatter_embeddings = nranks > 1
        self.embed_tokens, self.tp_group = _Table(nranks > 1, rank, nranks), FakeGroup(rank, nranks)

    @property
    def embedding_weight(self) -> Tensor:
        return self.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> Tensor:
        rows = self.embed_tokens(input_ids)
        is_cut = self.sequence_parallel and self.scatter_to_sequence_parallel
        if is_cut and not self.reduce_scatter_embeddings:
            rows = _cut(rows.transpose([1, 0, 2]), *self.embed_tokens.of)
        return rows


def built_embedding(cls: type, rank: int, nranks: int) -> Any:
    """By its constructor, as builders call it: every argument by name; those that only a later one has are None."""
    given: dict[str, Any] = {
        "sublayers_spec": Config(language_embedding=(rank, nranks)),
        "config": config(nranks),
        "vocab_size": VOCAB,
        "max_sequence_length": 64,
        "position_embedding_type": "mrope",
    }
    parameters = inspect.signature(cls).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given |= {p.name: None for p in named if p.default is p.empty and p.name not in given}
    return cls(**given)


@contextmanager
def as_fleet_rank(cls: type, rank: int, nranks: int) -> Iterator[None]:
    """PaddleFleet's groups, its cut and its building of parts, for the module of the class, are those of this rank."""

    def build(what: Any, *_: Any, **__: Any) -> Any:
        return _LanguageEmbedding(*what) if isinstance(what, tuple) else Layer()

    def cut(rows: Tensor, *_: Any, **__: Any) -> Tensor:
        return _cut(rows, rank, nranks)

    group = FakeGroup(rank, nranks)
    answers: dict[str, Any] = {
        "get_context_parallel_world_size": lambda *_, **__: 1,
        "get_context_parallel_rank": lambda *_, **__: 0,
        "get_pipeline_model_parallel_world_size": lambda *_, **__: 1,
        "get_tensor_model_parallel_group": lambda *_, **__: group,
        "get_tensor_model_parallel_world_size": lambda *_, **__: nranks,
        "get_tensor_model_parallel_rank": lambda *_, **__: rank,
        "scatter_to_sequence_parallel_region": cut,
        "build_spec_layer": build,
        "build_layer": build,
    }
    modules = [sys.modules[cls.__module__], importlib.import_module("paddlefleet.parallel_state")]
    with ExitStack() as stack:
        stack.enter_context(as_rank(rank, nranks))
        stack.enter_context(mock.patch.object(paddle.distributed, "is_initialized", return_value=nranks > 1))
        for module in modules:
            for name in answers.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, answers[name]))
        yield


def _cut(rows: Tensor, rank: int, nranks: int) -> Tensor:
    return rows.split(nranks, axis=0)[rank] if nranks > 1 else rows
