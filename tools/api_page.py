"""Writes docs/api.md: signature and docstring of every public name. Reads the source only: no Paddle is needed.

python tools/api_page.py
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
PACKAGES = ("", ".sequence", ".attention", ".formers", ".fleet", ".export", ".testing")
WIDEST = 110  # letters of a signature on one line
HEAD = """# Public names

Made from the docstrings by `python tools/api_page.py`. Letters in shapes are those of the [design](design.md#words): B
batch, S sequence, S_local a rank's share of it, N feature rows of the batch, n those of a rank, H hidden size.

"""

Definition = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Name:
    """A public name, where it is first listed, and what defines it."""

    package: str
    name: str
    node: Definition | None
    text: str  # the docstring, or what stands in its place


def module_file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tree_of(module: str) -> ast.Module:
    return ast.parse(module_file(module).read_text())


def assigned(tree: ast.Module, name: str) -> ast.expr | None:
    """The value of the last assignment to a name at the top of a module."""
    found = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets)
    ]
    return found[-1] if found else None


def public(tree: ast.Module) -> list[str]:
    """What `__all__` lists; a dict that is unpacked in it gives its keys."""
    listed = assigned(tree, "__all__")
    names: list[str] = []
    for item in getattr(listed, "elts", []):
        if isinstance(item, ast.Starred):
            made = assigned(tree, ast.unparse(item.value))
            names += [ast.literal_eval(key) for key in getattr(made, "keys", [])]
        else:
            names.append(ast.literal_eval(item))
    return sorted((name for name in names if not name.startswith("__")), key=str.lower)


def find(module: str, name: str) -> tuple[Definition | None, str]:
    """The definition, followed through imports, and its text."""
    tree = tree_of(module)
    defined = [node for node in tree.body if isinstance(node, Definition) and node.name == name]
    if defined:  # the last of several: those before it are overloads
        return defined[-1], ast.get_docstring(defined[-1]) or ""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(node.module, alias.name)
    return None, text_of_value(tree, name)


def text_of_value(tree: ast.Module, name: str) -> str:
    value = assigned(tree, name)
    if isinstance(value, ast.Name):
        return f"The old name of `{value.id}`."
    for made in (node.value for node in tree.body if isinstance(node, ast.Assign)):
        for key, parts in zip(getattr(made, "keys", []), getattr(made, "values", []), strict=True):
            if isinstance(key, ast.Constant) and key.value == name and isinstance(parts, ast.Tuple):
                mixin, base, cls = (ast.unparse(part).strip("'") for part in parts.elts)
                return f"`{mixin}` for `{cls}` of paddlefleet.{base}."
    return ""


def names() -> Iterator[Name]:
    """Each name once: in the first package that lists it."""
    seen = set()
    for package in PACKAGES:
        module = f"paddle_vl_sp{package}"
        for name in public(tree_of(module)):
            if name not in seen:
                yield Name(module, name, *find(module, name))
            seen.add(name)


def signature(node: ast.FunctionDef, name: str, is_method: bool = False) -> str:
    arguments = node.args
    if is_method and not any(ast.unparse(mark) == "staticmethod" for mark in node.decorator_list):
        arguments.args = arguments.args[1:]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return wrapped(name, split_arguments(ast.unparse(arguments)), result)


def split_arguments(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def wrapped(name: str, arguments: list[str], result: str) -> str:
    """As ruff would write it."""
    arguments = [re.sub(r"^(\w+: [^=]*[^= ])=", r"\1 = ", argument.replace("'", '"')) for argument in arguments]
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= WIDEST:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){result}"])


def class_signature(node: ast.ClassDef, name: str) -> str:
    """The constructor; that of a dataclass is its fields."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            return signature(method, name, is_method=True).removesuffix(" -> None")
    if not any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
        return f"class {name}({', '.join(map(ast.unparse, node.bases))})".replace("()", "")
    fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    return wrapped(name, [field_text(field) for field in fields if "ClassVar" not in ast.unparse(field)], "")


def field_text(field: ast.AnnAssign) -> str:
    if ast.unparse(field.annotation) == "KW_ONLY":
        return "*"
    is_made = isinstance(field.value, ast.Call)  # dataclasses.field(...)
    return f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}=..." if is_made else ast.unparse(field)


def methods(node: Definition | None) -> list[ast.FunctionDef]:
    """Those with a name and a docstring of their own."""
    found = [method for method in getattr(node, "body", []) if isinstance(method, ast.FunctionDef)]
    return [method for method in found if not method.name.startswith("_") and ast.get_docstring(method)]


def is_property(method: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(mark) for mark in method.decorator_list)


def fence(text: str) -> str:
    return f"```\n{text}\n```\n"


def as_markdown(docstring: str) -> str:
    """Sentences as they are; indented lines, and lines with columns, as they stand in the source."""
    parts: list[tuple[bool, list[str]]] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = paragraph.splitlines()
        is_verbatim = any(re.match(r"\s", line) or re.search(r"\S\s{2,}\S", line) for line in lines)
        is_like_the_last = parts and parts[-1][0] and parts[-1][1][0].startswith(" ") == lines[0].startswith(" ")
        if is_verbatim and is_like_the_last:
            parts[-1][1].extend(["", *lines])
        else:
            parts.append((is_verbatim, lines))
    done = [
        fence(textwrap.dedent("\n".join(lines))) if fixed else f"{escaped(' '.join(lines))}\n" for fixed, lines in parts
    ]
    return "\n".join(part for part in done if part.strip())


def escaped(text: str) -> str:
    """Signs that Markdown would take for its own, outside of code."""
    parts = re.split(r"(`[^`]*`)", re.sub(r"::$", ":", re.sub(r"(^|[.;])\s*::$", r"\1", text)))
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


def entry(found: Name) -> str:
    node, lines = found.node, [f"### {found.name}\n"]
    if isinstance(node, ast.ClassDef):
        lines.append(fence(class_signature(node, found.name)))
    elif node is not None:
        lines.append(fence(signature(node, found.name)))
    lines.append(as_markdown(found.text))
    for method in methods(node):
        name = f"{found.name}.{method.name}"
        lines.append(fence(name if is_property(method) else signature(method, name, is_method=True)))
        lines.append(as_markdown(ast.get_docstring(method) or ""))
    return "\n".join(lines)


def page() -> str:
    every = list(names())
    parts = [HEAD]
    for package in PACKAGES:
        module = f"paddle_vl_sp{package}"
        own = [found for found in every if found.package == module]
        listed = ", ".join(f"[{name}](#{name.lower()})" for name in public(tree_of(module)))
        summary = escaped((ast.get_docstring(tree_of(module)) or "").partition("\n")[0])
        parts.append(f"## {module}\n\n{summary}\n\n{listed}\n\n" + "\n".join(map(entry, own)) + "\n")
    return "".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
