"""What PaddleFormers' code was when it was read: only a method that is known is replaced."""

from __future__ import annotations

import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

MODELS = "paddleformers.transformers"
KNOWN_VERSIONS = ("1.2.0",)
OURS = "_paddle_vl_sp_original"  # on a function of ours: what it replaces

MARKS = {tokenize.NEWLINE: "\n", tokenize.INDENT: "\t", tokenize.DEDENT: "\r"}  # no token looks like these
MEANINGLESS = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)

Make = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Replaced:
    """A method that is replaced."""

    name: str  # "Class.method"
    make: Make  # ours, from the original
    sources: tuple[str, ...]  # fingerprints of every text of it that is known

    def unknown(self, function: Any, owner: type) -> str:
        found = fingerprint(function)
        if found in self.sources:
            return ""
        place = _where(function, owner)
        return f"{self.name} has fingerprint {found}, known is {' or '.join(self.sources)} ({place})"


@dataclass(frozen=True)
class Called:
    """A method that ours call and that may be overridden: only its parameters must be as known."""

    name: str
    parameters: tuple[str, ...]

    def unknown(self, function: Any, owner: type) -> str:
        found = tuple(inspect.signature(function).parameters)
        if found == self.parameters:
            return ""
        return f"{self.name} takes ({', '.join(found)}), known is ({', '.join(self.parameters)})"


@dataclass(frozen=True)
class Swapped:
    """A class that models are built of, by the name under which builders look it up; ours is a subclass of it.

    where  "module", or "module:Class" for an attribute of a class
    """

    where: str
    name: str
    make: Callable[[type], type]  # ours, from what is there

    @property
    def label(self) -> str:
        """gpt_layer_specs.GPTEmbedding, Qwen3VLTextProvider.specific_layer"""
        module, _, owner = self.where.partition(":")
        return f"{owner or module.rpartition('.')[2]}.{self.name}"


@dataclass(frozen=True)
class Deviation:
    """Something that is not as known."""

    why: str
    is_text: bool = False  # only the text of a method, in the family's own module: it can be tried


@dataclass(frozen=True)
class Clause:
    """Something that PaddleFormers' code must do for ours to take its place."""

    says: str
    broken: Callable[[Family, Any], str]  # of a family and its module: how it is broken; "" where it holds
    is_shared: bool = False  # it matters only where the vision tower's work is to be shared


@dataclass(frozen=True)
class Family:
    """Classes of one module that work together: all of the methods are replaced, or none."""

    name: str
    module: str
    replaced: tuple[Replaced, ...]
    called: tuple[Called, ...] = ()
    swapped: tuple[Swapped, ...] = ()
    shared: tuple[Replaced, ...] = ()  # replaced too, where the vision tower's work is to be shared
    cut: tuple[Replaced, ...] = ()  # replaced too, where context parallelism is on
    contract: tuple[Clause, ...] = ()  # what code of it that is not known is tried by
    is_optional: bool = False  # a module that cannot be imported is never an error: it needs more than most have

    def methods(self, is_shared: bool = False, is_cut: bool = False) -> tuple[Replaced, ...]:
        """What is replaced."""
        return self.replaced + (self.shared if is_shared else ()) + (self.cut if is_cut else ())

    def deviations(self, module: Any, is_shared: bool = False, is_cut: bool = False) -> Iterator[Deviation]:
        """What is not as known in the module's classes; of sharing the tower's work, of context parallelism as well."""
        methods: tuple[Replaced | Called, ...] = (*self.methods(is_shared, is_cut), *self.called)
        for method in methods:
            owner = getattr(module, method.name.partition(".")[0], None)
            if owner is None:
                yield Deviation(f"{self.module} has no {method.name.partition('.')[0]}")
                return
            if method.name.partition(".")[2] not in vars(owner):
                yield Deviation(f"{method.name} is not there")
                continue
            function = original_of(module, method.name)
            why = method.unknown(function, owner)
            if why:
                yield Deviation(why, isinstance(method, Replaced) and _is_of(function, owner, module))


def original_of(module: Any, method: str) -> Any:
    """PaddleFormers' own function of "Class.method", whether ours is in its place or not."""
    owner, _, name = method.partition(".")
    function = vars(getattr(module, owner))[name]
    return getattr(function, OURS, function)


def fingerprint(function: Callable[..., Any]) -> str:
    """The first 16 hexadecimal digits of the sha256 of the function's code; "no source" where there is none.

    Comments, docstrings, blank lines and spaces do not count: the same code has the same fingerprint.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return "no source"
    return hashlib.sha256(code_of(source).encode()).hexdigest()[:16]


def code_of(source: str) -> str:
    """Its meaningful tokens without spaces, also within f-strings, which versions of Python split differently."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in MEANINGLESS]
    parts: list[str] = []
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        begins = not parts or parts[-1] in MARKS.values()
        if begins and token.type == tokenize.STRING and following and following.type == tokenize.NEWLINE:
            continue  # a docstring
        if begins and token.type == tokenize.NEWLINE:
            continue  # its end
        is_text = token.type == tokenize.STRING and "f" not in token.string.partition(token.string[-1])[0].lower()
        parts.append(MARKS.get(token.type) or (token.string if is_text else "".join(token.string.split())))
    return "".join(parts)


def one_line(error: Exception) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def formers_version() -> str:
    try:
        return version("paddleformers")
    except PackageNotFoundError:
        return "of unknown version"


def _is_of(function: Any, owner: type, module: Any) -> bool:
    """Whether it is the module's own code, which another process finds too, and not put there by other code."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return function.__module__ == owner.__module__ and code is not None and code.co_filename == module.__file__


def _where(function: Any, owner: type) -> str:
    """Whose code it is: a newer PaddleFormers, or that of other code that replaced the method before."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    place = f"{code.co_filename}:{code.co_firstlineno}" if code else "no Python code"
    if function.__module__ != owner.__module__:
        return f"replaced by {function.__module__}, {place}"
    return place
