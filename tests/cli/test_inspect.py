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
        (("--npz", "x.npz", "--seq", "64"), "leave out --seq"),
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
