"""The table of docs/models.md: every cell that says tested has a test, and none says less than there is."""

import ast

import pytest
from docs_blocks import ROOT

from paddle_vl_sp.formers.families import NOT_SUPPORTED

WORDS = {"tested", "not needed", "upstream fails", "upstream has none", "refused", "not yet"}
MERGE, LEVELS, WHOLE, BOTH = "merge by one plan", "deepstack", "whole gradients under TP-SP", "image + video"
SHARED, LOADED, PACKED, CUT = "Vision DP", "loader plans", "packed rows", "context parallel"
BALANCED = "balanced towers"
ON_COPIES = "multi_rank/test_balanced_models.py::test_training_ends_at_the_weights_of_data_parallelism"
CUT_TWO = "multi_rank/test_context_parallel.py::test_two_ranks"
CUT_TEXT = "multi_rank/test_text_context.py::test_two_ranks"
CUT_FLEET = "fleet_whole/test_context_whole.py::test_two_ranks"
ONE_RANK, ON_RANKS = "formers/test_one_rank.py::test_twenty_training_steps", "multi_rank/test_formers.py"
FLEET = "fleet_whole/test_whole.py::test_one_line_makes_everything_right"
FLEET_ONE = "fleet_whole/test_whole.py::test_on_one_rank_every_bit_is_upstreams"
REFUSED = "formers/test_apply.py::test_vision_dp_of_models_built_afterwards"
OCR = "formers/test_ocr_models.py"
QWEN2_5 = "formers/test_qwen2_5_vl.py"
QWEN2_5_RANKS = "multi_rank/test_qwen2_5_vl_on_ranks.py::test_loss_and_gradients_are_those_of_one_process"
TESTS = {
    "Qwen3-VL, plain": {
        MERGE: ONE_RANK,
        LEVELS: ONE_RANK,
        WHOLE: f"{ON_RANKS}::test_every_gradient_is_that_of_one_process",
        BOTH: "formers/test_images_and_videos.py::test_loss_and_gradients_are_those_of_the_samples_apart",
        SHARED: f"{ON_RANKS}::test_vision_dp_shares_the_images",
        BALANCED: ON_COPIES,
        LOADED: f"{ON_RANKS}::test_plans_from_the_loader_change_nothing",
        PACKED: "formers/test_one_rank.py::test_ways_to_call",
        CUT: CUT_TWO,
    },
    "Qwen3-VL MoE, plain": {
        MERGE: ONE_RANK,
        LEVELS: ONE_RANK,
        BOTH: "formers/test_images_and_videos.py::test_loss_and_gradients_are_those_of_the_samples_apart",
        CUT: CUT_TWO,
    },
    "Qwen3-VL on PaddleFleet": {
        **dict.fromkeys((LEVELS, WHOLE, BOTH, LOADED, PACKED), FLEET),
        MERGE: FLEET_ONE,
        SHARED: REFUSED,
        BALANCED: "fleet_whole/test_balanced_whole.py::test_every_gradient_is_that_of_both_copies",
        CUT: CUT_FLEET,
    },
    "Qwen3-VL MoE on PaddleFleet": {MERGE: FLEET_ONE, LEVELS: FLEET, WHOLE: FLEET, SHARED: REFUSED, CUT: CUT_FLEET},
    "Qwen2.5-VL": {
        MERGE: f"{QWEN2_5}::test_ten_training_steps",
        LOADED: f"{QWEN2_5}::test_plans_of_the_loader",
        **dict.fromkeys((WHOLE, BOTH, SHARED, PACKED), QWEN2_5_RANKS),
        BALANCED: ON_COPIES,
        CUT: CUT_TWO,
    },
    "GLM-OCR": {
        MERGE: f"{OCR}::test_training_steps",
        BOTH: f"{OCR}::test_videos_are_refused",
        LOADED: f"{OCR}::test_plans",
    },
    **{family: {PACKED: CUT_TEXT, CUT: CUT_TEXT} for family in ("Qwen2, Qwen3, plain", "Qwen3 MoE, plain")},
    "Qwen3-Next": {
        PACKED: CUT_TEXT,
        CUT: CUT_TEXT,
        WHOLE: "formers/test_text_models.py::test_what_it_takes_not_is_refused_by_name",
    },
    "PaddleOCR-VL": {BOTH: f"{OCR}::test_videos_that_would_be_dropped_are_refused"},
}
PAGE = (ROOT / "docs" / "models.md").read_text()


def table(first):
    """{row: {column: cell}} of the table whose first heading this is."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    heads = [cell.strip() for cell in lines[start].strip("|").split("|")]
    found = {}
    for line in lines[start + 2 :]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != len(heads):
            break
        found[cells[0]] = dict(zip(heads[1:], cells[1:], strict=True))
    return found


def test_cells_say_what_the_tests_say():
    """Exactly the cells with a test are tested or refused; the words are known."""
    cells = table("family")
    assert cells.keys() == TESTS.keys()
    for family, row in cells.items():
        assert set(row.values()) <= WORDS, family
        assert {column for column, cell in row.items() if cell in ("tested", "refused")} == TESTS[family].keys(), family


@pytest.mark.parametrize("test", sorted({test for row in TESTS.values() for test in row.values()}))
def test_the_tests_exist(test):
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_what_is_not_supported_is_told_with_its_reason():
    """The table is that of the package."""
    for family, why in NOT_SUPPORTED.items():
        assert f"| `{family}` | {why} |" in PAGE
