"""The package's one logger: needs no set-up, and does not repeat a message on every rank.

PADDLE_VL_SP_LOG  debug, info (default), warning or error

info is logged by rank 0; a warning once, by the first rank of each machine; debug, which differs between ranks, by
every rank.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any

from paddle_vl_sp.settings import LOG, setting

NAME = "paddle_vl_sp"

_logger = logging.getLogger(NAME)
_warned: set[str] = set()


class _StderrUntilConfigured(logging.Handler):
    """Writes to stderr as long as neither the root logger nor this one has another handler."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and _logger.handlers == [self]:
            print(record.getMessage(), file=sys.stderr, flush=True)


class _Prefixed(logging.LoggerAdapter):  # type: ignore[type-arg]
    """Puts the package's name before each message: Paddle's log format has file and line only."""

    def process(self, msg: object, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        return f"{NAME}: {msg}", kwargs


logger = _Prefixed(_logger, {})


def _is_logged_here(record: logging.LogRecord) -> bool:
    if record.levelno == logging.INFO:
        return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"
    if record.levelno != logging.WARNING:
        return True
    message = record.getMessage()
    is_new = message not in _warned
    _warned.add(message)
    return is_new and os.environ.get("PADDLE_RANK_IN_NODE", "0") == "0"


def _set_up() -> None:
    level = setting(LOG).upper()
    if os.environ.get(LOG) or _logger.level == logging.NOTSET:  # else the program chose a level before the import
        _logger.setLevel(level)
    _logger.addFilter(_is_logged_here)
    _logger.addHandler(_StderrUntilConfigured())


_set_up()
