"""The slow, obvious answers: loops over the full sequence, then the framework's own way of cutting it.

Nothing here is shared with the package, so a mistake would have to be made twice.
"""

from itertools import pairwise

import numpy as np


def cut_positions(seq_len, cp_size, cp_rank, cp_mode, sp_size, sp_rank, cu_seqlens=None):
    """The global positions one rank owns, by splitting lists: segment by segment for cp, then the rest for sp."""
    bounds = cu_seqlens or (0, seq_len)
    row = []
    for begin, end in pairwise(bounds):
        segment = list(range(begin, end))
        if cp_size == 1:
            row += segment
        elif cp_mode == "zigzag":
            chunks = np.array_split(segment, 2 * cp_size)
            row += [*chunks[cp_rank], *chunks[2 * cp_size - 1 - cp_rank]]
        else:
            row += list(np.array_split(segment, cp_size)[cp_rank])
    return [int(position) for position in np.array_split(row, sp_size)[sp_rank]]


def pairs(visual, positions, sequence_first):
    """(update, gather) of the rank that owns `positions`, one token at a time. visual is bool [B, S]."""
    batch, seq_len = visual.shape
    local = {position: place for place, position in enumerate(positions)}
    update, gather, feature_row = [], [], 0
    for b in range(batch):
        for s in range(seq_len):
            if not visual[b, s]:
                continue
            if s in local:
                update.append(local[s] * batch + b if sequence_first else b * len(positions) + local[s])
                gather.append(feature_row)
            feature_row += 1
    return update, gather


def full_then_cut(hidden, features, visual, positions, sequence_first, write):
    """write(row, feature) on the full hidden [B, S, H] token by token, then this rank's part in its own order."""
    full = hidden.copy()
    for feature_row, (b, s) in enumerate(zip(*np.nonzero(visual), strict=True)):
        full[b, s] = write(full[b, s], features[feature_row])
    return cut(full, positions, sequence_first)


def cut(full, positions, sequence_first):
    """This rank's part of [B, S, H]: [B, S_local, H], or [S_local, B, H]."""
    part = full[:, positions]
    return part.transpose(1, 0, 2) if sequence_first else part
