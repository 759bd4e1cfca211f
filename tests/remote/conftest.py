"""Two machines that end with the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from waveos.keys import Keys

sys.path.insert(0, str(Path(__file__).parent))
from two_machines import Machines, free_port


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    host, dpu = Keys(tmp_path / "host"), Keys(tmp_path / "dpu")
    host.add("dpu", dpu.new().public)
    dpu.add("h1", host.new().public)
    made = Machines(host, dpu, free_port())
    try:
        yield made
    finally:
        for each in made.open:
            each.close()
        for process in reversed(made.processes):
            process.kill()
            process.communicate()
