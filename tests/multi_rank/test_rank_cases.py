"""Cases that hang or fail are told by name; those before and after them have outcomes of their own."""

import time

import paddle
import paddle.distributed as dist
import pytest

from rank_cases import PATIENCE, stories

LIMIT = 4.0 + PATIENCE


def meets_all():
    x = paddle.ones([1])
    dist.all_reduce(x)
    assert x.item() == dist.get_world_size()


def fails_on_every_rank():
    meets_all()
    pytest.fail(f"no, says {dist.get_rank()}")


def fails_on_one_while_the_other_waits():
    assert dist.get_rank() == 0, "not I"
    meets_all()


def hangs_on_one():
    if dist.get_rank() == 1:
        time.sleep(1000)  # the line that the report must show
    meets_all()


def meets_all_again():
    meets_all()


CASES = [
    meets_all,
    fails_on_every_rank,
    fails_on_one_while_the_other_waits,
    hangs_on_one,
    meets_all_again,
]
LAUNCHES = {2: CASES}

SAYS = {
    "meets_all": [],
    "fails_on_every_rank": ["rank 0: ", "no, says 0", "rank 1: ", "no, says 1"],
    "fails_on_one_while_the_other_waits": ["in fails_on_one", "rank 0: ", "meets_all", "rank 1: ", "not I"],
    "hangs_on_one": ["in hangs_on_one", "rank 1: ended with code 1", "Timeout", "in hangs_on_one"],
    "meets_all_again": [],
}


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_each_case_is_told_by_its_name(case):
    """Each story has its own case's words, in order; a case that went well has none, whatever stands beside it."""
    story = stories(__name__, 2, LIMIT)[case]
    assert bool(story) == bool(SAYS[case])
    for words in SAYS[case]:
        assert words in story
        story = story.partition(words)[2]
