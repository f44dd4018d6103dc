"""A worker's refusal without what we had added to the request: inner addresses are nobody's business. Pure.

SGLang's validation errors repeat the whole request, as Python prints it.
"""

from __future__ import annotations

import re

_OURS = re.compile(
    rb"(?:, )?'bootstrap_(?:host|port|room)': (?:\[[^\]]*\]|'[^']*'|\d+|None)"
    rb"|(?:, )?'(?:rid|request_id)': (?:\['[^\]]*'\]|'(?:resp_)?[0-9a-f]{32}')"
)


_LEFT_OVER = re.compile(rb"(?:, )?'parameters': \{\}|(?<=\{), ")
"""A comma whose neighbour is gone, and the place for our fields in a Vertex request that had none."""


def scrubbed(body: bytes) -> bytes:
    """The same without our fields; as it is if it has none."""
    return _LEFT_OVER.sub(b"", _OURS.sub(b"", body)) if b"'bootstrap_" in body else body
