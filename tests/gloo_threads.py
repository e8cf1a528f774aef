"""Keeps gloo's threads from the time of the ranks that they serve, where there are more ranks than cores.

A thread of gloo asks the kernel over and over as long as its rank holds a lock that it needs: a quarter of all the time
that ranks took. On the core of its rank, and at a low priority, it lets the rank go on instead. A rank needs no second
core, since OMP_NUM_THREADS is 1.
"""

from __future__ import annotations

import contextlib
import os
import threading

NICE = 10


def give_way(rank: int) -> None:
    """In the process of a rank: for all groups that are there, and that are made from now on by the main thread."""
    from paddle.distributed import collective, parallel

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    make_group = collective._new_process_group_impl
    rank_itself = str(threading.get_native_id())

    def lower():
        for thread in set(os.listdir("/proc/self/task")) - {rank_itself}:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, int(thread), NICE)

    def then_lower(*args, **named):
        group = make_group(*args, **named)
        lower()
        return group

    lower()
    collective._new_process_group_impl = parallel._new_process_group_impl = then_lower
