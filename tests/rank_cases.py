"""Many cases in one launch: each rank runs all and tells, case by case, what failed."""

import traceback

import pytest


def outcomes(cases):
    """{name: "" or the error} of this rank; to be returned from the function given to run_ranks."""
    told = {}
    for case in cases:
        try:
            case()
            told[case.__name__] = ""
        except Exception:
            told[case.__name__] = traceback.format_exc()
    return told


def hold(results, name):
    """Fails with what each rank says about one case."""
    failed = [f"rank {rank}: {told[name]}" for rank, told in enumerate(results) if told[name]]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)


def same_error_everywhere(call, group, *parts):
    """Every rank must raise a ValueError with these parts; the words must be the same on all."""
    from paddle_vl_sp.comm.agree import check_same, fingerprint

    with pytest.raises(ValueError, match="(?s)" + ".*".join(parts)) as caught:
        call()
    check_same(fingerprint(str(caught.value)), f"words, and not {caught.value}", group)
