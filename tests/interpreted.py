"""Triton's interpreter with what it does at every call done once: values and refusals stay."""

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import pytest


def interpret_sooner(patch: pytest.MonkeyPatch) -> None:
    """Let it find operations and types once, and leave out what it would throw away."""
    from triton.language import core
    from triton.runtime import interpreter

    # of sums and products in 64 bits, taken beside the others, only its debugging looks at any
    options = interpreter.interpreter_builder.options
    assert not options.debug
    fewer = replace(options, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", fewer)
    patch.setattr(interpreter, "_patch_builtin", _replaced_once(interpreter, core.is_builtin))
    patch.setattr(interpreter, "_get_np_dtype", _remembered_types(interpreter._get_np_dtype))
    patch.setattr(core, "_type_for_tuple_values", _remembered_shapes(core))


def _replaced_once(interpreter: Any, is_builtin: Any) -> Any:
    """Return what looks for a language's operations once.

    Of members that were none of them at first, none becomes one. All are replaced together.
    """

    @cache
    def operations(of: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(of) if is_builtin(member)]

    def replace_operations(of: Any, builder: Any, scope: Any) -> None:
        names = operations(of)
        if names and is_builtin(getattr(of, names[0])):  # else all of them are replaced already
            for name in names:
                interpreter._patch_attr(of, name, getattr(of, name), builder, scope)

    return replace_operations


def _remembered_types(type_of: Any) -> Any:
    """Return what looks up a number's type in NumPy once: it is that of a block of them as well."""
    known = cache(type_of)
    return lambda kind: type_of(kind) if kind.scalar.is_ptr() else known(kind.scalar)


def _remembered_shapes(core: Any) -> Any:
    """Return what gives each shape's type, which is only read, once: every tensor has some."""
    type_of = core._type_for_tuple_values
    known: dict[tuple[int, ...], Any] = {}

    def remembered(values: Any, fields: Any = None) -> Any:
        sizes = tuple([getattr(value, "value", value) for value in values])
        if fields is not None or not all(type(size) is int for size in sizes):
            return type_of(values, fields)
        if sizes not in known:
            known[sizes] = type_of(values)
        return known[sizes]

    return remembered
