"""What a config's fields are held to: the types of their annotations."""

from __future__ import annotations

import reprlib
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(config: Any) -> None:
    """Every field has its annotation's type, also where no command line saw to it: int is good
    enough for float, bool is no int.

    Raises TypeError; for a name that is not among the choices, ValueError.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if _fits(value, kind):
            continue
        error = ValueError if get_origin(kind) is Literal else TypeError
        raise error(f"{name} should be {_text(kind)}, got {reprlib.repr(value)}")


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:  # tuple[X, ...]
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _text(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(map(_text, inner))
    if origin is tuple:
        return f"a tuple of {_text(inner[0])}"
    return "none" if kind is NoneType else kind.__name__
