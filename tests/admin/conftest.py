"""What the tests of administration share lies beside them, and tests are imported by their path: they have to be told where it is."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from stand_in import certificates, world

__all__ = ["certificates", "world"]
