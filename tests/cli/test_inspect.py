"""inspect: every number by hand or by the oracle, from flags and from a file."""

import json

import numpy as np
import pytest

import oracle
from paddle_vl_sp.cli import main

MADE_UP = ("--seq", "128", "--batch", "2", "--images", "64x64,128x64", "--images", "", "--video", "4x64x64")


def told(capsys, *arguments):
    code = main(["inspect", *arguments, "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out)


def test_tokens_of_images_and_videos(capsys):
    """By hand: 32 pixels a token, two frames a temporal patch: 4 + 8 + 8 and 8 tokens."""
    _, costs = told(capsys, *MADE_UP)
    assert costs["batch"] == {"samples": 2, "seq_len": 128, "visual_tokens": 28}
    assert costs["ranks"][0]["visual_tokens"] == 28


@pytest.mark.parametrize("cut", [("--sp", "4"), ("--cp", "2", "--sp", "2"), ("--cp", "4", "--mode", "contiguous")])
def test_what_ranks_own_equals_the_oracle(capsys, cut, tmp_path):
    """Every rank's count and first pairs, against the loop over tokens."""
    mask = np.random.default_rng(1).random((3, 64)) < 0.3
    np.savez(tmp_path / "batch.npz", mask=mask)
    _, costs = told(capsys, "--npz", str(tmp_path / "batch.npz"), *cut)
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


def test_bytes_and_waits_by_hand(capsys, tmp_path):
    """Rank 1 of 2 has all 8 visual tokens among its 2 x 8 rows of 4 x 2 bytes; the formulae of both ways."""
    mask = np.zeros((2, 16), dtype=bool)
    mask[:, 10:14] = True
    np.savez(tmp_path / "batch.npz", visual_pos_masks=mask)
    _, costs = told(capsys, "--npz", str(tmp_path / "batch.npz"), "--sp", "2", "--hidden", "4", "--levels", "3")
    assert costs["deepstack_layer"] == {"bytes_here": (2 * 16 + 3 * 8) * 8, "bytes_upstream": (8 * 16 + 5 * 8) * 8}
    assert costs["syncs"] == {"here": 1, "here_planned_by_loader_or_padded": 0, "upstream": 3 * (3 * 2 + 1)}
    assert (costs["imbalance"], costs["empty_ranks"]) == (2.0, [0])
    assert costs["vision_dp"] == []


def test_ids_grids_and_packed_sequences_from_a_file(capsys, tmp_path):
    """The mask is made from the ids; loads of every policy sum to the number of ranks, in units of the mean."""
    ids = np.full((1, 32), 7)
    ids[0, 4:8], ids[0, 20:28] = 5, 6
    grids = {"image_grid_thw": [[1, 4, 4]], "video_grid_thw": [[2, 4, 4]]}
    np.savez(tmp_path / "batch.npz", input_ids=ids, cu_seqlens=[0, 16, 32], **grids)
    _, costs = told(capsys, "--npz", str(tmp_path / "batch.npz"), "--ids", "5,6", "--cp", "2", "--sp", "2")
    assert costs["batch"]["visual_tokens"] == 12
    assert [share["policy"] for share in costs["vision_dp"]] == ["contiguous", "longest", "count"]
    for share in costs["vision_dp"]:
        assert sum(share["loads"]) == pytest.approx(4)
        assert sum(share["rows"]) == 12
        assert share["gather_mode"] in ("max", "sum", "ragged")


def test_a_batch_of_text_is_a_batch(capsys):
    """No visual token: every rank is empty and nothing is divided by zero, in words as well."""
    code, costs = told(capsys, "--seq", "16", "--sp", "2")
    assert (code, costs["imbalance"], costs["empty_ranks"]) == (0, 1.0, [0, 1])
    assert main(["inspect", "--seq", "16", "--sp", "2"]) == 0


def test_words_name_what_the_numbers_say(capsys):
    """The plain form."""
    assert main(["inspect", *MADE_UP, "--sp", "2"]) == 0
    words = capsys.readouterr().out
    for part in ("28 visual tokens", "cp 1 x sp 2", "imbalance", "PaddleFormers 1.2.0", "longest", "first pairs"):
        assert part in words


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--seq", "16", "--images", "640x640"), "sample 0 has 400 visual tokens, more than --seq 16"),
        (("--seq", "16", "--images", "12"), "--images takes HxW in pixels, got '12'"),
        (("--seq", "64", "--video", "64x64"), "--video takes FxHxW in pixels, got '64x64'"),
        (("--seq", "64", "--batch", "3", "--images", "64x64", "--images", "64x64"), "once, or once for each"),
        (("--npz", "x.npz", "--seq", "64"), "leave out --seq"),
        (("--npz", "no-such.npz"), "cannot be read"),
        (("--seq", "64", "--sp", "0"), "must be at least 1"),
        (("--seq", "64", "--hidden", "0"), "--hidden must be at least 1"),
        (("--seq", "64", "--ids", "a", "--npz", "x"), "leave out --seq"),
    ],
)
def test_what_cannot_be_is_refused(capsys, arguments, why):
    """Exit code 2, with what was got."""
    assert main(["inspect", *arguments]) == 2
    assert why in capsys.readouterr().err


