"""Reading a state document of which anything may be missing, and whose texts are a stranger's. Pure.

A figure that is absent, of the wrong type or no number is ``None``; a text comes out as
one line of visible characters, so that no worker's name or error can steer the terminal.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 2000
"""Characters of one text that are looked at; the longest error that is worth reading is shorter."""
_PLACEHOLDER = "·"
_STACKING = {"Mn", "Me"}
"""Combining marks: they pile up on the character before them and take no cell of their own."""


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """``text`` on one line: no control or format characters, no marks that stack, single spaces."""
    head = text[:limit]
    if head.isascii() and head.isprintable():
        return head
    visible = []
    for character in head:
        if character.isprintable():
            if unicodedata.category(character) not in _STACKING:
                visible.append(character)
        else:
            visible.append(" " if character.isspace() else _PLACEHOLDER)
    return " ".join("".join(visible).split())


def text(value: object, limit: int = MAX_TEXT) -> str:
    """A text or a number as one clean line; anything else is an empty string."""
    if isinstance(value, str):
        return clean(value, limit)
    if isinstance(value, bool):
        return "yes" if value else "no"
    figure = number(value)
    return "" if figure is None else f"{figure:g}"


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        figure = float(value)
    except OverflowError:
        return None
    return figure if math.isfinite(figure) else None


def count(value: object) -> int | None:
    """A finite number cut to a whole one, or None."""
    figure = number(value)
    return None if figure is None else int(figure)


def mapping(value: object) -> Mapping[str, Any]:
    """An object of the document; empty if it is none."""
    return value if isinstance(value, Mapping) else {}


def rows(value: object) -> list[Mapping[str, Any]]:
    """The objects of a list of the document; what is no object is left out."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def numbers(value: object) -> list[float | None]:
    """A list of numbers, None where there is none."""
    return [number(item) for item in value] if isinstance(value, list) else []


def first_number(*values: object) -> float | None:
    """The first that is a number."""
    return next((figure for value in values if (figure := number(value)) is not None), None)
