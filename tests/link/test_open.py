"""Finding a link's class by the scheme of its URL."""

from __future__ import annotations

import pytest

from waveos.errors import LinkError
from waveos.link import open_link


def test_an_unknown_scheme_gets_the_nearest_one():
    with pytest.raises(LinkError, match=r"no link 'smh' .*did you mean 'shm'"):
        open_link("smh://demo")


def test_a_name_without_a_scheme_is_told_how_to_write_it():
    with pytest.raises(LinkError, match="for example shm://demo"):
        open_link("demo")


def test_a_side_is_host_or_agent():
    with pytest.raises(LinkError, match=r"not 'hots' \(did you mean 'host'\?\)"):
        open_link("shm://demo", side="hots")
