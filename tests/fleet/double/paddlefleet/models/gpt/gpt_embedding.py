from dataclasses import dataclass

import paddle
from paddle.distributed.fleet.meta_parallel import LayerSpec, ScheduleNode, build_spec_layer
from paddlefleet.models.gpt.utils import fill_feature
from paddlefleet.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from paddlefleet.transformer.layer import FleetLayer


@dataclass
class GPTEmbeddingSpec:
    language_embedding: LayerSpec
    rope_embedding: LayerSpec | None


class GPTEmbedding(FleetLayer):
    """Embeds ids, merges visual features, cuts the sequence. `older` tells the two known shapes of the class apart."""

    older = False

    def __init__(
        self,
        sublayers_spec,
        config,
        vocab_size,
        max_sequence_length,
        position_embedding_type="learned_absolute",
        rotary_percent=1.0,
        rotary_base=10000,
        swa_rotary_base=10000,
        rope_scaling=False,
        mrope_section=None,
    ):
        super().__init__(config)
        self.embedding = build_spec_layer(
            sublayers_spec.language_embedding,
            config=config,
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            position_embedding_type=position_embedding_type,
        )
        self.sequence_parallel = config.sequence_parallel
        self.multimodal_embedding = config.multimodal_embedding
        if self.sequence_parallel and (self.multimodal_embedding or self._predicts_more()):
            self.embedding.scatter_to_sequence_parallel = False
            self.embedding.sequence_parallel = False
            for part in (self.embedding, self.embedding.embed_tokens):
                part.reduce_scatter_embeddings = False
        self.rotary_pos_emb = self.swa_rotary_pos_emb = None
        self.mrope_section = mrope_section
        self.position_embedding_type = position_embedding_type

    @property
    def embedding_weight(self):
        return self.embedding.embedding_weight

    def build_schedule_node(self):
        return ScheduleNode(self.forward, name="GPTEmbedding")

    def forward(self, dict_args, decoder_input=None, packed_seq_params=None):
        input_ids = dict_args["input_ids"]
        if input_ids is None and decoder_input is None:
            decoder_input = dict_args["decoder_input"]
        mask = levels = moe_ids = None
        hidden = decoder_input
        if decoder_input is None:
            hidden = self.embedding(input_ids=input_ids, position_ids=None)
            if self.config.expert_model_parallel_size > 1 and self.config.tensor_model_parallel_size < 2:
                padding_id = 0 if self.older else self.config.pad_token_id
                hidden = fill_feature(hidden, input_ids == padding_id, 0)
                moe_ids = input_ids
            if self.multimodal_embedding:
                hidden, mask, levels = self._merge_multimodal(dict_args, input_ids, hidden)
                hidden, mask = self._cut(hidden, mask, levels)
        if paddle.core._has_grad():
            hidden.stop_gradient = False
        out = {
            "hidden_states": hidden,
            "attention_mask": dict_args.get("attention_mask"),
            "position_ids": dict_args.get("position_ids"),
            "deepstack_visual_emb": levels,
            "visual_pos_masks": mask,
            "input_ids": moe_ids,
        }
        return {key: value for key, value in out.items() if value is not None}

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features=None, video_features=None):
        masks = []
        for kind, features in (("image", image_features), ("video", video_features)):
            is_kind = input_ids == getattr(self.config, f"{kind}_token_id")  # [B, S]
            if features is not None and int(is_kind.sum()) != features.shape[0]:
                raise ValueError(f"{kind} features and tokens do not match: {int(is_kind.sum())}, {features.shape[0]}")
            masks.append(is_kind.unsqueeze(-1).expand_as(inputs_embeds))  # [B, S, H]
        return tuple(masks)

    def _merge_multimodal(self, dict_args, input_ids, hidden):
        levels, masks = [], []
        for place, kind in enumerate(("image", "video")):
            features = dict_args.get(f"{kind}_embeds")
            if features is None:
                continue
            is_kind = self.get_placeholder_mask(input_ids, hidden, **{f"{kind}_features": features})[place]
            at = paddle.nonzero(is_kind.flatten()).flatten()
            rows = features.astype(hidden.dtype).flatten()
            hidden = paddle.scatter(hidden.flatten(), at, rows).reshape(hidden.shape) if at.shape[0] else hidden
            masks.append(is_kind[..., 0])
            levels.append(dict_args.get(f"deepstack_{kind}_embeds"))
        if not masks:
            return hidden, None, None
        if len(masks) == 1:
            return hidden, masks[0], levels[0]
        mask = masks[0] | masks[1]
        return hidden, mask, [self._joint(masks, mask, *pair) for pair in zip(*levels, strict=False)]

    def _joint(self, masks, mask, image, video):
        rows = int(mask.sum())
        share = [paddle.masked_select(kind.astype(image.dtype), mask).unsqueeze(-1) for kind in masks]
        return image.reshape([rows, -1]) * share[0] + video.reshape([rows, -1]) * share[1]

    def _cut(self, hidden, mask, levels):
        if self._predicts_more():
            assert not self.older, "MTP not support mm for now."
            if levels is not None:
                raise ValueError("deepstack + MTP is not supported.")
            n = self.config.num_nextn_predict_layers
            tokens = [hidden[:, depth : hidden.shape[1] - n + depth] for depth in range(n + 1)]
            return paddle.concat(tokens), mask if mask is None else mask[..., :-n]
        if self.sequence_parallel:
            hidden = hidden.transpose([1, 0, 2]).contiguous()
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.embedding.tp_group)
        return hidden, mask

    def _predicts_more(self):
        return bool(self.config.num_nextn_predict_layers) and not self.config.mtp_load_weight_only
