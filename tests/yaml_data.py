"""A checkpoint without weights, a tokenizer of bytes, a few images with messages, and the YAML that trains on them."""

import json

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from paddle_vl_sp.formers import tiny

SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
MEANS = [0.5] * 3
SHAPE = {"temporal_patch_size": 2, "merge_size": 2, "image_mean": MEANS, "image_std": MEANS}
SIZE = {"shortest_edge": 28 * 28, "longest_edge": 256 * 256}
SETTINGS = """
train_dataset_type: messages
train_dataset_prob: "1.0"
eval_dataset_type: messages
eval_dataset_prob: "1.0"
eval_steps: 4
max_seq_len: 192
template_backend: custom
dataset_type: map
mix_strategy: concat
random_shuffle: false
_attn_implementation: eager
fine_tuning: full
stage: VL-SFT
do_train: true
per_device_train_batch_size: 2
per_device_eval_batch_size: 2
max_steps: 4
logging_steps: 1
save_strategy: "no"
evaluation_strategy: "no"
disable_tqdm: true
report_to: none
learning_rate: 1.0e-3
lr_scheduler_type: constant
warmup_steps: 0
max_grad_norm: 0.0
device: cpu
compute_type: float32
amp_master_grad: false
tensor_parallel_output: false
"""


MODELS = {  # model_type: class, vision settings, template, processors
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", tiny.VISION, "qwen3_vl_nothink", "Qwen3VL", 16),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", tiny.WINDOWS, "qwen2_vl", "Qwen2_5_VL", 14),
}


def write(folder, plugin, model_type):
    """Returns the YAML's path."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    ids = _write_tokenizer(checkpoint)
    _write_configuration(checkpoint, ids, model_type)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(_sample(folder, i)) + "\n" for i in range(8)))
    template = MODELS[model_type][2]
    paths = {
        "template": template,
        "model_name_or_path": checkpoint,
        "train_dataset_path": data,
        "eval_dataset_path": data,
        "custom_register_path": plugin,
    }
    file = folder / "x.yaml"
    file.write_text(SETTINGS + "".join(f"{key}: {path}\n" for key, path in paths.items()))
    return file


def _write_tokenizer(folder):
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(characters)}
    special = [f"<|{word}|>" for word in SPECIAL]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ids = {word: tokenizer.token_to_id(token) for word, token in zip(SPECIAL, special, strict=True)}
    added = {str(ids[word]): {"content": f"<|{word}|>", "special": True} for word in SPECIAL}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"additional_special_tokens": special[1:], "added_tokens_decoder": added, "model_max_length": 4096}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ids


def _write_configuration(folder, ids, model_type):
    name, vision, _, processor, patch = MODELS[model_type]
    for kind, made_by in (("", "Qwen2VLImageProcessorFast"), ("video_", "Qwen3VLVideoProcessor")):
        settings = SHAPE | {"patch_size": patch, "size": SIZE, "processor_class": f"{processor}Processor"}
        settings[f"{kind or 'image_'}processor_type"] = made_by
        (folder / f"{kind}preprocessor_config.json").write_text(json.dumps(settings))
    text = tiny.TEXT | {"model_type": f"{model_type}_text", "tie_word_embeddings": False}
    if model_type == "qwen2_5_vl":
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        vision = vision | {"window_size": 4 * patch}
    config = {
        "architectures": [name],
        "model_type": model_type,
        "text_config": without_attention(text | {"pad_token_id": ids["endoftext"]}),
        "vision_config": without_attention(vision | {"patch_size": patch, "model_type": model_type}),
        "tie_word_embeddings": False,
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "pad_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def without_attention(settings):
    """A YAML says which attention."""
    return {key: value for key, value in settings.items() if key != "_attn_implementation"}


def _sample(folder, i):
    """One to three images, in front and between words; the last two samples, a batch, have none.

    All are shorter than max_seq_len: PaddleFormers takes others in the place of longer ones, each rank its own.
    """
    rng = np.random.default_rng(i)
    names = [str(folder / f"{i}-{j}.png") for j in range(int(rng.integers(1, 4)) if i < 6 else 0)]
    for name in names:
        height, width = 32 * rng.integers(1, 4, 2)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(name)
    question = "".join(f"<image>{'x' * int(rng.integers(2, 20))} " for _ in names) + "?"
    answer = "yes " * int(rng.integers(2, 8))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": names} if names else {"messages": messages}
