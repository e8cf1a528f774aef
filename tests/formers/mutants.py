"""Edits of PaddleFormers' methods, of three kinds, and what becomes of each: docs/admission.csv is made of them.

    PYTHONPATH=tests:tests/formers python tests/formers/mutants.py docs/admission.csv

same       the code means what it meant: to be admitted
other      it does something else that ours replace or build on: to be refused
elsewhere  it does something else that ours leave to it, so that they still equal it: to be admitted
"""

from __future__ import annotations

import ast
import csv
import inspect
import linecache
import re
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import paddle
from training import importable, module_of

from paddle_vl_sp.formers.admission import try_clauses
from paddle_vl_sp.formers.families import glm_ocr, qwen2_5_vl, qwen3_next, qwen3_vl, qwen3_vl_fleet, text

SAME, OTHER, ELSEWHERE = "same", "other", "elsewhere"


@dataclass(frozen=True)
class Mutant:
    """edits: pairs (a piece of the source as ast.unparse writes it, what it becomes), first place only.

    Further lines are written relative to the first one; \\b begins a name that is renamed everywhere.
    """

    family: object
    method: str
    kind: str
    name: str
    edits: tuple[tuple[str, str], ...]

    def __str__(self):
        return f"{self.method}-{self.name}"

    def edited(self, original, owner):
        return function_of(mutated(inspect.getsource(original), self.edits), original, owner)


def rename(old, new):
    return (rf"\b{old}\b", new)


ADD = "hidden_states[visual_pos_masks, :] + visual_embeds"
CUT = "inputs_embeds = ScatterOp.apply(inputs_embeds)"
CALL = "deepstack_visual_embeds[idx])"
MERGED = "inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_embeds)"
MERGED_VIDEO = "inputs_embeds = inputs_embeds.masked_scatter(video_mask, video_embeds)"
CAST = "image_embeds = paddle.cat(image_embeds, dim=0).astype(inputs_embeds.dtype)"
EMBED = "inputs_embeds = self.get_input_embeddings()(input_ids)"

