"""Reads a state document that came over the wire. Its texts may be anyone's: each is made one clean line.

A text of the result consists of visible characters, so no worker's name or error can steer a terminal.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import msgspec

from pdserve.state.document import StateDocument

MAX_TEXT = 2000
"""Characters kept of one text."""
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


def read_state(document: object) -> StateDocument:
    """The struct of a decoded document.

    Raises:
        msgspec.ValidationError: if a field has a wrong type, or a number is out of range.
    """
    return msgspec.convert(_cleaned(document), StateDocument)


def _cleaned(value: Any) -> Any:
    match value:
        case str():
            return clean(value)
        case dict():
            return {clean(name): _cleaned(item) for name, item in value.items()}
        case list():
            return [_cleaned(item) for item in value]
        case int() if not -(2**63) <= value < 2**63:
            raise msgspec.ValidationError("a number is out of range")
    return value
