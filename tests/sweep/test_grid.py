"""The grid of a sweep: what the values after `--grid` mean, and what is refused."""

import pytest

from waveos.errors import ConfigError
from waveos.grid import MOST_POINTS, parse_grid


def test_every_combination_is_a_point_and_the_last_key_varies_fastest():
    grid = parse_grid(["host.workers=4,8", "agent.speed=0.5,1"])
    assert grid.points() == [{"host.workers": w, "agent.speed": s} for w in (4, 8) for s in (0.5, 1)]
    assert (len(grid), grid.keys) == (4, ["host.workers", "agent.speed"])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("link.profile=cxl,mount-evans", ["cxl", "mount-evans"]),
        ('link.profile="cxl","on-host"', ["cxl", "on-host"]),
        ("access.scrambled=true,false", [True, False]),
        ("policies.names=fifo,shinjuku", [["fifo"], ["shinjuku"]]),
        ('link.mitigations=[],["wb"]', [[], ["wb"]]),
        ("link.mitigations=[[], ['wb', 'prestage']]", [[], ["wb", "prestage"]]),
        ("run.seed=7", [7]),
        ("run.seed= 1 , 2 ", [1, 2]),
    ],
)
def test_values_are_written_as_after_set(text, values):
    assert list(parse_grid([text]).values.values()) == [values]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["host.workers"], "--grid host.workers: wants a key and its values"),
        (["host.workers="], "--grid host.workers=: wants a key and its values"),
        (["host.workers=[]"], "--grid host.workers=[]: wants a key and its values"),
        (["host.workers=4,,8"], "--grid host.workers=4,,8: wants a key and its values"),
        (["=4"], "--grid =4: wants a key and its values"),
        ([], "the grid is empty"),
        (["run.seed=1", "run.seed=2"], "run.seed is there twice"),
        (["run.seed=1,2,1"], "the value 1 is there twice"),
        ([f"run.seed={','.join(map(str, range(400)))}", f"host.workers={','.join(map(str, range(400)))}"], f"at most {MOST_POINTS:,} can be swept"),
    ],
)
def test_what_is_no_grid_is_one_line(texts, told):
    with pytest.raises(ConfigError) as refused:
        parse_grid(texts)
    assert told in str(refused.value)
