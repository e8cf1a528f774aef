"""Which of this rank's rows are visual tokens, and which feature row each takes: answered once, as a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.backends import host
from paddle_vl_sp.layout import SeqLayout

if TYPE_CHECKING:
    from paddle import Tensor
    from paddle.base.core import Place

    Array: TypeAlias = Tensor | npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class VisualPlan:
    """Pairs (row, feature row) of one rank, in reading order; as numpy arrays or as Paddle tensors.

    update_indices  int64 [n]  rows of this rank's flattened hidden states; each at most once
    gather_indices  int64 [n]  feature rows; increasing
    row_shape       (S_local, B) or (B, S_local): the leading shape of the hidden states that the plan is for
    num_features    N, the feature rows of the whole batch; None for a padded plan that was not given it
    counts          int64 [2]  n and N as counted from the tokens, where the indices are

    In a padded plan the arrays have a fixed size, unused pairs are (-1, -1) at the end, and only `counts` knows n.

    >>> layout = SeqLayout(4, sp_size=2, sp_rank=1)
    >>> plan = plan_visual(np.array([[1, 9, 9, 1]]), (9,), layout, sequence_first=True)
    >>> plan.update_indices.tolist(), plan.gather_indices.tolist(), plan.row_shape
    ([0], [1], (2, 1))
    """

    update_indices: Array
    gather_indices: Array
    row_shape: tuple[int, int]
    num_features: int | None

    @classmethod
    def from_indices(
        cls,
        update_indices: Array,
        gather_indices: Array,
        row_shape: Sequence[int],
        num_features: int | None,
        *,
        visual: int | None = None,
    ) -> VisualPlan:
        """The plan of two index arrays that a data loader or an earlier layer has made.

        visual  the visual tokens of the batch, counted where the arrays were made: compared with num_features

        Numpy arrays are checked: update indices are different rows, gather indices increase, none is out of range.
        """
        shapes = list(update_indices.shape), list(gather_indices.shape)
        are_numbers = all(isinstance(size, int) for shape in shapes for size in shape)  # not so in a traced graph
        if len(shapes[0]) != 1 or len(shapes[1]) != 1 or (are_numbers and shapes[0] != shapes[1]):
            raise ValueError(
                f"update and gather indices must be 1-D and of one length, got {shapes[0]} and {shapes[1]}; squeeze "
                "[n, 1] arrays before handing them over"
            )
        first, second = row_shape
        if num_features is not None and num_features < 0:  # an unknown size in the shape of a traced tensor
            num_features = None
        plan = cls(update_indices, gather_indices, (int(first), int(second)), num_features)
        if visual is not None:
            check_feature_count(visual, num_features)
        if isinstance(update_indices, np.ndarray):
            _check_pairs(plan)
        return plan

    @property
    def num_rows(self) -> int:
        """How many rows the flattened hidden states have."""
        return self.row_shape[0] * self.row_shape[1]

    @property
    def on_host(self) -> bool:
        """Whether the indices are numpy arrays."""
        return isinstance(self.update_indices, np.ndarray)

    @property
    def counts(self) -> Array:
        """n of this rank and N of the batch; reading it from a device synchronises.

        A plan from index arrays knows no tokens: its N is num_features, -1 for None.
        """
        used = (self.update_indices >= 0).sum()
        num_features = -1 if self.num_features is None else self.num_features
        if self.on_host:
            return np.array([used, num_features], dtype=np.int64)
        import paddle

        return paddle.stack([used, paddle.full_like(used, num_features)])

    def check(self) -> None:
        """Raises unless the batch has as many visual tokens as feature rows; reads `counts`, one sync on a device."""
        _, visual = self.counts.tolist()
        if self.num_features is None:
            raise ValueError(
                f"the plan was not given the number of feature rows, so its {visual} visual tokens cannot be checked: "
                "plan_visual(..., num_features=features.shape[0])"
            )
        check_feature_count(visual, self.num_features)

    def to(self, place: str | Place) -> VisualPlan:
        """The same plan as tensors on `place` ("cpu", "gpu:0" or a Paddle place); the copy does not synchronise."""
        from paddle_vl_sp.backends.copies import on_place

        update, gather = on_place(self.update_indices, place), on_place(self.gather_indices, place)
        return VisualPlan(update, gather, self.row_shape, self.num_features)


@dataclass(frozen=True, eq=False)
class _PaddedPlan(VisualPlan):
    """A plan of fixed size; n and N were counted where the tokens are."""

    counted: Array  # [2]

    @property
    def counts(self) -> Array:
        return self.counted

    def to(self, place: str | Place) -> VisualPlan:
        from paddle_vl_sp.backends.copies import on_place

        update, gather = on_place(self.update_indices, place), on_place(self.gather_indices, place)
        return _PaddedPlan(update, gather, self.row_shape, self.num_features, on_place(self.counted, place))


def plan_visual(
    tokens: Array,
    placeholder_ids: Sequence[int] | None,
    layout: SeqLayout,
    *,
    sequence_first: bool,
    num_features: int | None = None,
    padded: bool = False,
) -> VisualPlan:
    """The plan of the rank that `layout` describes.

    tokens           ids [B, S] (int32 or int64), or a bool mask [B, S] with placeholder_ids=None;
                     a numpy array gives a plan of numpy arrays, a Paddle tensor one of tensors on its device
    sequence_first   whether the hidden states are [S_local, B, H] or [B, S_local, H]
    num_features     features.shape[0], where the caller knows it: compared with the tokens
    padded           fixed size, no host synchronisation; a mismatch is found by `check()`

    Two samples of six tokens, v visual, cut for two sequence-parallel ranks; the plan of rank 1::

        tokens         t v v v t t        feature rows   . 0 1 2 . .
                       v v t t v t                       3 4 . . 5 .
        rank 1               v t t        local rows           0 1 2     (batch first)
                             t v t                             3 4 5
        update_indices [0 4]   gather_indices [2 5]

    On a device tensor the exact form synchronises once, the padded form never.
    """
    options = (sequence_first, num_features, padded)
    if isinstance(tokens, np.ndarray):
        return _plan(host.build_plan, tokens, placeholder_ids, layout, *options)
    from paddle_vl_sp.backends import dispatch

    return dispatch.untranslated(_plan, dispatch.build_plan, tokens, placeholder_ids, layout, *options)


def _plan(
    build: Callable[..., tuple[Array, Array, Array]],
    tokens: Array,
    placeholder_ids: Sequence[int] | None,
    layout: SeqLayout,
    sequence_first: bool,
    num_features: int | None,
    padded: bool,
) -> VisualPlan:
    ids = checked_ids(tokens, placeholder_ids)
    _check_layout(tokens, layout)
    if num_features is not None and num_features < 0:
        raise ValueError(f"num_features must not be negative, got {num_features}; leave it out if it is not known")
    limit = -1 if num_features is None else int(num_features)
    update, gather, counts = build(tokens, ids, layout, sequence_first, limit, padded)
    batch = int(tokens.shape[0])
    row_shape = (layout.local_len, batch) if sequence_first else (batch, layout.local_len)
    if padded:
        return _PaddedPlan(update, gather, row_shape, num_features, counts)
    visual = int(counts[1])
    if num_features is not None:
        check_feature_count(visual, num_features)
    return VisualPlan(update, gather, row_shape, visual)


def checked_ids(tokens: Array, placeholder_ids: Sequence[int] | None) -> tuple[int, ...] | None:
    """The placeholder ids as a tuple, or None for a bool mask; checks tokens [B, S] and ids."""
    if not hasattr(tokens, "dtype"):
        raise ValueError(f"tokens must be a numpy array or a Paddle tensor [B, S], got {type(tokens).__name__}")
    kind = str(tokens.dtype).removeprefix("paddle.")
    if len(tokens.shape) != 2:
        raise ValueError(f"tokens must be [B, S], got shape {list(tokens.shape)}")
    if placeholder_ids is None:
        if kind != "bool":
            raise ValueError(
                f"without placeholder_ids, tokens must be a bool mask, got {kind}: pass the ids to look for"
            )
        return None
    if kind not in ("int32", "int64"):
        raise ValueError(f"with placeholder_ids, tokens must be int32 or int64 ids, got {kind}")
    ids = tuple(placeholder_ids) if isinstance(placeholder_ids, Iterable) else ()
    if not ids or not all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in ids):
        raise ValueError(
            f"placeholder_ids must be one or more integers, such as (image_id, video_id), got {placeholder_ids!r}"
        )
    return tuple(int(i) for i in ids)


def check_feature_count(visual: int, num_features: int | None, kind: str = "visual") -> None:
    """Raises unless the visual tokens of the batch and its feature rows are equally many."""
    if visual != num_features:
        raise ValueError(
            f"the batch has {visual} {kind} tokens but {num_features} feature rows: every placeholder takes exactly "
            "one row; look for truncated ids, dropped images or a wrong placeholder id"
        )


def _check_pairs(plan: VisualPlan) -> None:
    """What the row functions assume of the index arrays, for numpy arrays."""
    used = plan.update_indices >= 0
    update, gather = (indices[used].astype(np.int64) for indices in (plan.update_indices, plan.gather_indices))
    limit = np.inf if plan.num_features is None else plan.num_features
    in_range = (update < plan.num_rows).all() and ((gather >= 0) & (gather < limit)).all()
    if not in_range or (np.diff(gather) <= 0).any() or (np.bincount(update) > 1).any():
        raise ValueError(
            f"the indices are not a plan for {plan.num_rows} rows and {plan.num_features} feature rows: update indices "
            "must be different rows and gather indices must increase"
        )


def _check_layout(tokens: Array, layout: SeqLayout) -> None:
    batch, seq_len = tokens.shape
    if not isinstance(batch, int) or not isinstance(seq_len, int):
        raise ValueError(
            "a graph of unknown batch or length cannot hold plan_visual, whose layout has a length: trace it with "
            "InputSpec([B, S]), or use export.IndexBuilder"
        )
    if seq_len != layout.seq_len:
        raise ValueError(
            f"tokens are [{batch}, {seq_len}] but the layout is for seq_len {layout.seq_len}: plan with the ids of "
            "the whole padded sequence"
        )
    if layout.cu_seqlens is not None and batch != 1:
        raise ValueError(f"a layout with cu_seqlens describes one packed row, B = 1, got tokens with B = {batch}")
