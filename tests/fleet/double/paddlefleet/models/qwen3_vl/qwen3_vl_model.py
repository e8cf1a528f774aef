from paddlefleet.transformer.transformer_layer import TransformerLayer


class Qwen3VLTextTransformerLayer(TransformerLayer):
    """Adds level `layer_number` for one rank holding the whole sequence [B, S, H]; drops nothing."""

    def forward(self, dict_args):
        dict_args.pop("position_ids", None)
        out = super().forward(dict_args)
        levels = dict_args.get("deepstack_visual_emb") or []
        if self.layer_number in range(len(levels)):
            hidden, level = out["hidden_states"], levels[self.layer_number]
            at = dict_args["visual_pos_masks"].nonzero()
            out["hidden_states"] = hidden.scatter_nd_add(at, level)
        return out
