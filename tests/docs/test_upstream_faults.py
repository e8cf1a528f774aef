"""docs/upstream-faults.md: every snippet raises what the page says; one that no longer does is a fault that is gone."""

import re
import subprocess
import sys

import pytest
from faults_on_ranks import IN_A_PROCESS, PAGE, faults, on_a_rank

from paddle_vl_sp import backend
from paddle_vl_sp.testing import run_ranks

FAULTS = faults()
CUSTOM_OPERATORS = "from paddle_vl_sp import"
FIXED_BY_ONE_LINE = (
    "Deepstack gradients are partial under sequence parallelism",
    "Gradients of q_norm and k_norm are not summed",
    "Images and videos in one batch raise",
)


def where_and_words(block):
    """("on 2 ranks", "TypeError", "new_zeros"), from the note `fault on 2 ranks: TypeError new_zeros`."""
    where, _, words = block.noted("fault ").partition(": ")
    kind, _, part = words.partition(" ")
    return where, kind, part


@pytest.fixture(scope="module")
def raised():
    """{heading: what each rank raised}, as installed and with this package applied."""
    pytest.importorskip("paddleformers")
    snippets = {name: block.source for name, block in FAULTS.items() if where_and_words(block)[0] != IN_A_PROCESS}
    ranks = run_ranks(on_a_rank, 2, snippets, FIXED_BY_ONE_LINE, timeout=250)
    as_installed = {name: [found[name] for found, _ in ranks] for name in snippets}
    return as_installed, {name: [fixed[name] for _, fixed in ranks] for name in FIXED_BY_ONE_LINE}


def gone(name):
    return f"this release no longer has the fault {name!r}: update docs/upstream-faults.md"


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_there(name, request):
    """As the page says: the kind of error and a part of its words, on a rank that raises, and nothing else on any."""
    block = FAULTS[name]
    where, kind, part = where_and_words(block)
    if where == IN_A_PROCESS:
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", block.source], capture_output=True, text=True)
        assert done.returncode, gone(name)
        assert kind in done.stdout + done.stderr
        return
    if CUSTOM_OPERATORS in block.source and backend().name != "op":
        pytest.skip("no custom operators: the header of this report says why")
    told = [error for error in request.getfixturevalue("raised")[0][name] if error]
    assert told, gone(name)
    for error in told:
        assert error.startswith(f"{kind}:"), error
        assert part in error


@pytest.mark.parametrize("name", FIXED_BY_ONE_LINE)
def test_one_line_fixes_it(name, raised):
    """The same snippet, unchanged, raises nothing on any rank."""
    assert raised[1][name] == ["", ""]


def test_every_row_of_the_table_leads_to_a_fault_and_every_fault_has_a_row():
    """By the links; those without a snippet are headings too."""
    text = PAGE.read_text()
    table = text[text.index("| fault | who") : text.index("## PaddleFormers")]
    headings = [*re.findall(r"^### (.*)$", text, re.MULTILINE), "Others, without a snippet"]
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", table)) == slugs - {"others-of-paddlefleet"}


def test_whoever_is_hit_is_told_the_rest():
    """Each fault with a snippet says where, who, a workaround, and what this package does."""
    for section in PAGE.read_text().split("\n### ")[1:]:
        heading = section.partition("\n")[0]
        if heading in FAULTS:
            for word in ("Where", "Who", "Workaround", "Here"):
                assert f"* **{word}**: " in section, (heading, word)
