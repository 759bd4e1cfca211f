"""Names that people give: the nearest to one that is not known, and whether a policy's is a file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_POLICY_FILE = re.compile(r"(.+\.py)(?::(\w+))?")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def split_policy_file(name: str) -> tuple[str, str] | None:
    """(file, class or "") of `path/to/file.py` or `path/to/file.py:Class`; None for the name of an installed policy."""
    match = _POLICY_FILE.fullmatch(name)
    return (match[1], match[2] or "") if match else None
