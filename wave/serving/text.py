"""Text as tokens: a token is a byte, and a few beyond mark who speaks. What the reference model says is printable ASCII, so a token of it is a character."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

BYTES = 256
BEGIN = BYTES
ROLES = {"system": BYTES + 1, "developer": BYTES + 1, "user": BYTES + 2, "assistant": BYTES + 3, "tool": BYTES + 4}
VOCABULARY = BYTES + 8


def encode(text: str) -> list[int]:
    """The tokens of a prompt."""
    return [BEGIN, *text.encode()]


def encode_chat(messages: Sequence[tuple[str, str]]) -> list[int]:
    """The tokens of a conversation of (role, text), up to where the assistant is to speak."""
    tokens = [BEGIN]
    for role, text in messages:
        tokens += [ROLES[role], *text.encode()]
    return [*tokens, ROLES["assistant"]]


def decode(tokens: Sequence[int]) -> str:
    """Their text; marks have none."""
    return bytes(token for token in tokens if token < BYTES).decode(errors="replace")


def name_blocks(tokens: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """(ids, sizes) of a prompt's blocks: an id stands for all tokens up to its end."""
    keys, sizes, digest = [], [], hashlib.blake2b(digest_size=8)
    for begin in range(0, len(tokens), size):
        block = tokens[begin : begin + size]
        digest.update(np.array(block, "<i4").tobytes())
        keys.append(int.from_bytes(digest.copy().digest(), "little") >> 1 or 1)
        sizes.append(len(block))
    return keys, sizes
