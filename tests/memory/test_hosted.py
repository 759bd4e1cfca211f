"""What an operator may set of memory's hostd."""

from __future__ import annotations

import pytest

from waveos.errors import ConfigError
from waveos.host.memory import hosted
from waveos.host.settings import Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_kib", 2.5),
        ("batch_kib", 0),
        ("batch_kib", 3),
        ("batch_kib", 10**18),
        ("pass_ms", -1),
        ("pass_ms", float("nan")),
        ("quota_mib_per_s", -5),
        ("quota_mib_per_s", 1e300),
        ("stall_share", 1.5),
        ("silent_s", 0),
        ("silent_s", float("inf")),
        ("pass_s", 3),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_before_anything_is_changed(name, value):
    told = Settings.model_validate({"enclave": "x", "subsystem": "memory", "cgroup": "/x", "policy": "sol", "settings": {name: value}})
    with pytest.raises(ConfigError, match=rf"^memory's settings: {name}: .*(wants|the key is) [^\n]*$"):
        hosted.make(told, None, None, print)
