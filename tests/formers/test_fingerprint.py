"""Which edits of PaddleFormers' code are noticed: those of its meaning, and no others."""

import inspect
import linecache
import re
import textwrap

import pytest
from paddleformers.transformers.qwen2_5_vl.modeling import Qwen2_5_VLModel
from paddleformers.transformers.qwen3_vl.modeling import Qwen3VLModelDeprecated, Qwen3VLTextModel

from paddle_vl_sp.formers.known import fingerprint

FUNCTIONS = [Qwen3VLTextModel._deepstack_process, Qwen3VLModelDeprecated.forward, Qwen2_5_VLModel.forward]


def at_first_statement(source, inserted):
    """The line before the first statement of the body, behind a docstring."""
    head, _, body = re.split(r'("""[\s\S]*?"""\n)', source, maxsplit=1) if '"""' in source else (*_split(source), "")
    if not body:
        head, body = head, _split(source)[1]
        return head + textwrap.indent(inserted, "    ") + body
    return f'{head}"""Another text."""\n' + textwrap.indent(inserted, "    ") + body


def _split(source):
    end = re.search(r"\)[^\n]*:\n", source).end()
    return source[:end], source[end:]


COSMETIC = {
    "a comment": lambda s: at_first_statement(s, "# what follows is new\n"),
    "comments at the ends of lines": lambda s: re.sub(r"(?m)^(\s+\w[^\n]*[\w\)\]])$", r"\1  # as before", s),
    "blank lines": lambda s: re.sub(r"(?m)^(    \w)", r"\n\n\1", s),
    "other indentation": lambda s: re.sub(r"(?m)^( +)", lambda m: m.group(1) * 2, s),
    "spaces around signs": lambda s: s.replace(" = ", "  =  ").replace(", ", ",  "),
}
SEMANTIC = {
    "a statement more": lambda s: at_first_statement(s, "self.seen = True\n"),
    "another name": lambda s: re.sub(r"\bself\b", "this", s),
    "a sign": lambda s: (
        re.sub(r" is not None", " is None", s, count=1) if " is not None" in s else s.replace(".clone()", "")
    ),
    "a number": lambda s: re.sub(r"\b0\b", "1", s, count=1),
    "the last statement gone": lambda s: "\n".join(s.rstrip().split("\n")[:-1]) + "\n",
}


def edited(function, edit):
    """A function with that source, as far as inspect can see."""
    source = edit(textwrap.dedent(inspect.getsource(function)))
    file = f"<edited {hash(source)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    names = dict(inspect.unwrap(function).__globals__)
    exec(compile(source, file, "exec"), names)
    return names[function.__name__]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__qualname__)
@pytest.mark.parametrize("edit", COSMETIC)
def test_what_means_the_same_is_the_same(function, edit):
    """Equal fingerprints; the edit is real."""
    new = edited(function, COSMETIC[edit])
    assert inspect.getsource(new) != textwrap.dedent(inspect.getsource(function))
    assert fingerprint(new) == fingerprint(function)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__qualname__)
@pytest.mark.parametrize("edit", SEMANTIC)
def test_what_means_something_else_is_noticed(function, edit):
    """Other fingerprints."""
    new = edited(function, SEMANTIC[edit])
    assert fingerprint(new) != fingerprint(function)


def test_another_indentation_of_one_line_is_noticed():
    """A line that moves into a branch means something else, though it has the same words."""
    source = "def f(x):\n    if x:\n        x = 1\n    return x\n"
    inside = source.replace("    return", "        return")
    first, second = (edited(eval_function(text), str) for text in (source, inside))
    assert fingerprint(first) != fingerprint(second)


def eval_function(source):
    file = f"<source {hash(source)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    names = {}
    exec(compile(source, file, "exec"), names)
    return names["f"]


@pytest.mark.parametrize(
    ("one", "other"),
    [('return v < "1"', 'return v < "2"'), ('return v > "a"', 'return v > "b"'), ('v = "a b"', 'v = "ab"')],
)
def test_strings_count(one, other):
    """Also at the end of a line, behind a sign, and their spaces."""
    first, second = (eval_function(f"def f(v):\n    {line}\n") for line in (one, other))
    assert fingerprint(first) != fingerprint(second)


def test_what_has_no_source_says_so():
    assert fingerprint(len) == "no source"
