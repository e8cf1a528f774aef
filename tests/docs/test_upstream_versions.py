"""docs/upstream-versions.csv: the pages count what is there, and its known texts are those of the families."""

import csv
import re
from collections import Counter

import pytest
from docs_blocks import PAGES, ROOT

from paddle_vl_sp.formers.families import FAMILIES

CLASSES = ("GPTEmbedding", "GPTLMHead")
VERDICTS = ("known", "admitted", "refused")
COMMIT, FINGERPRINT = re.compile(r"[0-9a-f]{10}"), re.compile(r"[0-9a-f]{16}")
SAID = {  # what a page says of the numbers; the Chinese page has the same ones (test_names.py)
    "docs/models.md": ("on {all} public texts",),
    "docs/other-releases.md": (
        "on {methods} texts of these methods",
        "{methods_known} known, {methods_admitted} admitted, {methods_refused} refused",
        "on {classes} texts of PaddleFleet's classes, {GPTEmbedding} of `GPTEmbedding` and {GPTLMHead} of `GPTLMHead`",
        "{classes_known} known, {classes_admitted} admitted, {classes_refused} refused",
    ),
}


@pytest.fixture(scope="module")
def rows():
    with (ROOT / "docs" / "upstream-versions.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sources():
    """Fingerprints of the known texts, by method or class."""
    families = [family for members in FAMILIES.values() for family in members]
    known = {method.name: set(method.sources) for family in families for method in family.replaced}
    known |= {cls.name: set(cls.sources) for family in families for cls in family.swapped if cls.sources is not None}
    return known


def test_every_row_is_a_text_of_its_own(rows):
    """No text twice; a commit wherever the repository is known; a broken clause where it is refused, and only there."""
    assert len({(row["method"], row["fingerprint"]) for row in rows}) == len(rows)
    for row in rows:
        assert FINGERPRINT.fullmatch(row["fingerprint"]), row
        assert row["verdict"] in VERDICTS, row
        assert bool(COMMIT.fullmatch(row["commit"])) == (row["repository"] != "unknown"), row
        assert bool(row["first broken clause"]) == (row["verdict"] == "refused"), row


def test_known_is_what_the_families_know(rows):
    """A row is known exactly where its method's family has the fingerprint."""
    known = sources()
    for row in rows:
        assert (row["verdict"] == "known") == (row["fingerprint"] in known[row["method"]]), row


@pytest.mark.parametrize("page", SAID)
def test_the_pages_count_the_rows(rows, page):
    """All texts, those of methods and of classes, and their verdicts: to the letter, lines joined."""
    numbers = Counter({"all": len(rows)})
    for row in rows:
        kind = "classes" if row["method"] in CLASSES else "methods"
        numbers.update((kind, f"{kind}_{row['verdict']}", row["method"]))
    text = " ".join(PAGES[page].split())
    for said in SAID[page]:
        assert said.format(**numbers) in text
