"""A wire of its own for a module; skipped where there can be none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from wire import why_not

REASON = why_not()


@pytest.fixture(scope="module")
def net() -> Iterator[object]:
    """A network of its own, up for a module."""
    if REASON:
        pytest.skip(REASON)
    from waveos.host.net import topology

    with topology.network(f"test-xsk-{os.getpid()}") as made:
        yield made
