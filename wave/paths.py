"""Where Wave keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(part: str) -> Path:
    """`$XDG_CACHE_HOME/waveos/PART`, made if it is not there."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "waveos" / part
    path.mkdir(parents=True, exist_ok=True)
    return path
