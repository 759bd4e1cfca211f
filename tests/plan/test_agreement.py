"""The plan's break-even against a direct sweep of the agent's speed."""

import pytest

from waveos.bench import plan as bench
from waveos.bench.plan import crossing

SCENARIO = """\
name = "small"
[host]
workers = 4
threads = 256
[agent]
message_ns = 120
[workload]
loads_share = [0.3, 0.6]
[[workload.classes]]
name = "GET"
share = 0.99
service = { fixed_us = 8, exponential_us = 2 }
[[workload.classes]]
name = "RANGE"
share = 0.01
service = { fixed_us = 200 }
[policies]
names = ["shinjuku"]
[run]
duration_ms = 60
warmup_ms = 6
replications = 2
resolution_share = 0.02
[objective]
GET = { p99_us = 200 }
"""


@pytest.mark.slow
def test_a_direct_sweep_finds_the_same_break_even_within_a_tenth(tmp_path):
    (tmp_path / "small.toml").write_text(SCENARIO)
    found = bench.run(str(tmp_path / "small.toml"), speeds=5)["metrics"]
    assert found["difference_share"] <= 0.1, found


def test_a_crossing_is_where_the_line_first_reaches_the_level():
    assert crossing([0.1, 0.2, 0.4], [10, 20, 40], 20) == pytest.approx(0.2)
    assert crossing([0.1, 0.4], [10, 30], 20) == pytest.approx(0.2)
    assert crossing([0.1, 0.2], [10, 20], 30) == 0
    assert crossing([0.1, 0.2], [30, 40], 20) == 0
