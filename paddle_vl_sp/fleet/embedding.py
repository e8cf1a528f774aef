"""PaddleFleet's embedding with one row plan for the merge, the deepstack layers and the gradients."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from paddle_vl_sp.carried import GATHER, LEVELS, MASK, PART, UPDATE, indices_to_carry, mask_to_carry, plan_in
from paddle_vl_sp.comm.grads import complete_grad
from paddle_vl_sp.fleet.inputs import FEATURES, VisualInputs, visual_inputs
from paddle_vl_sp.fleet.topology import context_parallel_size, embedding_share, pipeline_size
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan
from paddle_vl_sp.report import note_forward
from paddle_vl_sp.rows import replace_rows
from paddle_vl_sp.settings import CHECK, check_choice
from paddle_vl_sp.verify import CheckFailed, check_loaded, check_order, check_result, checking

MERGES = ("rows", "upstream")


class VisualEmbedding:
    """For a subclass of PaddleFleet's GPTEmbedding: visual features enter this rank's rows by one plan.

    merge = "rows"      features are written after the sequence is cut, and the gradients of all of them, whose parts
                        are spread over the tensor-parallel group, are completed here, in one collective
    merge = "upstream"  PaddleFleet merges; only the gradients of the deepstack levels are completed

    The output has PaddleFleet's keys, and visual_update_indices [n] and visual_gather_indices [n] where the batch
    has visual tokens; in pipelines they are filled up with -1 to one length. Nothing is added to the state.

    ::

        class Embedding(VisualEmbedding, GPTEmbedding):
            pass
    """

    merge = "rows"
    places_by_plan = True
    embedding: Any
    config: Any
    sequence_parallel: bool
    multimodal_embedding: bool

    def forward(
        self, dict_args: dict[str, Any], decoder_input: Tensor | None = None, packed_seq_params: Any = None
    ) -> dict[str, Any]:
        visual = visual_inputs(dict_args, self.config) if self.multimodal_embedding else None
        if visual is None or decoder_input is not None:
            return self._upstream(dict_args, decoder_input, packed_seq_params)
        refuse_combinations(self.config, self.sequence_parallel, visual.num_levels)
        if predicts_more_tokens(self.config):
            return self._upstream(dict_args, None, packed_seq_params)
        return self._merged(dict_args, visual, packed_seq_params)

    def visual_layout(self, seq_len: int) -> SeqLayout:
        """What this rank holds of the sequence. A subclass that cuts by context parallel overrides this."""
        size = context_parallel_size()
        if size > 1:
            raise ValueError(
                f"context parallel (size {size}) with visual features: PaddleFleet does not cut the hidden states of a "
                "multimodal embedding by context parallel, so no rows can be planned; use context_parallel_size=1, or "
                "override visual_layout in a subclass that makes the cut"
            )
        return embedding_share(self).layout(seq_len)

    def _merged(self, dict_args: dict[str, Any], visual: VisualInputs, packed_seq_params: Any) -> dict[str, Any]:
        check_choice("merge", self.merge, MERGES)
        plan = self._plan(dict_args, visual)
        syncs = int(dict_args.get(UPDATE) is None)
        is_upstream = self.merge == "upstream" or reads_the_mask_itself(self.config)
        merge = self._upstream_merge if is_upstream else self._row_merge
        out = merge(dict_args, visual, plan, packed_seq_params)
        if plan.num_features:
            plan, group = plan.to(out["hidden_states"].place), embedding_share(self).group
            if not dict_args.get(PART):  # which is counted where it is cut
                note_forward(plan, num_levels=visual.num_levels, group=group, syncs=syncs)
            stages = pipeline_size(self.config)
            out |= indices_to_carry(plan, stages) | {MASK: mask_to_carry(out[MASK], stages)}
        return out

    def _upstream_merge(
        self, dict_args: dict[str, Any], _: VisualInputs, plan: VisualPlan, packed_seq_params: Any
    ) -> dict[str, Any]:
        out = self._upstream(dict_args, None, packed_seq_params)
        if out.get(LEVELS):  # the main features are whole already: they went in before the cut
            out[LEVELS] = self._completed(out[LEVELS], plan)
        return out

    def _row_merge(
        self, dict_args: dict[str, Any], visual: VisualInputs, plan: VisualPlan, packed_seq_params: Any
    ) -> dict[str, Any]:
        features = visual.joined()
        out = self._upstream({**dict_args, **dict.fromkeys(FEATURES)}, None, packed_seq_params)
        self._insert(out, features, plan.to(out["hidden_states"].place))
        if plan.num_features:
            out[MASK] = visual.mask()
        if checking() and not dict_args.get(PART):
            self._check_merge(out, dict_args, visual, packed_seq_params)
        return out

    def _plan(self, dict_args: dict[str, Any], visual: VisualInputs) -> VisualPlan:
        batch, seq_len = visual.ids.shape
        layout = self.visual_layout(seq_len)
        row_shape = (layout.local_len, batch) if self.sequence_parallel else (batch, layout.local_len)
        loaded: VisualPlan | None = plan_in(dict_args, layout, row_shape, visual.num_features)
        if loaded is None:
            return visual.plan(layout, self.sequence_parallel)
        if checking() and not dict_args.get(PART):
            self._check_loaded(dict_args, visual, layout)
        return loaded.to(visual.ids.place)

    def _check_loaded(self, dict_args: dict[str, Any], visual: VisualInputs, layout: SeqLayout) -> None:
        advice = "the data loader must plan with the ids, the layout and the rank that the model sees"
        arrays = dict_args[UPDATE], dict_args[GATHER]
        check_loaded(*arrays, visual.mask(), layout, self.sequence_parallel, advice)
        if visual.order is not None and len(visual.features) > 1:
            check_order(visual.order, visual.order_of_ids(), advice)

    def _insert(self, out: dict[str, Any], features: list[Tensor], plan: VisualPlan) -> None:
        """Writes the main features into the hidden states and hands on the levels; features are [main, *levels]."""
        if plan.num_features == 0:  # nothing to write, but a tower that ran stays in the graph
            out["hidden_states"] = replace_rows(out["hidden_states"], paddle.concat(features), plan)
            return
        main, *levels = self._completed(features, plan)
        out["hidden_states"] = replace_rows(out["hidden_states"], main, plan)
        if levels:
            out[LEVELS] = levels

    def _completed(self, features: list[Tensor], plan: VisualPlan) -> list[Tensor]:
        share = embedding_share(self)
        return complete_grad(list(features), plan, share.group) if share.size > 1 else list(features)

    def _check_merge(
        self, out: dict[str, Any], dict_args: dict[str, Any], visual: VisualInputs, packed_seq_params: Any
    ) -> None:
        dropout = getattr(self, "training", False) and getattr(self.config, "hidden_dropout_prob", 0.0) > 0
        if dropout or len(visual.features) > 1 or visual.num_features == 0:
            return  # a second forward drops other values; upstream raises on image and video together
        with paddle.no_grad():
            _check_output(out, self._upstream(dict(dict_args), None, packed_seq_params))

    def _upstream(
        self, dict_args: dict[str, Any], decoder_input: Tensor | None, packed_seq_params: Any
    ) -> dict[str, Any]:
        out: dict[str, Any] = super().forward(dict_args, decoder_input, packed_seq_params)  # type: ignore[misc]
        return out


def _check_output(ours: dict[str, Any], upstream: dict[str, Any]) -> None:
    if set(ours) != set(upstream):
        raise CheckFailed(f"{CHECK}: keys differ from PaddleFleet's merge: {sorted(set(ours) ^ set(upstream))}")
    for key, expected in upstream.items():
        pairs = zip(ours[key], expected, strict=True) if isinstance(expected, list) else [(ours[key], expected)]
        for ours_one, upstream_one in pairs:
            if isinstance(upstream_one, paddle.Tensor):
                advice = "set merge = 'upstream' and report it"
                check_result(key, ours_one, upstream_one, advice)


def predicts_more_tokens(config: Any) -> bool:
    """Whether multi-token prediction (MTP) is on."""
    return bool(config.num_nextn_predict_layers) and not config.mtp_load_weight_only


def reads_the_mask_itself(config: Any) -> bool:
    """Whether PaddleFleet clears its embeddings per layer (PLE) at visual tokens, which it knows from its own merge."""
    return bool(getattr(config, "use_per_layer_embeddings", False))


def refuse_combinations(config: Any, sequence_parallel: bool, num_levels: int) -> None:
    if not predicts_more_tokens(config):
        return
    if num_levels:
        raise ValueError(
            f"multi-token prediction (num_nextn_predict_layers={config.num_nextn_predict_layers}) with {num_levels} "
            "deepstack levels: the rows of the levels no longer match the shortened hidden states; turn one of them off"
        )
    if sequence_parallel and getattr(config, "enable_mtp_magic_send", False):
        raise ValueError(
            "enable_mtp_magic_send with sequence_parallel and visual features: PaddleFleet cuts the hidden states "
            "twice, first along the sequence, then along the batch; turn enable_mtp_magic_send off"
        )