PLAIN_ADD = {
    SAME: {
        "other names": [rename("local_this", "sums"), rename("visual_offset", "first_feature")],
        "a comment": [("hidden_states = hidden_states.clone()", "# a copy\nhidden_states = hidden_states.clone()")],
        "assignments swapped": [
            (
                "visual_pos_masks = visual_pos_masks.to(hidden_states.device)\n"
                "visual_embeds = visual_embeds.to(hidden_states.device, hidden_states.dtype)",
                "visual_embeds = visual_embeds.to(hidden_states.device, hidden_states.dtype)\n"
                "visual_pos_masks = visual_pos_masks.to(hidden_states.device)",
            )
        ],
        "the terms swapped": [(ADD, "visual_embeds + hidden_states[visual_pos_masks, :]")],
        "counted in another way": [
            ("paddle.sum(paddle.cast(pre_mask, 'int32')).item()", 'int(pre_mask.astype("int64").sum())')
        ],
        "a variable less": [
            ("total_len = visual_pos_masks.shape[0]\nchunk_size = total_len", "chunk_size = visual_pos_masks.shape[0]")
        ],
        "a helper": [
            ("hidden_states = hidden_states.clone()", "copy = lambda x: x.clone()\nhidden_states = copy(hidden_states)")
        ],
        "another guard": [("if start_idx > 0:", "if mp_rank != 0:")],
    },
    OTHER: {
        "no copy": [("hidden_states = hidden_states.clone()", "pass")],
        "minus": [(ADD, "hidden_states[visual_pos_masks, :] - visual_embeds")],
        "twice": [(ADD, "hidden_states[visual_pos_masks, :] + 2 * visual_embeds")],
        "replaces": [(ADD, "visual_embeds")],
        "a mean": [(ADD, "(hidden_states[visual_pos_masks, :] + visual_embeds) / 2")],
        "features from the first on": [("if start_idx > 0:", "if False:")],
        "one feature too far": [
            ("visual_embeds[visual_offset:visual_offset", "visual_embeds[visual_offset + 1:visual_offset + 1")
        ],
        "the other rank": [("start_idx = mp_rank * chunk_size", "start_idx = (mp_size - 1 - mp_rank) * chunk_size")],
        "every n-th row": [("visual_pos_masks[start_idx:end_idx]", "visual_pos_masks[mp_rank::mp_size]")],
        "features without gradient": [(ADD, "hidden_states[visual_pos_masks, :] + visual_embeds.detach()")],
        "hidden states without gradient": [
            ("hidden_states = hidden_states.clone()", "hidden_states = hidden_states.detach().clone()")
        ],
        "the first columns": [
            ("start_col = tp_rank * slice_width", "start_col = 0 * slice_width"),
            ("end_col = start_col", "end_col = 0"),
        ],
        "flat": [("hidden_states = hidden_states.reshape(original_shape)", "pass")],
        "features turned": [(ADD, "hidden_states[visual_pos_masks, :] + visual_embeds.flip(0)")],
        "divided where there are few": [
            (
                ADD,
                "hidden_states[visual_pos_masks, :] + visual_embeds / (visual_embeds.shape[0] < 12 and 2 or 1)",
            )
        ],
        "the mask turned": [
            ("local_mask = visual_pos_masks[start_idx:end_idx]", "local_mask = ~visual_pos_masks[start_idx:end_idx]")
        ],
    },
}
TEXT = {
    SAME: {
        "other names": [rename("all_self_attns", "attentions"), rename("full_indices", "indices")],
        "another loop": [
            (
                "for idx, decoder_layer in enumerate(self.layers):",
                "for idx in range(len(self.layers)):\n    decoder_layer = self.layers[idx]",
            )
        ],
        "the level by a name": [
            (
                "if deepstack_visual_embeds is not None and idx",
                "has_level = deepstack_visual_embeds is not None and idx < len(deepstack_visual_embeds)\n"
                "level = deepstack_visual_embeds[idx] if has_level else None\n"
                "if deepstack_visual_embeds is not None and idx",
            ),
            (CALL, "level)"),
        ],
        "a condition turned": [
            ("if self.config.sequence_parallel:", "if not self.config.sequence_parallel:\n    pass\nelse:")
        ],
    },
    OTHER: {
        "a level less": [("idx < len(deepstack_visual_embeds)", "idx + 1 < len(deepstack_visual_embeds)")],
        "levels from the last on": [(CALL, "deepstack_visual_embeds[len(deepstack_visual_embeds) - 1 - idx])")],
        "a layer later": [
            ("idx < len(deepstack_visual_embeds)", "0 < idx <= len(deepstack_visual_embeds)"),
            (CALL, "deepstack_visual_embeds[idx - 1])"),
        ],
        "the sum dropped": [("hidden_states = self._deepstack_process(", "_ = self._deepstack_process(")],
        "levels without gradient": [(CALL, "deepstack_visual_embeds[idx].detach())")],
        "the mask turned": [
            (
                "_deepstack_process(hidden_states, visual_pos_masks",
                "_deepstack_process(hidden_states, ~visual_pos_masks",
            )
        ],
        "not cut": [(CUT, "pass")],
        "cut before it is flat": [
            (
                "paddle.reshape_(inputs_embeds, [bs * seq_len, hidden_size])",
                "paddle.reshape(inputs_embeds.transpose([1, 0, 2]), [bs * seq_len, hidden_size])",
            )
        ],
        "cut from the end": [(CUT, "inputs_embeds = ScatterOp.apply(inputs_embeds.flip(0))")],
        "not in training": [
            (
                "if deepstack_visual_embeds is not None and idx",
                "if not self.training and deepstack_visual_embeds is not None and idx",
            )
        ],
    },
}
MODEL = {
    SAME: {
        "other names": [rename("image_embeds", "image_rows"), rename("batch_size", "num_samples")],
        "features by another function": [
            (CAST, "image_embeds = paddle.concat(image_embeds, axis=0).astype(inputs_embeds.dtype)")
        ],
        "a step by a name": [
            (MERGED, "placed = inputs_embeds.masked_scatter(image_mask, image_embeds)\ninputs_embeds = placed")
        ],
    },
    OTHER: {
        "half the features": [(MERGED, "inputs_embeds = inputs_embeds.masked_scatter(image_mask, image_embeds * 0.5)")],
        "features added": [
            (
                MERGED,
                "inputs_embeds = inputs_embeds + (inputs_embeds * 0).masked_scatter(image_mask, image_embeds)",
            )
        ],
        "features without gradient": [(CAST, CAST + ".detach()")],
        "features turned": [(CAST, CAST + ".flip(0)")],
        "videos not merged": [(MERGED_VIDEO, "pass")],
        "embeddings scaled before": [(EMBED, EMBED + " * 2.0")],
    },
    ELSEWHERE: {
        "positions shifted": [
            ("outputs = self.language_model(", "position_ids = position_ids + 1\noutputs = self.language_model(")
        ],
        "embeddings scaled after": [
            ("outputs = self.language_model(", "inputs_embeds = inputs_embeds * 2.0\noutputs = self.language_model(")
        ],
    },
}
LEVELS = {
    SAME: {"assignments swapped": [("image_mask = None\nvideo_mask = None", "video_mask = None\nimage_mask = None")]},
    OTHER: {
        "levels from the last on": [
            (
                "deepstack_visual_embeds = deepstack_image_embeds",
                "deepstack_visual_embeds = deepstack_image_embeds[::-1]",
            )
        ],
        "no levels of videos": [("deepstack_visual_embeds = deepstack_video_embeds", "deepstack_visual_embeds = None")],
        "levels scaled": [
            (
                "deepstack_visual_embeds = deepstack_image_embeds",
                "deepstack_visual_embeds = [level / 2 for level in deepstack_image_embeds]",
            )
        ],
        "the mask of nothing": [
            ("visual_pos_masks = image_mask\ndeepstack", "visual_pos_masks = paddle.zeros_like(image_mask)\ndeepstack")
        ],
    },
}
INIT = {
    SAME: {"other names": [rename("layer_idx", "number")]},
    OTHER: {
        "a layer less": [("range(config.num_hidden_layers)", "range(config.num_hidden_layers - 1)")],
        "norms marked already": [
            (
                "self.rotary_emb =",
                "for name, norm in self.named_sublayers():\n"
                "    if name.endswith('_norm'):\n        norm.enable_sequence_parallel()\nself.rotary_emb =",
            )
        ],
    },
}
OUTER = {
    SAME: {"other names": [rename("slice_indices", "kept")]},
    OTHER: {
        "a loss of its own": [
            (
                "loss, _ = self.criterion(logits, labels)",
                "flat = logits.reshape([-1, logits.shape[-1]]), labels.flatten()\n"
                "losses = nn.functional.cross_entropy(*flat, ignore_index=-100, reduction='none')\n"
                "loss = losses.sum() / (labels != -100).astype('float32').sum()",
            )
        ],
        "labels shifted once more": [
            ("self.criterion(logits, labels)", "self.criterion(logits[:, :-1], labels[:, 1:])")
        ],
    },
}
GLM_PLACED = "masked_scatter(inputs_embeds, image_mask, image_embeds)"
GLM = {
    SAME: {
        "other names": [rename("image_embeds_list", "image_rows")],
        "a condition turned": [
            ("(input_ids is None) == (inputs_embeds is None)", "(inputs_embeds is None) == (input_ids is None)")
        ],
    },
    OTHER: {
        "half the features": [(GLM_PLACED, "masked_scatter(inputs_embeds, image_mask, image_embeds * 0.5)")],
        "features turned": [(GLM_PLACED, "masked_scatter(inputs_embeds, image_mask, image_embeds.flip(0))")],
        "embeddings scaled before": [("(input_ids.astype('int64'))", "(input_ids.astype('int64')) * 2.0")],
        "positions without grids": [
            (
                "self.get_rope_index(input_ids, image_grid_thw=image_grid_thw",
                "self.get_rope_index(input_ids * 0 + 1, image_grid_thw=None",
            )
        ],
        "videos left out": [("if pixel_values_videos is not None:", "if False:")],
    },
}
FLEET_ADD = {
    SAME: {
        "other names": [rename("cumulative_total", "before"), rename("per_sample_pre", "skipped")],
        "no read of what is known": [
            ("total_i = int(per_sample_total[i].item())", "total_i = int(per_sample_total[i])")
        ],
        "mask flat by reshape": [
            ("visual_pos_masks = local_mask.flatten()", "visual_pos_masks = local_mask.reshape([-1])")
        ],
    },
    OTHER: {
        "no copy and in place": [
            ("hidden_states = hidden_states.clone()", "pass"),
            (
                "paddle.scatter_nd_add(hidden_states, update_indices, visual_embeds)",
                "hidden_states.add_(paddle.scatter_nd_add(hidden_states * 0, update_indices, visual_embeds))",
            ),
        ],
        "the order of the sequence": [
            (
                "gather_indices.append(paddle.arange(cumulative_total + pre_i, cumulative_total + pre_i + count_i))",
                "gather_indices.append(paddle.arange(pre_i, pre_i + count_i))",
            )
        ],
        "samples not counted": [("cumulative_total += total_i", "cumulative_total += count_i")],
        "the first share": [("start_s = mp_rank * chunk_s", "start_s = 0 * chunk_s")],
        "twice": [("update_indices, visual_embeds)", "update_indices, 2 * visual_embeds)")],
        "not turned back": [("if _sp_transposed:", "if False:")],
        "features without gradient": [("update_indices, visual_embeds)", "update_indices, visual_embeds.detach())")],
    },
}
FLEET_LAYER = {
    SAME: {
        "other names": [rename("rst", "result"), rename("context_mask", "mask_of_context")],
        "a comparison": [
            (
                "self.layer_number in range(len(deepstack_visual_emb))",
                "0 <= self.layer_number < len(deepstack_visual_emb)",
            )
        ],
    },
    OTHER: {
        "a level less": [("range(len(deepstack_visual_emb))", "range(len(deepstack_visual_emb) - 1)")],
        "the first level": [("deepstack_visual_emb[self.layer_number]", "deepstack_visual_emb[0]")],
        "the sum dropped": [("output = self._deepstack_process(", "_ = self._deepstack_process(")],
        "a new dict": [("rst = {**dict_args, **rst}", "rst = {**rst}")],
        "before the layer": [("hidden_states=output,", "hidden_states=dict_args['hidden_states'],")],
    },
}
FLEET_MODEL = {
    SAME: {
        "other names": [rename("tensor_list", "found"), rename("input_dict", "given")],
        "another order of keys": [
            (
                "'input_ids': input_ids, 'position_ids': position_ids,",
                "'position_ids': position_ids, 'input_ids': input_ids,",
            )
        ],
    },
    OTHER: {
        "by name": [("self.language_model(input_dict)", "self.language_model(dict_args=input_dict)")],
        "kinds swapped": [
            (
                "'image_embeds': image_embeds, 'video_embeds': video_embeds,",
                "'image_embeds': video_embeds, 'video_embeds': image_embeds,",
            )
        ],
        "levels lost": [("'deepstack_image_embeds': deepstack_image_embeds,", "'deepstack_image_embeds': None,")],
        "twice": [
            (
                "output = self.language_model(input_dict)",
                "self.language_model(input_dict)\noutput = self.language_model(input_dict)",
            )
        ],
        "features scaled": [
            ("image_embeds = paddle.cat(image_embeds, dim=0)", "image_embeds = paddle.cat(image_embeds, dim=0) * 2.0")
        ],
    },
}
WORDS = {
    SAME: {
        "other names": [rename("hidden_states", "rows")],
        "positions made elsewhere": [
            (
                "position_ids = paddle.arange(seq_length, dtype='int64').expand((batch_size, seq_length))",
                "position_ids = paddle.arange(seq_length).expand([batch_size, seq_length])",
            )
        ],
    },
    OTHER: {
        "indices lost": [
            (
                "attn_mask_startend_row_indices=attn_mask_startend_row_indices_mapping[decoder_layer.attention_type],",
                "attn_mask_startend_row_indices=None,",
            ),
            (
                "attn_mask_startend_row_indices=attn_mask_startend_row_indices_mapping[decoder_layer.attention_type],",
                "attn_mask_startend_row_indices=None,",
            ),
        ],
        "own positions": [("if position_ids is None:", "if True:")],
        "a layer less": [("enumerate(self.layers)", "enumerate(self.layers[:-1])")],
    },
}
MIXED_LAYERS = {
    SAME: {"other names": [rename("hidden_states", "rows"), rename("layer_mask", "mask_of_layer")]},
    OTHER: {
        "the mask lost": [("linear_attn_mask if decoder_layer", "None if decoder_layer")],
        "keywords lost": [("cache_position=cache_position, **kwargs)", "cache_position=cache_position)")],
        "own positions": [("if position_ids is None:", "if True:")],
    },
}
DELTA_NET = {
    SAME: {"other names": [rename("mixed_qkv", "joined")]},
    OTHER: {
        "another strength": [("beta = b.sigmoid()", "beta = b.sigmoid() * 0.5")],
        "another decay": [("F.softplus(a.float() + self.dt_bias)", "F.softplus(a.float())")],
        "no unit length": [("use_qk_l2norm_in_kernel=True", "use_qk_l2norm_in_kernel=False")],
        "another activation": [("F.silu(self.conv1d(", "F.relu(self.conv1d(")],
    },
}

