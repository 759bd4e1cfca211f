"""Tests are imported by their path, so what lies beside them has to be told where it is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
