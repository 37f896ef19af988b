"""Which code makes a result: a module with everything of spinlab that it imports.

What is digested are syntax trees without docstrings, so that a comment, a docstring or a line break
changes nothing, and a statement does. The package `spinlab.config` is followed to the dataclasses
that a module names, not to its root, which knows all of them: settings enter a key by their values.
Nor is `spinlab.cache`, which keeps results and makes none, nor the root, which names what users
import.
"""

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parent
_APART = {"spinlab", "spinlab.config", "spinlab.cache"}
_PARTS = ("body", "orelse", "finalbody", "handlers", "cases")  # that hold statements
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class _Code(NamedTuple):
    """Hold what is asked of a module: trees are large, and each garbage collection walks them."""

    digest: str  # of its statements
    imports: list[ast.Import | ast.ImportFrom]  # at any depth
    shown: list[ast.ImportFrom]  # of the module itself


@cache
def code_digest(module: str) -> str:
    """Digest the code behind an imported module, with the libraries that it computes on."""
    sha = hashlib.sha256(f"{version('torch')} {version('transformers')}".encode())
    for name in sorted(closure(module)):
        sha.update(f"{name} {_code(name).digest}\n".encode())
    return sha.hexdigest()


@cache
def closure(module: str) -> frozenset[str]:
    """Return by name the modules that a module runs: itself and all of spinlab that it imports."""
    found, ahead = {module}, [module]
    while ahead:
        new = imports_of(ahead.pop()) - found - _APART
        found |= new
        ahead += new
    return frozenset(found)


@cache
def _file(module: str) -> Path | None:
    """Return the file of a module of spinlab; None for what is none."""
    if not _is_ours(module):
        return None
    base = _ROOT.joinpath(*module.split(".")[1:])
    files = (base / "__init__.py", base.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def _is_ours(module: str) -> bool:
    return module == "spinlab" or module.startswith("spinlab.")


@cache
def _code(module: str) -> _Code:
    """Read a module's syntax without docstrings; comments and places are none of it."""
    file = _file(module) or sys.modules[module].__file__
    assert file is not None, module
    tree = ast.parse(Path(file).read_bytes())
    statements = list(_statements(tree))
    for node in (tree, *statements):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return _Code(
        hashlib.sha256(ast.dump(tree).encode()).hexdigest(),
        [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)],
        [node for node in tree.body if isinstance(node, ast.ImportFrom)],
    )


@cache
def imports_of(module: str) -> frozenset[str]:
    """Return the modules of spinlab that a module imports, inside of its functions too."""
    found: set[str] = set()
    for node in _code(module).imports:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if _file(alias.name)}
        else:
            found |= {origin for alias in node.names for origin in _origins(node, alias.name)}
    return frozenset(found)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements in a node at any depth; expressions, which hold none, are left out."""
    for part in _PARTS:
        for child in getattr(node, part, ()):
            if isinstance(child, ast.stmt):
                yield child
            yield from _statements(child)


def _origins(node: ast.ImportFrom, name: str) -> Iterator[str]:
    """Yield the module of spinlab that an imported name stands in, seen through packages' faces."""
    module = node.module or ""
    assert node.level == 0, "spinlab imports by absolute names"
    if not _is_ours(module):
        return
    if _file(f"{module}.{name}") is not None:
        yield f"{module}.{name}"
        return
    shown = [node for node in _code(module).shown if _binds(node, name)]
    if not shown or not str(_file(module)).endswith("__init__.py"):
        yield module
    for face in shown:
        yield from _origins(face, name)


def _binds(node: ast.ImportFrom, name: str) -> bool:
    return any((alias.asname or alias.name) == name for alias in node.names)