P, Q, G, F = qwen3_vl.PLAIN, qwen2_5_vl.FAMILY, glm_ocr.FAMILY, qwen3_vl_fleet.FAMILY
TABLE = (
    (P, "Qwen3VLTextModel._deepstack_process", PLAIN_ADD),
    (P, "Qwen3VLTextModel.forward", TEXT),
    (P, "Qwen3VLModelDeprecated.forward", MODEL),
    (P, "Qwen3VLModelDeprecated.forward", LEVELS),
    (P, "Qwen3VLTextModel.__init__", INIT),
    (P, "Qwen3VLForConditionalGenerationDeprecated.forward", OUTER),
    (Q, "Qwen2_5_VLModel.forward", MODEL),
    (G, "GlmOcrModel.forward", GLM),
    (F, "Qwen3VLTextTransformerLayer._deepstack_process", FLEET_ADD),
    (F, "Qwen3VLTextTransformerLayer.forward", FLEET_LAYER),
    (F, "Qwen3VLModelDist.forward", FLEET_MODEL),
    (text.QWEN3, "Qwen3Model.forward", WORDS),
    (qwen3_next.FAMILY, "Qwen3NextModel.forward", MIXED_LAYERS),
    (qwen3_next.FAMILY, "Qwen3NextGatedDeltaNet.forward", DELTA_NET),
)
MUTANTS = [
    Mutant(family, method, kind, name, tuple(edits))
    for family, method, kinds in TABLE
    for kind, named in kinds.items()
    for name, edits in named.items()
]


