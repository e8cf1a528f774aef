"""inspect: every number by hand or by the oracle, from flags and from a file."""

import json

import numpy as np
import pytest

import oracle
from paddle_vl_sp.cli import main

MADE_UP = ("--seq", "128", "--batch", "2", "--images", "64x64,128x64", "--images", "", "--video", "4x64x64")
MASK = np.zeros((2, 16), dtype=bool)


@pytest.fixture
def inspected(capsys, tmp_path):
    """Calls inspect, on a file of arrays where there are some: (exit code, the JSON)."""

    def call(*arguments, **arrays):
        if arrays:
            np.savez(tmp_path / "batch.npz", **arrays)
            arguments = ("--npz", str(tmp_path / "batch.npz"), *arguments)
        code = main(["inspect", *arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


def test_tokens_of_images_and_videos(inspected):
    """By hand: 32 pixels a token, two frames a temporal patch: 4 + 8 + 8 and 8 tokens."""
    _, costs = inspected(*MADE_UP)
    assert costs["batch"] == {"samples": 2, "seq_len": 128, "visual_tokens": 28}
    assert costs["ranks"][0]["visual_tokens"] == 28


@pytest.mark.parametrize("cut", [("--sp", "4"), ("--cp", "2", "--sp", "2"), ("--cp", "4", "--mode", "contiguous")])
def test_what_ranks_own_equals_the_oracle(inspected, cut):
    """Every rank's count and first pairs, against the loop over tokens."""
    mask = np.random.default_rng(1).random((3, 64)) < 0.3
    _, costs = inspected(*cut, mask=mask)
    layout, counts = costs["layout"], []
    for rank in costs["ranks"]:
        owned = oracle.cut_positions(
            64, layout["cp_size"], rank["cp_rank"], layout["cp_mode"], layout["sp_size"], rank["sp_rank"]
        )
        update, gather = oracle.pairs(mask, owned, sequence_first=True)
        assert (rank["visual_tokens"], rank["positions"]) == (len(update), len(owned))
        assert (rank["update_head"], rank["gather_head"]) == (update[:6], gather[:6])
        counts.append(len(update))
    assert sum(counts) == mask.sum()
    assert costs["imbalance"] == pytest.approx(max(counts) / np.mean(counts))
    assert costs["empty_ranks"] == []


def test_the_cut_of_the_flattened_batch(inspected, capsys):
    """By hand: rank 0 of 2 has the first of two samples, where a cut of every sample gives it halves."""
    mask = np.array([[0, 1, 1, 0], [1, 1, 1, 0]], dtype=bool)
    _, costs = inspected("--sp", "2", "--cut", "flattened", mask=mask)
    assert costs["batch"] == {"samples": 2, "seq_len": 4, "visual_tokens": 5}
    assert costs["layout"]["cut"] == "flattened"
    assert [(rank["update_head"], rank["gather_head"]) for rank in costs["ranks"]] == [
        ([1, 2], [0, 1]),
        ([0, 1, 2], [2, 3, 4]),
    ]
    _, costs = inspected("--sp", "2", mask=mask)
    assert [rank["update_head"] for rank in costs["ranks"]] == [[2, 1, 3], [0, 1]]
    assert main(["inspect", *MADE_UP, "--sp", "2", "--cut", "flattened"]) == 0
    words = capsys.readouterr().out
    assert "B 2, S 128, 28 visual tokens (11%), cp 1 x sp 2 of the flattened batch" in words
    assert "row of [S_local]," in words


def test_bytes_by_hand(inspected):
    """Rank 1 of 2 has all 8 visual tokens among its 2 x 8 rows of 4 x 2 bytes."""
    mask = MASK.copy()
    mask[:, 10:14] = True
    _, costs = inspected("--sp", "2", "--hidden", "4", visual_pos_masks=mask)
    assert costs["deepstack_layer"] == {"bytes": (2 * 16 + 3 * 8) * 8}
    assert (costs["imbalance"], costs["empty_ranks"]) == (2.0, [0])
    assert costs["vision_dp"] == []


def test_a_flag_with_its_default_is_as_none(inspected):
    """In every mode."""
    given = ("--dp", "1", "--steps", "100", "--ids", "151655,151656", "--mode", "zigzag")
    assert inspected("--seq", "64", *given)[0] == 0
    assert inspected(*given, mask=MASK)[0] == 0


@pytest.fixture
def model(tmp_path):
    """Writes a model's config.json; its folder."""

    def write(**vision):
        sizes = {"patch_size": 14, "spatial_merge_size": 2, "hidden_size": 16, "intermediate_size": 16}
        config = {"vision_config": sizes | {"out_hidden_size": 8} | vision}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return "--model", str(tmp_path)

    return write


def test_tokens_have_the_models_size(inspected, model):
    """By hand, 448 x 448 pixels: 16 x 16 tokens of 28 pixels, 14 x 14 of 32, 11 x 11 of 42; frames of videos."""
    batch = ("--seq", "1024", "--images", "448x448", "--video", "8x56x56")
    for merge, patch, frames, tokens in ((2, 14, 2, 256 + 4 * 4), (2, 16, 4, 196 + 2 * 4), (3, 14, 1, 121 + 8)):
        flags = model(patch_size=patch, spatial_merge_size=merge, temporal_patch_size=frames)
        assert inspected(*batch, *flags)[1]["batch"]["visual_tokens"] == tokens
    assert inspected(*batch)[1]["batch"]["visual_tokens"] == 196 + 4 * 4


def test_a_batch_takes_width_levels_and_merge_of_the_model(inspected, model, capsys):
    """By hand: 8 visual of 16 rows of 8 x 2 bytes; flags are above the model; no level moves nothing."""
    mask, levels = MASK[:1] | (np.arange(16) < 9), {"deepstack_visual_indexes": [1]}
    moved = (2 * 16 + 3 * 9) * 2
    grid = {"mask": mask, "image_grid_thw": [[1, 9, 9]]}
    _, costs = inspected(*model(spatial_merge_size=3, **levels), **grid)
    assert costs["deepstack_layer"]["bytes"] == moved * 8
    _, costs = inspected(*model(spatial_merge_size=3), "--hidden", "4", "--levels", "1", **grid)
    assert costs["deepstack_layer"]["bytes"] == moved * 4
    assert inspected(**grid)[0] == 2  # of Qwen3-VL 9 is not a whole number of tokens
    assert main(["inspect", "--seq", "16", *model()]) == 0
    assert "the model has no deepstack layer" in capsys.readouterr().out


def test_ids_grids_and_packed_sequences_from_a_file(inspected):
    """The mask is made from the ids; loads of every policy sum to the number of ranks, in units of the mean."""
    ids = np.full((1, 32), 7)
    ids[0, 4:8], ids[0, 20:28] = 5, 6
    grids = {"image_grid_thw": [[1, 4, 4]], "video_grid_thw": [[2, 4, 4]]}
    cut = ("--ids", "5,6", "--cp", "2", "--sp", "2")
    _, costs = inspected(*cut, input_ids=ids, cu_seqlens=[0, 16, 32], **grids)
    assert costs["batch"]["visual_tokens"] == 12
    assert [share["policy"] for share in costs["vision_dp"]] == ["contiguous", "longest", "count"]
    for share in costs["vision_dp"]:
        assert sum(share["loads"]) == pytest.approx(4)
        assert sum(share["rows"]) == 12
        assert share["gather_mode"] in ("max", "sum", "ragged")


def test_a_batch_of_text_is_a_batch(inspected):
    """No visual token: every rank is empty and nothing is divided by zero, in words as well."""
    code, costs = inspected("--seq", "16", "--sp", "2")
    assert (code, costs["imbalance"], costs["empty_ranks"]) == (0, 1.0, [0, 1])
    assert main(["inspect", "--seq", "16", "--sp", "2"]) == 0


def test_words_have_the_numbers(capsys):
    """The plain form; 4 tokens of 65536 are not called nothing."""
    assert main(["inspect", *MADE_UP, "--sp", "2"]) == 0
    words = capsys.readouterr().out
    for part in ("28 visual tokens", "cp 1 x sp 2", "imbalance", "MiB in a deepstack layer", "longest", "first pairs"):
        assert part in words
    assert main(["inspect", "--seq", "65536", "--images", "64x64"]) == 0
    assert "4 visual tokens (0.01%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--seq", "16", "--images", "640x640"), "sample 0 has 400 visual tokens, more than --seq 16"),
        (("--seq", "16", "--images", "12"), "--images takes HxW in pixels, got '12'"),
        (("--seq", "16", "--images", "axb"), "--images takes HxW in pixels, got 'axb'"),
        (("--seq", "16", "--images", "0x32"), "--images takes HxW in pixels, got '0x32'"),
        (("--seq", "64", "--video", "64x64"), "--video takes FxHxW in pixels, got '64x64'"),
        (("--seq", "64", "--batch", "3", "--images", "64x64", "--images", "64x64"), "once, or once for each"),
        (("--npz", "x.npz", "--seq", "64"), "--seq does not go with --npz: leave out one or the other"),
        (
            ("--npz", "b.npz", "--dp", "2", "--steps", "7", "--split-frames"),
            "--dp, --steps, --split-frames do not go with --npz",
        ),
        (("--dataset", "x.npz", "--npz", "y.npz"), "--npz does not go with --dataset"),
        (
            ("--dataset", "x.npz", "--seq", "7", "--ids", "5", "--cut", "flattened", "--images", "32x32"),
            "--ids, --seq, --images, --cut do not go with --dataset",
        ),
        (
            ("--dataset", "x.npz", "--mode", "contiguous", "--remainder", "front", "--video", "2x32x32"),
            "--video, --mode, --remainder do not go with --dataset",
        ),
        (("--seq", "64", "--dp", "2", "--ids", "5"), "--ids, --dp do not go with --seq"),
        (("--dp", "2"), "there is no batch: give --npz FILE, or --seq with --images or --video"),
        (("--npz", "x.npz", "--ids", "a"), "--ids must be numbers with commas between, got 'a'"),
        (("--npz", "no-such.npz"), "cannot be read"),
        (("--seq", "64", "--sp", "0"), "must be at least 1"),
        (("--seq", "0"), "--seq must be at least 1, got 1 and 0"),
        (("--seq", "64", "--hidden", "0"), "--hidden must be at least 1"),
        (("--seq", "64", "--cp", "2", "--cut", "flattened"), "leave out --cp, got 2"),
    ],
)
def test_wrong_flags_are_refused(inspected, arguments, why):
    """Exit code 2, with what was got."""
    code, found = inspected(*arguments)
    assert code == 2
    assert why in found["error"]


