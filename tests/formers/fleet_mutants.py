"""Edits of PaddleFleet's embedding and LM head, whatever their text is: made of what the methods take and return.

So they are tried on the double of PaddleFleet, and on the installed package where there is one. Those that mean the
same also rewrite the text. docs/admission.csv has them, as tried on the double.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import paddle
from mutants import ELSEWHERE, OTHER, SAME, function_of

from paddle_vl_sp.formers.families.paddlefleet import EMBEDDING, HEAD

HIDDEN, MASK, LEVELS = "hidden_states", "visual_pos_masks", "deepstack_visual_emb"
VISUAL = ("image_embeds", "video_embeds")


@dataclass(frozen=True)
class FleetMutant:
    """make: the edited method, from the original and its class's name."""

    family: object
    method: str
    kind: str
    name: str
    make: Any

    def __str__(self):
        return f"{self.method}-{self.name}"

    def edited(self, original, owner):
        return self.make(original, owner)


def after(change):
    """Of what forward returns, given the embedding and what it was given."""

    def make(original, _):
        def forward(self, dict_args, decoder_input=None, packed_seq_params=None):
            out = original(self, dict_args, decoder_input, packed_seq_params)
            return change(out, self, dict_args) or out

        return forward

    return make


def before(change):
    def make(original, _):
        def forward(self, dict_args, decoder_input=None, packed_seq_params=None):
            return original(self, change(dict(dict_args)), decoder_input, packed_seq_params)

        return forward

    return make


def built(change):
    """Of what the constructor leaves."""

    def make(original, _):
        def __init__(self, *args, **kwargs):  # noqa: N807
            original(self, *args, **kwargs)
            change(self)

        return __init__

    return make


def on(key, change):
    """Of one value that forward returns, where it does."""

    def of_output(out, *_):
        if out.get(key) is not None:
            out[key] = change(out[key])

    return after(of_output)


def moved(key, new):
    def of_output(out, *_):
        if key in out:
            out[new] = out.pop(key)

    return after(of_output)


def with_features(given):
    return any(given.get(kind) is not None for kind in VISUAL)


def hidden_with_features(change):
    def of_output(out, _, given):
        if with_features(given):
            out[HIDDEN] = change(out[HIDDEN])

    return after(of_output)


def on_features(change):
    def of_given(given):
        return given | {kind: change(given[kind]) for kind in VISUAL if given.get(kind) is not None}

    return before(of_given)


def under_sp(change):
    def of_output(out, embedding, _):
        if embedding.config.sequence_parallel:
            out[HIDDEN] = change(out[HIDDEN])

    return after(of_output)


def refuse_none(given):
    assert all(given[kind] is not None for kind in VISUAL if kind in given)
    return given


def mask_of_this_rank(out, embedding, _):
    if MASK in out and embedding.config.sequence_parallel:
        out[MASK] = out[MASK][:, : out[HIDDEN].shape[0]]


def empty_visual_keys(out, *_):
    out.setdefault(LEVELS, [])
    out.setdefault(MASK, paddle.zeros([1, 12], dtype="bool"))


def another_argument(original, _):
    def forward(self, dict_args, decoder_input, packed_seq_params, inference_context):
        return original(self, dict_args, decoder_input, packed_seq_params)

    return forward


def by_name(original, _):
    def forward(self, *, dict_args, decoder_input=None, packed_seq_params=None):
        return original(self, dict_args, decoder_input, packed_seq_params)

    return forward


def rewritten(change):
    """The text, parsed and changed."""

    def make(original, owner):
        tree = change(ast.parse(textwrap.dedent(inspect.getsource(original))))
        return function_of(ast.unparse(ast.fix_missing_locations(tree)), original, owner)

    return make


class _Renamed(ast.NodeTransformer):
    def __init__(self, names):
        self.names = names

    def visit_Name(self, node):
        return ast.copy_location(ast.Name(f"{node.id}_", node.ctx), node) if node.id in self.names else node


def local_names(tree):
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return _Renamed(names - {arg.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for arg in n.args}).visit(
        tree
    )


def a_statement_more(tree):
    tree.body[0].body.insert(0, ast.parse("_ = 'a value that nothing reads'").body[0])
    return tree


def a_helper(original, _):
    def forward(self, *args, **kwargs):
        return _helper(original, self, *args, **kwargs)

    return forward


def _helper(original, self, *args, **kwargs):
    return original(self, *args, **kwargs)


def a_new_setting(original, _):
    """The constructor takes one more argument, which later builders give."""

    def __init__(self, sublayers_spec, config, vocab_size, max_sequence_length, new_setting, **kwargs):  # noqa: N807
        original(self, sublayers_spec, config, vocab_size, max_sequence_length, **kwargs)
        self.new_setting = new_setting

    return __init__


def gone(*names):
    def change(layer):
        for name in names:
            delattr(layer, name)

    return built(change)


def cut_by_the_table(embedding):
    table = embedding.embedding
    table.sequence_parallel = table.scatter_to_sequence_parallel = embedding.config.sequence_parallel


def without_a_group(embedding):
    embedding.embedding.tp_group = None