def mutated(source, edits):
    """The source with each edit; an edit that finds nothing is an error of this list."""
    source = ast.unparse(ast.parse(textwrap.dedent(source)))  # one line a statement, four spaces a level
    for old, new in edits:
        if old.startswith(r"\b"):
            assert re.search(old, source), f"{old} is not in the source"
            source = re.sub(old, new, source)
            continue
        start = re.search(rf"(?m)^( *).*?{re.escape(old.partition(chr(10))[0])}", source)
        assert start, f"{old!r} is not in the source"
        old, new = (text.replace("\n", f"\n{start[1]}") for text in (old, new))
        assert old in source, f"{old!r} is not in the source"
        source = source.replace(old, new, 1)
    return source


def function_of(source, original, owner):
    """Compiled as a method of that class, with a source that inspect finds."""
    source = source.replace("super()", f"super({owner}, self)")
    file = f"<mutant {hash(source)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    names = inspect.unwrap(original).__globals__
    scope = {}
    exec(compile(source, file, "exec"), names, scope)
    return scope[original.__name__]


@contextmanager
def in_place(mutant, module):
    owner, _, name = mutant.method.partition(".")
    cls = getattr(module, owner)
    original = vars(cls)[name]
    with mock.patch.object(cls, name, mutant.edited(original, owner)):
        yield


def broken_clauses(mutant):
    with importable(mutant.family), in_place(mutant, module_of(mutant.family)):
        module = module_of(mutant.family)
        return [f"{says}: {why}" for says, why in try_clauses(mutant.family, module, is_shared=False) if why]


def write(path):
    from fleet_mutants import FLEET_MUTANTS

    paddle.set_device("cpu")
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["method", "the edited code is", "edit", "verdict", "first broken clause"])
        for mutant in [*MUTANTS, *FLEET_MUTANTS]:
            broken = broken_clauses(mutant)
            rows.writerow([mutant.method, mutant.kind, mutant.name, "refused" if broken else "admitted", *broken[:1]])


if __name__ == "__main__":
    write(sys.argv[1])
