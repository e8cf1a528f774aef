"""The ranks of these tests, which are forks: as new processes, in what they find, say and return."""

import os
import random
import sys

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from test_run_ranks import die_silently, fail_on_one, hang_on_one

import rank_server
from paddle_vl_sp.testing import RanksFailed, run_ranks

NAMES = [f"name{i}" for i in range(50)]


def state():
    """What ranks must not share, and what they must have."""
    drawn = [random.random(), float(np.random.rand()), float(paddle.rand([1]))]
    return {
        "rank": (dist.get_rank(), os.environ["PADDLE_TRAINER_ID"]),
        "order": list(set(NAMES)),
        "drawn": drawn,
        "parent": os.getppid(),
        "argv": sys.argv[0],
        "formers": [name for name in sys.modules if name.partition(".")[0] == "paddleformers"],
    }


@pytest.fixture(scope="module")
def states():
    return run_ranks(state, 2), run_ranks(state, 2)


def test_they_are_forks_of_two_servers(states):
    """Without this the tests below say nothing."""
    servers = {server.process.pid for server in rank_server.servers.values()}
    assert all({rank["parent"] for rank in ranks} == servers for ranks in states)


def test_ranks_have_their_place_and_nothing_of_each_other(states):
    """Random numbers and the order of sets differ between ranks, as between new processes; numbers between runs too."""
    for ranks in states:
        assert [rank["rank"] for rank in ranks] == [(0, "0"), (1, "1")]
        assert ranks[0]["order"] != ranks[1]["order"]
        assert all(rank["argv"] == "-c" and not rank["formers"] for rank in ranks)
    drawn = np.array([rank["drawn"] for ranks in states for rank in ranks])
    assert all(len(set(column)) == len(drawn) for column in drawn.T)


def test_another_environment_is_a_new_process(monkeypatch):
    """Variables that libraries read when they are imported are then read."""
    monkeypatch.setenv("FLAGS_check_nan_inf", "1")
    servers = {server.process.pid for server in rank_server.servers.values()}
    assert not servers & {rank["parent"] for rank in run_ranks(state, 2)}


def test_what_goes_wrong_is_told():
    """By rank: an error, an exit code, the line of a hang."""
    with pytest.raises(RanksFailed, match="rank 1 says no, with numbers 3 and 4"):
        run_ranks(fail_on_one, 2)
    with pytest.raises(RanksFailed, match="rank 0: ended with code 7"):
        run_ranks(die_silently, 2)
    with pytest.raises(RanksFailed, match="in hang_on_one"):
        run_ranks(hang_on_one, 2, timeout=2)
