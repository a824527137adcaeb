"""Text of tables and command lines to values: whole numbers, truth values, lists, and names of upstream's choices."""

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import Field
from functools import partial
from typing import Any

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "none")
_SUFFIXES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_EMPTY = ("", "none", "null", "nan", "n/a", "-")  # an empty cell, as programs write it
_MOST_LAYERS = 1 << 16
_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+")


def is_empty(name: str, value: Any) -> bool:
    """Return whether a value stands for upstream's default. `none` is a value of its own for positions.

    Args:
        name: flag in snake case.
        value: its value, or its text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    text = value.strip().lower() if isinstance(value, str) else "given"
    return text in _EMPTY and not (text == "none" and name.endswith("position_embedding_type"))


def boolean(name: str, value: Any) -> bool:
    """Return a truth value.

    Args:
        name: flag in snake case, for messages.
        value: its value, or its text.

    Raises:
        ValueError: the text is neither true nor false.
    """
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower().removesuffix(".0")
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(f"{name} is {value!r}; give true or false")


def whole_number(name: str, value: Any) -> int:
    """Return a whole number, with an optional suffix K, M or G for powers of 1,024.

    Args:
        name: flag in snake case, for messages.
        value: its value, or its text.

    Raises:
        ValueError: the text is no such number, or the flag was given without a value.
    """
    if value is True:
        raise ValueError(f"{name} has no value; give a whole number")
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip().lower().replace("_", "")
    text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    scale = _SUFFIXES.get(text[-1:], 1)
    try:
        number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return int(number)


def number(name: str, value: Any) -> float:
    """Return a finite number.

    Args:
        name: flag in snake case, for messages.
        value: its value, or its text.

    Raises:
        ValueError: the text is no such number, or the flag was given without a value.
    """
    if value is True:
        raise ValueError(f"{name} has no value; give a number")
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{name} is {value!r}, not a number")
    return found


def words(value: Any) -> list[str]:
    """Return the parts of a list, or of a text such as `1 2`, `[1, 2]` or `['p2p']`."""
    if isinstance(value, (list, tuple)):
        return [str(one) for one in value]
    text = str(value).strip().strip("[]()").replace(",", " ").replace(";", " ")
    return [part.strip("'\"") for part in text.split()]


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return the one of some names that the text means, whatever its case; without names, the text.

    Args:
        name: flag in snake case, for messages.
        value: text.
        choices: names in their own spelling; empty: any text is one.

    Raises:
        ValueError: it is none of them.
    """
    text = str(value).strip()
    if not choices:
        return text
    for one in choices:
        if text.lower() == one.lower():
            return one
    raise ValueError(f"{name} is {value!r}; give one of {', '.join(choices)}")


def convert(name: str, value: Any, field: Field[Any], choices: Sequence[str] = ()) -> Any:
    """Return a value with the type of a field.

    Args:
        name: the flag, for messages.
        value: a text, or a value of the type.
        field: of a data class.
        choices: the only texts that the field may hold; none: any.

    Raises:
        ValueError: the text is no value of the type.
    """
    kind = str(field.type).removeprefix("<class '").removesuffix("'>")
    if kind.startswith("tuple"):
        item = whole_number if "int" in kind else partial(choice, choices=choices)
        return tuple(item(name, part) for part in words(value))
    for prefix, reader in (("bool", boolean), ("int", whole_number), ("float", number)):
        if kind.startswith(prefix):
            return reader(name, value)
    if field.default == "" and str(value).strip().lower() in _FALSE:
        return ""  # the flag is not given
    return choice(name, value, choices)


def layer_list(name: str, value: Any) -> int | tuple[int, ...]:
    """Return a number, or a number for every layer. Upstream evaluates expressions such as ([0]*2+[1]*2)*8, too.

    Args:
        name: flag in snake case, for messages.
        value: a number, a list, or the text of one.

    Raises:
        ValueError: it is neither.
    """
    try:
        found = _evaluate(ast.parse(str(value).strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, _NoExpression):
        found = [whole_number(name, part) for part in words(value)]  # such as `0 1 1`
    if found == []:
        raise ValueError(f"{name} is {value!r}, neither a number nor a list")
    return tuple(found) if isinstance(found, list) else found


class _NoExpression(Exception):
    """A text is no sum or product of numbers and lists."""


def _evaluate(node: ast.expr) -> int | list[int]:
    """Return the value of an expression of numbers, lists, + and *, and of nothing else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_evaluate(one) for one in node.elts]
        return [_number_of(one) for one in items]
    if not isinstance(node, ast.BinOp):
        raise _NoExpression
    left, right = _evaluate(node.left), _evaluate(node.right)
    if isinstance(node.op, ast.Mult):
        if isinstance(left, list):
            return _repeated(left, _number_of(right))
        return _repeated(right, left) if isinstance(right, list) else left * right
    if not isinstance(node.op, ast.Add):
        raise _NoExpression
    if isinstance(left, list) and isinstance(right, list):
        return [*left, *right]
    return _number_of(left) + _number_of(right)


def _number_of(value: int | list[int]) -> int:
    if isinstance(value, list):
        raise _NoExpression
    return value


def _repeated(items: list[int], count: int) -> list[int]:
    if len(items) * count > _MOST_LAYERS:
        raise ValueError(f"a list of {len(items) * count} layers; give at most {_MOST_LAYERS}")
    return items * count
