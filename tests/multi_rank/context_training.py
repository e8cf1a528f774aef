"""PaddleFormers' own trainer with sep_parallel_size on real ranks, and the same on one: one run after the other."""

import contextlib
import dataclasses
import functools
from unittest import mock

import paddle
from paddle.distributed import fleet
from paddleformers.trainer import Trainer, TrainingArguments

from paddle_vl_sp.formers import apply_to_paddleformers, report_to, tiny
from paddle_vl_sp.testing import enable_tensor_parallel_on_cpu

SEQ_LEN, STEPS, ACCUMULATED = 62, 4, 2
SAMPLES = ((["image"], ["image"]), (["image", "image"], []), (["video"], ["video", "image"]), ([], []))
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FAMILIES = ("qwen3_vl", "qwen2_5_vl")
TARGETS = [".*qkv_proj", ".*o_proj", ".*qkv", ".*linear_fc1"]  # of LoRA, the tower's too
TOLD = ("loss", "eval_loss", "eval_accuracy")


@dataclasses.dataclass(frozen=True)
class Way:
    kind: str | None  # of attention; None: as PaddleFormers has it
    model: str = "tiny_qwen3_vl"
    text: dict = dataclasses.field(default_factory=dict)
    settings: dict = dataclasses.field(default_factory=dict)  # of the trainer
    is_text: bool = False
    vision_dp: bool = False
    lora: bool = False
    predicts: bool = False

    def built(self):
        model = getattr(tiny, self.model)(**self.text)
        if not self.lora:
            return model
        from paddleformers.peft import LoRAConfig, LoRAModel

        model = LoRAModel(model, LoRAConfig(target_modules=TARGETS, r=4, lora_alpha=8, dtype="float32"))
        model.mark_only_lora_as_trainable()
        return model


EVALUATED = {"evaluation_strategy": "steps", "eval_steps": STEPS}
SAVED = {"save_strategy": "steps", "save_steps": STEPS // 2}
WAYS = {
    "auto": Way("auto", settings=EVALUATED | SAVED),
    "gather": Way("gather", settings=EVALUATED, predicts=True),
    "ring, full recompute": Way("ring", text=RECOMPUTE, settings=RECOMPUTE),
    "shared tower": Way("auto", vision_dp=True),
    "LoRA, clipped": Way("auto", lora=True, settings={"max_grad_norm": 1e-2}),
    "Qwen2.5-VL": Way("auto", "tiny_qwen2_5_vl"),
}
UPSTREAM, TEXT = Way(None), Way(None, is_text=True)
EVALUATED_ONE = Way(None, settings=EVALUATED | SAVED, predicts=True)
ONE = {
    "evaluated": EVALUATED_ONE,
    "LoRA, clipped": WAYS["LoRA, clipped"],
    "Qwen2.5-VL": WAYS["Qwen2.5-VL"],
    "upstream, text": TEXT,
}


class Batches(paddle.io.Dataset):
    def __init__(self, drawn, num_batches):
        self.drawn, self.num_batches = drawn, num_batches

    def __len__(self):
        return self.num_batches

    def __getitem__(self, i):
        return dict(self.drawn[i % len(self.drawn)])


@functools.cache
def batches(name, is_text):
    """Of the model of that name."""
    samples = (([], []),) if is_text else SAMPLES
    drawn = [tiny.draw_batch(kinds, SEQ_LEN, i, frames_apart="2_5" not in name) for i, kinds in enumerate(samples)]
    if is_text:  # for upstream, whose splitting takes no array of three axes
        return drawn
    model = getattr(tiny, name)()
    return [batch | {"position_ids": tiny.positions(model, batch)} for batch in drawn]


def trained(way, folder, nranks, resumed=None):
    """The weights before and after, what the trainer logged, and the report of the run."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,  # with less, AdamW makes whole steps of gradients that are nothing but rounding
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "device": "cpu",
        "disable_tqdm": True,
        "amp_master_grad": False,
        "max_grad_norm": 0.0,
        "sep_parallel_size": nranks,
    }
    model, told, drawn = way.built(), [], batches(way.model, way.is_text)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings | way.settings),
        train_dataset=Batches(drawn, STEPS * ACCUMULATED),
        eval_dataset=Batches(drawn, len(drawn)),
        data_collator=lambda samples: samples[0],
        compute_metrics=accuracy if way.predicts else None,
    )
    assert trainer.args.split_inputs_sequence_dim  # its default
    trainer.log = lambda logs, **_: told.append({key: logs[key] for key in TOLD if key in logs})
    start, report = tiny.weights_of(model), report_to(trainer)
    with without_a_gpu(nranks):
        trainer.train(resume_from_checkpoint=resumed and str(resumed))
    return start, tiny.weights_of(model), told, report.summary


@contextlib.contextmanager
def without_a_gpu(nranks):
    """What the trainer calls without asking whether there is a GPU, or, to load a checkpoint, a topology."""
    with contextlib.ExitStack() as replaced:
        replaced.enter_context(enable_tensor_parallel_on_cpu())
        # to log the norm, PaddleFormers' own needs an optimizer that mixed precision has wrapped
        replaced.enter_context(mock.patch.object(Trainer, "_wrap_distributed_optimizer", wrapped))
        if nranks == 1:
            replaced.enter_context(mock.patch.object(fleet, "get_hybrid_communicate_group", return_value=None))
        yield


def wrapped(trainer, optimizer):
    return fleet.distributed_optimizer(optimizer)


def accuracy(found):
    """Of predictions [samples, S, vocabulary]."""
    has_label = found.label_ids != -100
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids)[has_label].mean())}


def of_one(folder):
    """Each way in one process; the first one leaves checkpoints."""
    paddle.set_device("cpu")
    with apply_to_paddleformers(families=FAMILIES):
        return {name: trained(way, folder / name, 1) for name, way in ONE.items()}


def on_ranks(nranks, folder, of_one):
    paddle.set_device("cpu")
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 1, "sep_degree": nranks}
    fleet.init(is_collective=True, strategy=strategy)
    found = {}
    for name, way in WAYS.items():
        with apply_to_paddleformers(families=FAMILIES, context_parallel=way.kind, vision_dp=way.vision_dp):
            found[name] = trained(way, folder / name, nranks)
    with apply_to_paddleformers(families=FAMILIES, context_parallel="auto"):
        checkpoint = of_one / "evaluated" / f"checkpoint-{STEPS // 2}"
        found["resumed from one"] = trained(WAYS["auto"], folder / "resumed", nranks, checkpoint)
    found["upstream"] = error_of(lambda: trained(UPSTREAM, folder / "upstream", nranks))
    found["upstream, text"] = trained(TEXT, folder / "text", nranks)
    with apply_to_paddleformers(families=FAMILIES):
        found["no setting"] = error_of(lambda: trained(TEXT, folder / "none", nranks))
    return found


def error_of(run):
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""