def test_a_remainder_is_explained_in_flags(inspected):
    """In the words of the command line, and it works."""
    code, found = inspected("--seq", "64", "--sp", "3")
    assert code == 2
    assert "or pass --remainder front" in found["error"]
    assert inspected("--seq", "64", "--sp", "3", "--remainder", "front")[0] == 0


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"mask": MASK[0]}, "mask is [B, S], of whole numbers or bool, got bool [16]"),
        ({"input_ids": np.zeros((1, 16))}, "input_ids is [B, S], of whole numbers or bool, got float64 [1, 16]"),
        ({"mask": np.array([["a"]])}, "got <U1 [1, 1]"),
        ({"mask": MASK.astype(object)}, "cannot be read"),
        ({"labels": MASK}, "it has labels; needed is input_ids or mask or visual_pos_masks"),
        ({"mask": MASK, "image_grid_thw": [1, 4, 4]}, "image_grid_thw is whole numbers [I, 3]"),
        ({"mask": MASK, "image_grid_thw": [[1, 4.0, 4]]}, "got float64 [1, 3]"),
        ({"mask": MASK, "image_grid_thw": [[1, 3, 4]]}, "has (1, 3, 4); height and width are in patches"),
        ({"mask": MASK, "image_grid_thw": [[1, 4, 4]]}, "the grids make 4 visual tokens, the ids or mask have 0"),
        ({"mask": MASK, "cu_seqlens": [0, 16]}, "for one packed row [1, S]; got shape [2]"),
        ({"mask": MASK[:1], "cu_seqlens": 16}, "got shape []"),
        ({"mask": MASK[:1], "cu_seqlens": [0.0, 16.0]}, "cu_seqlens[0] must be an integer"),
    ],
)
def test_wrong_arrays_are_refused(inspected, arrays, why):
    """Exit code 2, with what was got."""
    code, found = inspected(**arrays)
    assert code == 2
    assert why in found["error"]


def test_broken_files_are_refused(inspected, tmp_path):
    """Exit code 2 and how to make a good one: empty, cut off, damaged, text, a single array, a folder."""
    np.savez(tmp_path / "good.npz", mask=MASK)
    good, path = (tmp_path / "good.npz").read_bytes(), tmp_path / "broken.npz"
    for content in (b"", good[: len(good) // 2], good[:60] + b"damage" + good[66:], b"words"):
        path.write_bytes(content)
        code, found = inspected("--npz", str(path))
        assert code == 2
        assert "numpy.savez" in found["error"]
    np.save(tmp_path / "one.npy", MASK)
    code, found = inspected("--npz", str(tmp_path / "one.npy"))
    assert code == 2
    assert "is a single array without a name" in found["error"]
    assert inspected("--npz", str(tmp_path))[0] == 2
