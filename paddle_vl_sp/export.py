"""Layers for static graphs: the index builder and the deepstack add, with batch and length known only at run time.

The cut is an attribute of the saved program; the length is read from the tokens. Importing this module loads the
operators, which a process must do before it loads programs saved with them. Programs saved in plain Paddle need Paddle
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor
from paddle.static import InputSpec

from paddle_vl_sp.backends import dispatch, load, operators, plain
from paddle_vl_sp.backends.checks import check_ir, check_rows
from paddle_vl_sp.backends.operators import interval_table
from paddle_vl_sp.layout import SeqLayout, length_multiple
from paddle_vl_sp.log import logger
from paddle_vl_sp.plan import checked_ids
from paddle_vl_sp.settings import BACKEND, SWITCHES, check_choice

__all__ = ["DeepstackAdd", "IndexBuilder", "interval_table", "save"]

if load.backend().name != "op":
    logger.warning(
        "programs saved with the operators cannot run in this process, Paddle may crash on them: %s",
        load.backend().reason,
    )


class IndexBuilder(paddle.nn.Layer):  # type: ignore[misc]
    """tokens [B, S] -> update, gather and counts of one rank: what `plan_visual` gives for that length.

    placeholder_ids  the ids to look for, or None for a bool mask
    packed           forward takes `interval_table(layout)` as a second input, and B = 1; the table says which positions
                     a rank owns, so one program runs on all ranks
    padded           fixed size B * S_local, unused pairs -1: no shape depends on what is in a tensor
    backend          "op": one operator; "python": plain Paddle; "auto": the operator where it runs on this device
    The other arguments are those of SeqLayout. A length that does not divide stops the program.

    >>> builder = IndexBuilder((9,), sequence_first=True, sp_size=2, sp_rank=1)
    >>> [x.tolist() for x in builder(paddle.to_tensor([[1, 9, 9, 1]]))]
    [[0], [1], [1, 2]]
    """

    def __init__(
        self,
        placeholder_ids: Sequence[int] | None,
        *,
        sequence_first: bool,
        cp_size: int = 1,
        cp_rank: int = 0,
        cp_mode: str = "zigzag",
        sp_size: int = 1,
        sp_rank: int = 0,
        remainder: str = "error",
        packed: bool = False,
        padded: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.ids = None if placeholder_ids is None else checked_ids(np.empty((0, 0), np.int64), placeholder_ids)
        self.rule = SeqLayout(
            length_multiple(cp_size=cp_size, cp_mode=cp_mode, sp_size=sp_size),
            cp_size=cp_size,
            cp_rank=cp_rank,
            cp_mode=cp_mode,
            sp_size=sp_size,
            sp_rank=sp_rank,
            remainder=remainder,
        )
        if packed and padded and remainder == "front":
            raise ValueError(
                "packed, padded and remainder='front' do not go together: only the table would know how many positions "
                "a rank owns; pad the segments so that they divide, or use the exact form (padded=False)"
            )
        self.sequence_first = sequence_first
        self.packed = packed
        self.padded = padded
        self.backend = _chosen_backend(backend)

    def input_spec(self, token_type: str = "int64") -> list[InputSpec]:
        """The inputs, for `paddle.jit.save` and `to_static`; ids may be "int32", a mask is bool."""
        tokens = InputSpec([None, None], "bool" if self.ids is None else token_type, "tokens")
        return [tokens, InputSpec([None, 3], "int64", "intervals")] if self.packed else [tokens]

    def forward(self, tokens: Tensor, intervals: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        check_ir()
        if (intervals is not None) != self.packed:
            got = "no table" if intervals is None else "a table"
            raise ValueError(
                "a packed builder takes interval_table(layout) as its second input and any other builder takes none, "
                f"got packed={self.packed} and {got}: pass the table if and only if packed=True"
            )
        build = _build_by_operator if self.backend == "op" else plain.build_plan_of_any_length
        update, gather, counts = build(tokens, intervals, self.ids, self.rule, self.sequence_first, self.padded)
        return update, gather, counts


class DeepstackAdd(paddle.nn.Layer):  # type: ignore[misc]
    """hidden [.., H] with features [N, H] added at the rows of a plan, on a copy; -1 is skipped.

    One program is enough for every layer and every rank.

    >>> hidden, features = paddle.zeros([1, 4, 2]), paddle.ones([2, 2])
    >>> update, gather = paddle.to_tensor([1, 2]), paddle.to_tensor([0, 1])
    >>> DeepstackAdd()(hidden, features, update, gather).sum(-1).tolist()
    [[0.0, 2.0, 2.0, 0.0]]
    """

    def __init__(self, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = _chosen_backend(backend)

    def input_spec(
        self, width: int | None = None, dtype: str = "float32", feature_type: str | None = None
    ) -> list[InputSpec]:
        """The inputs; width fixes H, feature_type is the features' dtype where it is not `dtype`."""
        return [
            InputSpec([None, None, width], dtype, "hidden"),
            InputSpec([None, width], feature_type or dtype, "features"),
            InputSpec([None], "int64", "update_indices"),
            InputSpec([None], "int64", "gather_indices"),
        ]

    def forward(self, hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
        check_rows(hidden, features, update, gather)
        add = operators.add_rows if self.backend == "op" else plain.add_rows
        return add(hidden, features, update, gather)


def save(layer: IndexBuilder | DeepstackAdd, path: str, input_spec: list[InputSpec] | None = None) -> None:
    """Writes `path`.json, for paddle.jit.load and the inference predictor; the layer is not changed.

    ::

        adder = DeepstackAdd()
        save(adder, "deepstack_add", adder.input_spec(width=4096, dtype="bfloat16"))
        adder = paddle.jit.load("deepstack_add")
    """
    if not paddle.framework.use_pir_api():
        raise ValueError("the old IR is not supported: unset FLAGS_enable_pir_api=0 to save programs")
    paddle.jit.save(layer, path, input_spec=layer.input_spec() if input_spec is None else input_spec)


def _build_by_operator(
    tokens: Tensor,
    table: Tensor | None,
    ids: tuple[int, ...] | None,
    rule: SeqLayout,
    sequence_first: bool,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = plain.check_length(tokens, rule)
    update, gather, counts = operators.build_plan_of(tokens, table, ids, rule, -1, sequence_first, -1, padded)
    if padded and table is not None:
        update, gather = plain.first_of_even_shares(update, rule), plain.first_of_even_shares(gather, rule)
    return update, gather, counts


def _chosen_backend(backend: str) -> str:
    """ "op" or "python"."""
    check_choice("backend", backend, SWITCHES[BACKEND])
    available = load.backend()
    if backend == "op" and available.name != "op":
        raise ValueError(f"backend 'op' needs the operators, but they are not loaded: {available.reason}")
    if backend == "auto":
        return "op" if dispatch.has_operators(paddle.get_device()) else "python"
    return backend