def test_a_remainder_is_mended_in_flags(capsys):
    """In the words of the command line, and it works."""
    assert main(["inspect", "--seq", "64", "--sp", "3"]) == 2
    assert "or pass --remainder front" in capsys.readouterr().err
    assert main(["inspect", "--seq", "64", "--sp", "3", "--remainder", "front"]) == 0


MASK = np.zeros((2, 16), dtype=bool)


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"mask": MASK[0]}, "mask is [B, S], of whole numbers or bool, got bool [16]"),
        ({"input_ids": np.zeros((1, 16))}, "input_ids is [B, S], of whole numbers or bool, got float64 [1, 16]"),
        ({"mask": np.array([["a"]])}, "got <U1 [1, 1]"),
        ({"mask": MASK.astype(object)}, "cannot be read"),
        ({"mask": MASK, "image_grid_thw": [1, 4, 4]}, "image_grid_thw is whole numbers [I, 3]"),
        ({"mask": MASK, "image_grid_thw": [[1, 4.0, 4]]}, "got float64 [1, 3]"),
        ({"mask": MASK, "image_grid_thw": [[1, 3, 4]]}, "has (1, 3, 4); height and width are in patches"),
        ({"mask": MASK, "image_grid_thw": [[1, 4, 4]]}, "its grids make 4 visual tokens, its ids or mask have 0"),
        ({"mask": MASK, "cu_seqlens": [0, 16]}, "for one packed row [1, S]; got shape [2]"),
        ({"mask": MASK[:1], "cu_seqlens": 16}, "got shape []"),
        ({"mask": MASK[:1], "cu_seqlens": [0.0, 16.0]}, "cu_seqlens[0] must be an integer"),
    ],
)
def test_wrong_arrays_are_refused(capsys, tmp_path, arrays, why):
    """Exit code 2, with what was got."""
    np.savez(tmp_path / "batch.npz", **arrays)
    assert main(["inspect", "--npz", str(tmp_path / "batch.npz")]) == 2
    assert why in capsys.readouterr().err


def test_broken_files_are_refused(capsys, tmp_path):
    """Exit code 2 and how to make a good one: empty, cut off, damaged, text, a single array, a folder."""
    np.savez(tmp_path / "batch.npz", mask=MASK)
    good = (tmp_path / "batch.npz").read_bytes()
    for content in (b"", good[: len(good) // 2], good[:60] + b"damage" + good[66:], b"words"):
        (tmp_path / "broken.npz").write_bytes(content)
        assert main(["inspect", "--npz", str(tmp_path / "broken.npz")]) == 2
        assert "numpy.savez" in capsys.readouterr().err
    np.save(tmp_path / "one.npy", MASK)
    assert main(["inspect", "--npz", str(tmp_path / "one.npy")]) == 2
    assert "is a single array without a name" in capsys.readouterr().err
    assert main(["inspect", "--npz", str(tmp_path)]) == 2


def test_a_small_share_is_not_called_nothing(capsys):
    """4 tokens of 65536."""
    assert main(["inspect", "--seq", "65536", "--images", "64x64"]) == 0
    assert "4 visual tokens (0.01%)" in capsys.readouterr().out


def test_a_file_without_ids_or_mask_is_refused(capsys, tmp_path):
    """With what it has and what it needs."""
    np.savez(tmp_path / "batch.npz", labels=np.zeros((1, 4)))
    assert main(["inspect", "--npz", str(tmp_path / "batch.npz")]) == 2
    assert "has labels: it needs input_ids or mask or visual_pos_masks" in capsys.readouterr().err
