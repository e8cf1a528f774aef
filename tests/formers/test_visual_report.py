"""The report in PaddleFormers' own trainer: in its logs, in VisualDL, as a dict at the end."""

import logging

import numpy as np
import paddle
import pytest
from paddleformers.trainer import Trainer, TrainingArguments
from paddleformers.trainer import trainer as trainer_module
from visualdl import LogReader

from paddle_vl_sp.formers import VisualReport, apply_to_qwen3_vl, callback, report_to, tiny
from paddle_vl_sp.settings import REPORT

SAMPLES = ([["image"], ["image"]], [["image", "image"], ["image"]], [[], []], [["video"], ["video", "video"]])
STEPS, LOGGING = 8, 2


class Batches(paddle.io.Dataset):
    def __init__(self, model):
        self.batches = [tiny.draw_batch(samples, 96, seed=i) for i, samples in enumerate(SAMPLES)]
        for batch in self.batches:
            batch["position_ids"] = tiny.positions(model, batch)

    def __len__(self):
        return STEPS

    def __getitem__(self, i):
        return self.batches[i % len(SAMPLES)]

    def tokens(self):
        return [int(np.isin(batch["input_ids"].numpy(), (tiny.IMAGE, tiny.VIDEO)).sum()) for batch in self.batches]


def a_trainer(folder, **given):
    model = tiny.tiny_qwen3_vl()
    arguments = TrainingArguments(
        output_dir=str(folder),
        logging_dir=str(folder / "logs"),
        per_device_train_batch_size=1,
        max_steps=STEPS,
        logging_steps=LOGGING,
        report_to=["visualdl"],
        save_strategy="no",
        device="cpu",
        disable_tqdm=True,
        amp_master_grad=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=Batches(model), data_collator=lambda s: s[0], **given)


def scalars(folder):
    """{tag: {step: value}} of what VisualDL has written."""
    (file,) = (folder / "logs").rglob("vdlrecords.*.log")
    reader = LogReader(file_path=str(file))
    return {
        tag: {row.id: row.value for row in reader.get_data("scalar", tag)}
        for tag in reader.get_tags().get("scalar", [])
    }


def check_run(report, trainer, folder):
    tokens = trainer.train_dataset.tokens() * (STEPS // len(SAMPLES))
    assert not report.run.is_open
    assert report.summary["visual_tokens"] == sum(tokens)
    assert report.summary["forwards"] == sum(count > 0 for count in tokens)
    told = scalars(folder)
    logged = list(range(LOGGING, STEPS + 1, LOGGING))
    for key in ("visual_tokens", "forwards", "syncs_here"):  # the trainer shuffles: what each step had is not known
        assert list(told[f"train/vl_sp_{key}"]) == logged
        assert sum(told[f"train/vl_sp_{key}"].values()) == report.summary[key]
    assert "train/vl_sp_tokens_of_ranks" not in told


def test_before_all_other_callbacks(tmp_path, caplog):
    """The scalars reach VisualDL; batches of text count as nothing; the last line tells the run."""
    with apply_to_qwen3_vl():
        trainer = a_trainer(tmp_path)
        report = report_to(trainer)
        with caplog.at_level(logging.INFO, "paddle_vl_sp"):
            trainer.train()
    check_run(report, trainer, tmp_path)
    assert any(f"{report.summary['forwards']} forwards with" in message for message in caplog.messages)


@pytest.mark.parametrize("asked", ["0", "1"])
def test_by_the_environment(tmp_path, monkeypatch, asked):
    """As under the plugin: into every trainer that is built from then on, once."""
    monkeypatch.setattr(trainer_module, "DEFAULT_CALLBACKS", list(trainer_module.DEFAULT_CALLBACKS))
    monkeypatch.setattr(callback, "DEFAULT_CALLBACKS", trainer_module.DEFAULT_CALLBACKS)
    monkeypatch.setenv(REPORT, asked)
    callback.report_if_asked()
    callback.report_if_asked()
    with apply_to_qwen3_vl():
        trainer = a_trainer(tmp_path)
        found = [each for each in trainer.callback_handler.callbacks if isinstance(each, VisualReport)]
        assert len(found) == int(asked)
        if found:
            trainer.train()
            check_run(found[0], trainer, tmp_path)


def test_an_unknown_word_is_refused(monkeypatch):
    """Refused with what was got."""
    monkeypatch.setenv(REPORT, "yes")
    with pytest.raises(ValueError, match="PADDLE_VL_SP_REPORT must be 0 or 1, got 'yes'"):
        callback.report_if_asked()


def test_switched_off_it_is_off(monkeypatch):
    """No callback: PADDLE_VL_SP=0 goes before the report's own switch."""
    monkeypatch.setattr(callback, "DEFAULT_CALLBACKS", [])
    monkeypatch.setenv("PADDLE_VL_SP", "0")
    monkeypatch.setenv(REPORT, "1")
    callback.report_if_asked()
    assert callback.DEFAULT_CALLBACKS == []


def test_trainings_do_not_mix(tmp_path, caplog):
    """A second training starts anew, one that failed is closed by the next, and every one that ends is told."""
    with apply_to_qwen3_vl(), caplog.at_level(logging.INFO, "paddle_vl_sp"):
        first, second = (a_trainer(tmp_path / name) for name in ("one", "two"))
        broken = report_to(first)
        dataset, first.train_dataset = first.train_dataset, None
        with pytest.raises(ValueError, match="train_dataset"):
            first.train()
        broken.on_train_begin(None, None, None)  # as if it had failed later
        first.train_dataset = dataset
        report = report_to(second)
        for _ in range(2):
            second.train()
            assert report.summary["forwards"] == STEPS * 3 // 4
        assert not broken.run.is_open
        assert broken.run.num_forwards == 0
    assert sum("forwards with" in message for message in caplog.messages) == 2


def test_asked_for_twice_it_is_there_once(tmp_path, monkeypatch):
    """Identity, and before all other callbacks."""
    monkeypatch.setattr(trainer_module, "DEFAULT_CALLBACKS", [*trainer_module.DEFAULT_CALLBACKS, VisualReport])
    trainer = a_trainer(tmp_path)
    report = report_to(trainer)
    assert report_to(trainer) is report
    found = [each for each in trainer.callback_handler.callbacks if isinstance(each, VisualReport)]
    assert found == [report]
    assert trainer.callback_handler.callbacks[0] is report


def test_logs_of_an_evaluation_are_left_alone():
    """Equal: no key is added."""
    report, logs = VisualReport(), {"eval_loss": 1.0}
    report.on_train_begin(None, None, None)
    report.on_log(None, None, None, logs=logs)
    report.run.stop()
    assert logs == {"eval_loss": 1.0}
