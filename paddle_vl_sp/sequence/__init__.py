"""The other arrays of a cut sequence: batches cut and padded, shares joined again, the loss."""

from paddle_vl_sp.sequence.batch import pad_batch, shard_batch
from paddle_vl_sp.sequence.join import unshard
from paddle_vl_sp.sequence.loss import gathered_losses, sequence_parallel_loss, token_losses
from paddle_vl_sp.sequence.padding import padded_layout

__all__ = [
    "gathered_losses",
    "pad_batch",
    "padded_layout",
    "sequence_parallel_loss",
    "shard_batch",
    "token_losses",
    "unshard",
]
