"""PADDLE_VL_SP_AUDIT in PaddleFormers' own trainer on two ranks: the first batch is audited, training is the same."""

import logging
import os

import numpy as np
import paddle
import pytest

from paddle_vl_sp.formers import apply_to_qwen2_5_vl, revert, tiny
from paddle_vl_sp.settings import AUDIT
from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel

SEQ_LEN, STEPS = 48, 2
RUNS = {  # name: the switch, whether the norms of the first layer are marked
    "without": ("0", True),
    "strict": ("strict", True),
    "wrong, goes on": ("1", False),
    "wrong, strict": ("strict", False),
}


class Batches(paddle.io.Dataset):
    def __init__(self, model):
        self.batch = tiny.draw_batch([["image"], ["image", "image"]], SEQ_LEN, seed=2, frames_apart=False)
        self.batch["position_ids"] = tiny.positions(model, self.batch)

    def __len__(self):
        return STEPS

    def __getitem__(self, i):
        return self.batch


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage()


def trained(model, folder, nranks):
    """The weights after training, and whether the trainer made a step."""
    from paddleformers.trainer import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=STEPS,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        device="cpu",
        disable_tqdm=True,
        amp_master_grad=False,
        max_grad_norm=0.0,
        tensor_model_parallel_size=nranks,
        sequence_parallel=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Batches(model), data_collator=lambda samples: samples[0]
    )
    error = ""
    try:
        trainer.train()
    except ValueError as raised:
        error = str(raised)
    return tiny.weights_of(model), trainer.state.global_step, error


def on_ranks(nranks, folder):
    """{run: (weights, steps, error, what was logged)}"""
    enable_tensor_parallel_on_cpu()
    group = init_tensor_parallel(nranks)
    weights, found = tiny.weights_of(tiny.tiny_qwen2_5_vl()), {}
    for name, (switch, is_marked) in RUNS.items():
        heard = Heard()
        logging.getLogger("paddle_vl_sp").addHandler(heard)
        os.environ[AUDIT] = switch
        with apply_to_qwen2_5_vl():
            model = tiny.tiny_qwen2_5_vl(**tiny.tensor_parallel(nranks, SEQ_LEN))
            tiny.load_weights(model, weights, group.rank, nranks)
            for each, parameter in model.named_parameters():
                if "layers.0." in each and not is_marked:
                    parameter.sequence_parallel = False
            found[name] = (*trained(model, folder, nranks), heard.text)
        revert()
        logging.getLogger("paddle_vl_sp").removeHandler(heard)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(on_ranks, 2, 2, str(tmp_path_factory.mktemp("ranks")), timeout=200)


def test_a_right_model_trains_the_same(found):
    """Bit for bit the weights of a run without an audit; the first rank logs what was found."""
    for number, rank in enumerate(found):
        weights, steps, error, log = rank["strict"]
        assert (steps, error) == (STEPS, "")
        assert all(np.array_equal(weights[name], value) for name, value in rank["without"][0].items())
        assert ("nothing wrong found" in log) == (number == 0)
        assert "nothing wrong found" not in rank["without"][3]


def test_wrong_gradients_are_in_the_log_and_training_goes_on(found):
    """The two norms that nothing sums, by name."""
    for number, rank in enumerate(found):
        _, steps, error, log = rank["wrong, goes on"]
        assert (steps, error) == (STEPS, "")
        assert ("2 WRONG" in log) == (number == 0)
    assert "layers.0.input_layernorm.weight           partial !" in found[0]["wrong, goes on"][3]


def test_strict_stops_before_the_first_step(found):
    """On every rank, with the table."""
    for rank in found:
        _, steps, error, _ = rank["wrong, strict"]
        assert steps == 0
        assert error.startswith(f"{AUDIT}=strict: 2 of 73 gradients are wrong, and no step was made")
        assert "layers.0.post_attention_layernorm.weight" in error
