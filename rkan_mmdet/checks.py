"""Argument checks whose messages name the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def check_int(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an int >= {minimum}, but got {value!r} of type {type(value).__name__}')
    if value < minimum:
        raise ValueError(f'{name} must be an int >= {minimum}, but got {value}')
    return value


def check_float(name: str, value: Any, above: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number > {above}, but got {value!r} of type {type(value).__name__}')
    if not (math.isfinite(value) and value > above):
        raise ValueError(f'{name} must be a finite number > {above}, but got {value}')
    return float(value)


def check_fraction(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number in [0, 1], but got {value!r} of type {type(value).__name__}')
    if not 0 <= value <= 1:
        raise ValueError(f'{name} must be a number in [0, 1], but got {value}')
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, but got {value!r} of type {type(value).__name__}')
    return value


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f'{name} must be one of {", ".join(map(repr, allowed))}, but got {value!r}')
    if value not in allowed:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, allowed))}, but got {value!r}')
    return value


def check_pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """An int, or a sequence of two, as ``(height, width)``."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f'{name} must be an int or a pair (height, width), but got {value!r}')
        return check_int(f'{name}[0]', value[0], minimum), check_int(f'{name}[1]', value[1], minimum)
    return (check_int(name, value, minimum),) * 2
