"""Attention over a sequence that several ranks share: its kinds, its batches and its loss."""

from paddle_vl_sp.attention.chosen import ChosenAttention
from paddle_vl_sp.attention.context_parallel import ContextParallel
from paddle_vl_sp.attention.delta import gated_delta_rule
from paddle_vl_sp.attention.gather import gather_attention
from paddle_vl_sp.attention.groups import SequenceGroups, choose_degrees, groups_from_fleet, groups_from_ranks
from paddle_vl_sp.attention.linear import gated_delta_net_sp
from paddle_vl_sp.attention.ring import packed_attention, ring_attention
from paddle_vl_sp.attention.ulysses import ulysses_attention
from paddle_vl_sp.sequence.batch import pad_batch, shard_batch
from paddle_vl_sp.sequence.join import unshard
from paddle_vl_sp.sequence.loss import gathered_losses, sequence_parallel_loss, token_losses
from paddle_vl_sp.sequence.padding import padded_layout

__all__ = [
    "ChosenAttention",
    "ContextParallel",
    "SequenceGroups",
    "choose_degrees",
    "gated_delta_net_sp",
    "gated_delta_rule",
    "gather_attention",
    "gathered_losses",
    "groups_from_fleet",
    "groups_from_ranks",
    "packed_attention",
    "pad_batch",
    "padded_layout",
    "ring_attention",
    "sequence_parallel_loss",
    "shard_batch",
    "token_losses",
    "ulysses_attention",
    "unshard",
]
