"""What the package says by itself, and who says it."""

import logging
import subprocess
import sys

import pytest

from paddle_vl_sp import log
from paddle_vl_sp.settings import LOG

SAY = """
import logging, sys
{before}
from paddle_vl_sp.log import logger
{after}
for word in ("debug", "info", "warning", "warning", "error"):
    getattr(logger, word)("the %s", word)
"""


def said(before="", after="", **environment):
    """The lines on stderr, in a process of its own that does not import Paddle."""
    code = SAY.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return [line.removeprefix("paddle_vl_sp: the ") for line in done.stderr.splitlines()]


def test_without_any_set_up_what_is_worth_knowing_is_heard_once():
    """Exact lines."""
    assert said() == ["info", "warning", "error"]


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_variable_sets_the_level(level, heard):
    """Exact lines, level by level."""
    assert said(PADDLE_VL_SP_LOG=level) == heard


def test_an_unknown_level_is_refused(monkeypatch):
    """Refused with the levels that there are."""
    monkeypatch.setenv(LOG, "loud")
    with pytest.raises(ValueError, match="PADDLE_VL_SP_LOG must be one of 'info', 'debug', 'warning', 'error'"):
        log._set_up()


@pytest.mark.parametrize(
    ("place", "heard"),
    [
        ({"PADDLE_TRAINER_ID": "8", "PADDLE_RANK_IN_NODE": "0"}, ["debug", "warning", "error"]),
        ({"PADDLE_TRAINER_ID": "9", "PADDLE_RANK_IN_NODE": "1"}, ["debug", "error"]),
    ],
    ids=["first of its machine", "another"],
)
def test_ranks_do_not_say_the_same(place, heard):
    """Exact lines: warnings from the first rank of a machine, errors from all."""
    assert said(PADDLE_VL_SP_LOG="debug", **place) == heard


@pytest.mark.parametrize("when", ["before", "after"])
def test_handlers_of_the_program_are_the_only_ones(when):
    """Exact lines, in the program's format, whenever it set them up."""
    basic = "logging.basicConfig(format='theirs %(message)s')"
    assert said(**{when: basic}) == [f"theirs paddle_vl_sp: the {word}" for word in ("info", "warning", "error")]


def test_a_handler_on_our_logger_is_the_only_one():
    """Exact lines, none twice."""
    attached = "logging.getLogger('paddle_vl_sp').addHandler(logging.StreamHandler(sys.stderr))"
    assert said(after=attached) == ["info", "warning", "error"]


def test_a_level_that_the_program_has_set_stays():
    """Exact lines."""
    assert said(before="logging.getLogger('paddle_vl_sp').setLevel('ERROR')") == ["error"]


def test_one_warning_for_each_cause(caplog):
    """Exact messages: the third says what the first said."""
    with caplog.at_level(logging.WARNING, "paddle_vl_sp"):
        for cause in ("this one", "that one", "this one"):
            log.logger.warning("test_log: %s", cause)
    assert [record.getMessage() for record in caplog.records] == [
        "paddle_vl_sp: test_log: this one",
        "paddle_vl_sp: test_log: that one",
    ]
