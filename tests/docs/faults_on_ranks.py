"""What the snippets of docs/upstream-faults.md raise, on each of two ranks, all in one launch."""

import warnings
from pathlib import Path

from docs_blocks import ROOT, blocks_of, in_a_new_folder

from paddle_vl_sp.testing import enable_tensor_parallel_on_cpu
from paddle_vl_sp.testing.tensor_parallel import _default_group_for_all_ranks

PAGE = ROOT / "docs" / "upstream-faults.md"
IN_A_PROCESS = "in a process"


def faults():
    """{heading of the page: the block below it}"""
    text, found = PAGE.read_text(), {}
    for block in blocks_of(PAGE):
        heading = text[: text.index(block.source)].rpartition("\n### ")[2].partition("\n")[0]
        if block.noted("fault ") not in ("", "preamble"):
            assert heading not in found, f"two snippets for {heading}"
            found[heading] = block
    return found


def preamble():
    return next(block.source for block in blocks_of(PAGE) if block.noted("fault ") == "preamble")


def raised(source, names, file):
    """The error of a snippet, in words; "" if it has none."""
    file.write_text(source)  # what is traced into a graph is read from its file
    try:
        exec(compile(source, str(file.resolve()), "exec"), names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def on_a_rank(snippets, fixed):
    """{heading: what was raised}, as installed; and of those in `fixed`, with this package applied.

    A rank that raises must not leave the other in a collective: snippets raise at their end, or on both ranks.
    """
    from paddle_vl_sp.formers import apply_to_paddleformers

    warnings.simplefilter("ignore")
    names = {}
    exec(preamble(), names)

    def run(headings):
        return {
            heading: raised(snippets[heading], dict(names), Path(f"snippet_{number}.py"))
            for number, heading in enumerate(headings)
        }

    with enable_tensor_parallel_on_cpu(), _default_group_for_all_ranks(), in_a_new_folder():
        found = run(snippets)
        with apply_to_paddleformers():
            return found, run(fixed)
