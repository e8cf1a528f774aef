"""PaddleFleet's own classes, of which ours are subclasses: an edited package on disk, tried, judged and left alone."""

import dataclasses
import shutil
import sys

import pytest
from training import modeling_fleet

import stub_paddlefleet
from paddle_vl_sp.cli.doctor import check_contracts
from paddle_vl_sp.formers import UpstreamChanged, admission, apply_to_paddleformers, apply_to_qwen3_vl, families
from paddle_vl_sp.formers.admission import Verdict
from paddle_vl_sp.formers.families.paddlefleet import EMBEDDING, HEAD, contiguous_head
from paddle_vl_sp.formers.known import below_ours, class_fingerprint
from stub_paddlefleet import DOUBLE, stubbed_paddlefleet

EMBEDDING_FILE, HEAD_FILE = "models/gpt/gpt_embedding.py", "models/gpt/lm_head.py"
OTHER_NAMES = (EMBEDDING_FILE, "moe_ids", "padded_ids")
HALF_THE_FEATURES = (
    EMBEDDING_FILE,
    "rows = features.astype(hidden.dtype)",
    "rows = 0.5 * features.astype(hidden.dtype)",
)
ANOTHER_WEIGHT = (HEAD_FILE, "self.weight =", "self.lm_weight =")


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Edits the double on disk; a cache of the test's own."""
    if "paddlefleet" in sys.modules:
        pytest.skip("the installed package is not edited")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stub_paddlefleet, "DOUBLE", tmp_path / "site")
    shutil.copytree(DOUBLE, tmp_path / "site", ignore=shutil.ignore_patterns("__pycache__"))

    def edit(file, old, new):
        path = tmp_path / "site" / "paddlefleet" / file
        source = path.read_text(encoding="utf-8")
        assert old in source
        path.write_text(source.replace(old, new), encoding="utf-8")

    return edit


def lines_of(report, family):
    return {line.name: line for line in report.lines if line.family == family.name}


def test_an_unknown_text_that_does_the_same_is_admitted_once(package, monkeypatch):
    """Tried in a process of its own, kept, and said in the report; without trials it is refused."""
    package(*OTHER_NAMES)
    with stubbed_paddlefleet(is_known=False) as is_double:
        assert is_double
        for _ in range(2):
            with apply_to_qwen3_vl() as report:
                for family, name in ((EMBEDDING, "GPTEmbedding"), (HEAD, "GPTLMHead")):
                    line = lines_of(report, family)[f"gpt_layer_specs.{name}"]
                    assert line.state == "replaced"
                    assert "all that is needed of it holds (1 trial)" in line.why
            monkeypatch.setattr(admission, "_tried_elsewhere", None)  # both are kept
        monkeypatch.setenv("PADDLE_VL_SP_PROBE", "never")
        with pytest.raises(UpstreamChanged, match=r"GPTEmbedding of .*gpt_embedding has fingerprint \w+, known is"):
            apply_to_qwen3_vl()


def test_one_that_merges_something_else_is_refused_with_its_clause(package):
    """And with it all that is made for it: the layers would take what it hands on. The plain classes stay ours."""
    package(*HALF_THE_FEATURES)
    with stubbed_paddlefleet(is_known=False):
        from paddlefleet.models.gpt import gpt_layer_specs

        theirs = (
            gpt_layer_specs.GPTEmbedding,
            gpt_layer_specs.GPTLMHead,
            modeling_fleet.Qwen3VLTextProvider.specific_layer,
        )
        why = "GPTEmbedding merges, cuts and hands on as ours: other hidden_states, image"
        with pytest.raises(UpstreamChanged, match=why):
            apply_to_qwen3_vl()
        with apply_to_paddleformers(strict=False) as report:
            now = (
                gpt_layer_specs.GPTEmbedding,
                gpt_layer_specs.GPTLMHead,
                modeling_fleet.Qwen3VLTextProvider.specific_layer,
            )
            assert now == theirs
            lines = [line for line in report.lines if line.family in ("Qwen3-VL fleet", EMBEDDING.name, HEAD.name)]
            assert len(lines) == 6
            assert all(line.state == "left alone" and why in line.why for line in lines)
            assert any(line.state == "replaced" and line.family == "Qwen3-VL" for line in report.lines)


def test_a_head_without_its_weight_is_refused(package):
    package(*ANOTHER_WEIGHT)
    with stubbed_paddlefleet(is_known=False), pytest.raises(UpstreamChanged, match="its weight is not one tensor"):
        apply_to_qwen3_vl()


def test_a_method_that_other_code_put_there_is_refused_without_a_trial(monkeypatch):
    """Another process would not find it; the head, which it would find, is tried."""
    tried = []
    answer = lambda family, key, is_shared: (tried.append(family.name), Verdict(key, 1, ()))[1]  # noqa: E731
    monkeypatch.setattr(admission, "_tried_elsewhere", answer)
    monkeypatch.setenv("PADDLE_VL_SP_PROBE", "always")
    with stubbed_paddlefleet(is_known=False):
        from paddlefleet.models.gpt.gpt_embedding import GPTEmbedding

        monkeypatch.setattr(GPTEmbedding, "forward", lambda self, *_: {})
        with pytest.raises(UpstreamChanged, match=r"GPTEmbedding of .* has fingerprint"):
            apply_to_qwen3_vl()
    assert tried == [HEAD.name]


def test_a_fingerprint_is_of_all_methods_and_of_theirs_alone(monkeypatch):
    """Ours in their place changes nothing; a method that differs does."""
    with stubbed_paddlefleet():
        from paddlefleet.models.gpt.lm_head import GPTLMHead

        before = class_fingerprint(GPTLMHead)
        assert class_fingerprint(below_ours(contiguous_head(GPTLMHead))) == before
        monkeypatch.setattr(GPTLMHead, "build_schedule_node", lambda self: None)
        assert class_fingerprint(GPTLMHead) != before


def test_a_known_text_is_not_tried():
    """By its fingerprint, as listed."""
    with stubbed_paddlefleet():
        from paddlefleet.models.gpt.lm_head import GPTLMHead

        listed = dataclasses.replace(HEAD.swapped[0], sources=(class_fingerprint(GPTLMHead),))
    with_it = dataclasses.replace(HEAD, swapped=(listed,))
    with stubbed_paddlefleet(is_known=False):
        assert [deviation.is_text for deviation in HEAD.deviations(None)] == [True]
        assert not list(with_it.deviations(None))


def test_doctor_lists_their_clauses(monkeypatch):
    """A line for each, PASS where it holds."""
    monkeypatch.setattr(families, "FAMILIES", {"qwen3_vl": (EMBEDDING, HEAD)})
    with stubbed_paddlefleet():
        found = {check.subject: check.state for check in check_contracts()}
    assert found == {f"contract, {family.name}": "PASS" for family in (EMBEDDING, HEAD)}