FORWARD = {
    SAME: {
        "formatted": rewritten(lambda tree: tree),
        "other names": rewritten(local_names),
        "a value that nothing reads": rewritten(a_statement_more),
        "a helper": a_helper,
        "a copy of the dict": before(dict),
        "the keys in another order": after(lambda out, *_: dict(reversed(out.items()))),
        "hidden states copied": on(HIDDEN, lambda hidden: hidden.clone()),
        "levels in a new list": on(LEVELS, list),
    },
    OTHER: {
        "rows doubled": on(HIDDEN, lambda hidden: hidden * 2),
        "rows doubled where there are features": hidden_with_features(lambda hidden: hidden * 2),
        "rows rounded where there are features": hidden_with_features(lambda hidden: (hidden * 64).round() / 64),
        "rows turned": on(HIDDEN, lambda hidden: hidden.flip(0)),
        "the next rows": on(HIDDEN, lambda hidden: hidden.roll(1, 0)),
        "samples first under sequence parallelism": under_sp(lambda hidden: hidden.transpose([1, 0, 2])),
        "flattened under sequence parallelism": under_sp(lambda hidden: hidden.flatten(0, 1)),
        "rows of the other half": under_sp(lambda hidden: paddle.concat(hidden.split(3, 0)[::-1], 0)),
        "half precision": on(HIDDEN, lambda hidden: hidden.astype("float16")),
        "rows without gradient": on(HIDDEN, lambda hidden: hidden.detach() + 0 * hidden.mean()),
        "another name for the rows": moved(HIDDEN, "hidden"),
        "features doubled": on_features(lambda rows: rows * 2),
        "features turned": on_features(lambda rows: rows.flip(0)),
        "features without gradient": on_features(lambda rows: rows.detach()),
        "features that may not be None": before(refuse_none),
        "levels turned": on(LEVELS, lambda levels: levels[::-1]),
        "a level less": on(LEVELS, lambda levels: levels[1:]),
        "levels doubled": on(LEVELS, lambda levels: [level * 2 for level in levels]),
        "levels without gradient": on(LEVELS, lambda levels: [level.detach() for level in levels]),
        "the first level for all": on(LEVELS, lambda levels: [levels[0]] * len(levels)),
        "levels in one tensor": on(LEVELS, paddle.stack),
        "another name for the levels": moved(LEVELS, "deepstack_embeds"),
        "another name for the mask": moved(MASK, "visual_masks"),
        "the mask of the text": on(MASK, lambda mask: ~mask),
        "a mask of numbers": on(MASK, lambda mask: mask.astype("int32")),
        "a flat mask": on(MASK, lambda mask: mask.flatten()),
        "the mask of this rank": after(mask_of_this_rank),
        "visual keys without features": after(empty_visual_keys),
        "a tuple": after(lambda out, *_: (out,)),
        "another argument": another_argument,
        "arguments by name": by_name,
    },
    ELSEWHERE: {
        "a key more": after(lambda out, *_: out | {"num_tokens": 12}),
        "other positions": on("position_ids", lambda ids: ids + 1),
    },
}
CONSTRUCTOR = {
    SAME: {
        "formatted": rewritten(lambda tree: tree),
        "a new setting": a_new_setting,
        "an attribute more": built(lambda embedding: setattr(embedding, "new_setting", 1)),
    },
    OTHER: {
        "no sequence_parallel": gone("sequence_parallel"),
        "no multimodal_embedding": gone("multimodal_embedding"),
        "no embedding": gone("embedding"),
        "never multimodal": built(lambda embedding: setattr(embedding, "multimodal_embedding", False)),
        "never cut": built(lambda embedding: setattr(embedding, "sequence_parallel", False)),
        "cut by the table as well": built(cut_by_the_table),
        "without a group": built(without_a_group),
    },
}


def renamed_weight(head):
    weight, head.weight = head.weight, None
    head.lm_weight = weight


def head_of(change):
    """The head's forward over weights that are changed for the time being."""

    def make(_, __):
        def forward(self, dict_args):
            logits = paddle.matmul(dict_args[HIDDEN], change(self.weight).T)
            return logits.transpose([1, 0, 2]) if self.config.sequence_parallel else logits

        return forward

    return make


def transposed_weight(head):
    if head.weight is not None:
        head.weight = head.create_parameter(head.weight.shape[::-1])


def always_a_weight(head):
    head.weight = head.weight if head.weight is not None else head.create_parameter([16, 6])


HEAD_FORWARD = {
    SAME: {
        "formatted": rewritten(lambda tree: tree),
        "other names": rewritten(local_names),
        "a helper": a_helper,
        "another multiplication": head_of(lambda weight: weight),
    },
    OTHER: {
        "the weight without gradient": head_of(lambda weight: weight.detach()),
        "another key": lambda original, _: lambda self, dict_args: original(self, {HIDDEN: dict_args["rows"]}),
        "another argument": lambda original, _: lambda self, dict_args, labels: original(self, dict_args),
    },
    ELSEWHERE: {"other logits": head_of(lambda weight: weight * 2)},
}
HEAD_CONSTRUCTOR = {
    SAME: {"formatted": rewritten(lambda tree: tree), "an attribute more": built(lambda head: setattr(head, "new", 1))},
    OTHER: {
        "another name for the weight": built(renamed_weight),
        "no weight": gone("weight"),
        "a weight [in, out]": built(transposed_weight),
        "a weight where it is told not to": built(always_a_weight),
        "two weights": built(lambda head: setattr(head, "weight", [head.weight, head.weight])),
    },
}
FLEET_MUTANTS = [
    FleetMutant(family, method, kind, name, make)
    for family, method, kinds in (
        (EMBEDDING, "GPTEmbedding.forward", FORWARD),
        (EMBEDDING, "GPTEmbedding.__init__", CONSTRUCTOR),
        (HEAD, "GPTLMHead.forward", HEAD_FORWARD),
        (HEAD, "GPTLMHead.__init__", HEAD_CONSTRUCTOR),
    )
    for kind, named in kinds.items()
    for name, make in named.items()
]
