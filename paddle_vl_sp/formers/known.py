"""What PaddleFormers' code was when it was read: only a method that is known is replaced."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

MODELS = "paddleformers.transformers"
PACKAGE = __name__.partition(".")[0]
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
    sources: tuple[str, ...] | None = None  # fingerprints of every text that is known; None: its methods are a family's

    def found(self) -> type | None:
        """The class that ours is, or would be, made of."""
        module, _, owner = self.where.partition(":")
        there: Any = importlib.import_module(module)
        there = getattr(getattr(there, owner) if owner else there, self.name, None)
        return None if there is None else below_ours(there)

    def unknown(self, cls: type) -> str:
        found, known = class_fingerprint(cls), " or ".join(self.sources or ()) or "none"
        if found in (self.sources or ()):
            return ""
        file = getattr(sys.modules.get(cls.__module__), "__file__", "no file")
        return f"{cls.__name__} of {cls.__module__} has fingerprint {found}, known is {known} ({file})"

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
    balanced: tuple[Replaced, ...] = ()  # in place of those, where it is to be shared with data-parallel ranks
    cut: tuple[Replaced, ...] = ()  # replaced too, where context parallelism is on
    contract: tuple[Clause, ...] = ()  # what code of it that is not known is tried by
    is_optional: bool = False  # a module that cannot be imported is never an error: it needs more than most have
    part_of: str = ""  # the family that it goes with: if one is refused, all of that name are

    @property
    def unit(self) -> str:
        return self.part_of or self.name

    def methods(self, is_shared: bool = False, is_cut: bool = False, over_data: bool = False) -> tuple[Replaced, ...]:
        """What is replaced."""
        shared = self.balanced if over_data else self.shared
        return self.replaced + (shared if is_shared else ()) + (self.cut if is_cut else ())

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
        yield from self._deviations_of_classes()

    def _deviations_of_classes(self) -> Iterator[Deviation]:
        """What is not as known in the classes that ours are subclasses of; one that is not there is the report's."""
        for swapped in self.swapped if any(swapped.sources is not None for swapped in self.swapped) else ():
            cls = swapped.found()
            why = swapped.unknown(cls) if cls is not None else ""
            if why and cls is not None:
                module = sys.modules.get(cls.__module__)
                functions = functions_of(cls).values()
                yield Deviation(why, all(_is_of(function, cls, module) for function in functions))


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


def class_fingerprint(cls: type) -> str:
    """Of all functions of the class; their order does not count."""
    parts = [f"{name} {fingerprint(function)}" for name, function in sorted(functions_of(cls).items())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def functions_of(cls: type) -> dict[str, Any]:
    """Its own methods and what its properties call, by name."""
    own = {name: getattr(value, "fget", getattr(value, "__func__", value)) for name, value in vars(cls).items()}
    return {name: value for name, value in own.items() if inspect.isfunction(value)}


def below_ours(cls: type) -> type:
    """The class that ours, where it is one of ours, is a subclass of."""
    mro = cls.__mro__
    ours = [place for place, base in enumerate(mro) if base.__module__.partition(".")[0] == PACKAGE]
    return mro[max(ours) + 1] if ours else cls


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
