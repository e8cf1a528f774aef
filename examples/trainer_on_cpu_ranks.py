"""PaddleFormers' own trainer on two tensor-parallel ranks without a GPU: upstream, and with paddle_vl_sp.

    python examples/trainer_on_cpu_ranks.py        needs paddleformers; half a minute

The plain Qwen3-VL, tiny, with sequence parallelism. Each rank has a copy of the vision tower, which upstream learns
from the visual tokens of its rank's part of the sequence: gradients are wrong, and the copies drift apart.
"""

import contextlib
import tempfile

import numpy as np

from paddle_vl_sp.formers import apply_to_qwen3_vl, tiny
from paddle_vl_sp.testing import enable_tensor_parallel_on_cpu, init_tensor_parallel, run_ranks

SEQ_LEN, STEPS, NRANKS = 64, 4, 2
SAMPLES = (["image", "image"], ["image"])  # the placeholders, pixels and grids of each are drawn


def batch_of(model):
    batch = tiny.draw_batch(SAMPLES, SEQ_LEN)
    return batch | {"position_ids": tiny.positions(model, batch)}


def trained(model, folder):
    """The tower's gradients of the first step, and its weights at the end."""
    from paddleformers.trainer import Trainer, TrainerCallback, TrainingArguments

    first = {}

    class First(TrainerCallback):
        def on_optimizer_begin(self, *_, **__):
            first.update({} if first else of_tower(tiny.gradients_of(model)))

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=STEPS,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        device="cpu",
        amp_master_grad=False,  # is for bf16 and fp16
        max_grad_norm=0.0,  # in fp32, the trainer's own clipping fails on ranks
        tensor_model_parallel_size=NRANKS,
        sequence_parallel=True,
    )
    data = {"train_dataset": [batch_of(model)] * STEPS, "data_collator": lambda samples: samples[0]}
    Trainer(model=model, args=arguments, callbacks=[First()], **data).train()
    return first, of_tower(tiny.weights_of(model))


def on_a_rank():
    """The gradients of one process, and what each way of training left."""
    model = tiny.tiny_qwen3_vl()
    model(**batch_of(model)).loss.backward()
    found, weights = {"one process": of_tower(tiny.gradients_of(model))}, tiny.weights_of(model)
    with enable_tensor_parallel_on_cpu(), tempfile.TemporaryDirectory() as folder:
        group = init_tensor_parallel(NRANKS)
        for way, change in {"upstream": contextlib.nullcontext, "with paddle_vl_sp": apply_to_qwen3_vl}.items():
            with change():  # in a YAML, the plugin's line
                model = tiny.tiny_qwen3_vl(**tiny.tensor_parallel(NRANKS, SEQ_LEN))
                tiny.load_weights(model, weights, group.rank, NRANKS)
                found[way] = trained(model, folder)
    return found


def of_tower(values):
    return {name: value.ravel() for name, value in values.items() if "visual" in name}


def error(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def main():
    ranks = run_ranks(on_a_rank, NRANKS, timeout=200)
    whole = ranks[0].pop("one process")
    print(f"{NRANKS} ranks{'worst vision gradient error':>40}{'copies of the tower apart':>28}")
    for way in ranks[0]:
        worst = max(error(rank[way][0][name], whole[name]) for rank in ranks for name in whole)
        towers = [np.concatenate(list(rank[way][1].values())) for rank in ranks]
        print(f"{way:22}{worst:>25.1e}{error(*towers):>28.1e}")


if __name__ == "__main__":
    from trainer_on_cpu_ranks import main  # the ranks import their function, so it must not be that of __main__

    main()
