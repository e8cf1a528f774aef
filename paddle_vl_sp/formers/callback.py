"""A RunReport in PaddleFormers' trainer: scalars for its logs while it trains, a dict and a line at the end."""

from __future__ import annotations

from typing import Any

from paddleformers.trainer import TrainerCallback
from paddleformers.trainer.trainer import DEFAULT_CALLBACKS

from paddle_vl_sp.formers.patch import switched_off
from paddle_vl_sp.log import logger
from paddle_vl_sp.report import RunReport, summary_line
from paddle_vl_sp.settings import REPORT, is_on

PREFIX = "vl_sp_"


class VisualReport(TrainerCallback):  # type: ignore[misc]
    """Adds to the logs of a step what the forwards since the last logs meant for the ranks.

    The scalars are those of `RunReport.read`, as vl_sp_imbalance and so on. They reach the callbacks that come after
    this one: `report_to` puts it before all others, VisualDL's, TensorBoard's and the printer's among them. `summary`
    is the dict of the whole run, there once training has ended; rank 0 logs it in a line.

    ::

        report = report_to(trainer)
        trainer.train()
        print(report.summary["visual_tokens"], report.summary["imbalance"])
    """

    _at_work: VisualReport | None = None  # of all trainers; a training that failed has not closed its report

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.run = RunReport()
        self.summary: dict[str, Any] = {}
        self._logged = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if VisualReport._at_work is not None:
            VisualReport._at_work.run.stop()
        VisualReport._at_work = self
        self._begin()
        self.run.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.run.is_open and "loss" in (logs or {}):  # not those of an evaluation
            since, self._logged = self._logged, self.run.num_forwards
            read = self.run.read(since)
            logs.update({f"{PREFIX}{key}": value for key, value in read.items() if not isinstance(value, list)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.stop()
        if VisualReport._at_work is self:
            VisualReport._at_work = None
        self.summary = self.run.read()
        logger.info("%s", summary_line(self.summary))


def report_to(trainer: Any) -> VisualReport:
    """Puts a VisualReport, the trainer's if it has one, before all other callbacks, so that they log its scalars.

    ::

        report_to(trainer)  # before trainer.train()
    """
    callbacks = trainer.callback_handler.callbacks
    report = next((each for each in callbacks if isinstance(each, VisualReport)), None) or VisualReport()
    callbacks[:] = [report, *(each for each in callbacks if not isinstance(each, VisualReport))]
    return report


def report_if_asked() -> None:
    """With PADDLE_VL_SP_REPORT=1, every trainer that is built from now on has a VisualReport."""
    if is_on(REPORT) and not switched_off() and VisualReport not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(VisualReport)
