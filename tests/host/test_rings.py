"""hostd's own rings, with the compiled ring of an agent at the other end."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from waveos import ring
from waveos.host.rings import Rings
from waveos.memory import DECISION, MESSAGE, SUBSYSTEM
from waveos.record import RECORD_WORDS, VERSION

CAPACITY = 8


class Agent:
    """The other side, as an agent maps it."""

    def __init__(self, rings, subsystem=SUBSYSTEM):
        self.c = ring.compiled()
        self.up, self.down = (np.frombuffer(mmap.mmap(fd, size), np.int64) for fd, size in rings.queues.values())
        self.up_own, self.down_own = (np.zeros(ring.OWN_WORDS, np.int64) for _ in range(2))
        self.joined = (
            self.c.join_consumer(self.up, self.up_own, VERSION, subsystem),
            self.c.join_producer(self.down, self.down_own, VERSION, subsystem),
        )

    def poll(self, n=100):
        out = np.zeros(n * RECORD_WORDS, np.int64)
        return out[: RECORD_WORDS * self.c.poll(self.up, self.up_own, out, n)].view(MESSAGE)

    def send(self, records):
        return self.c.send(self.down, self.down_own, records.view(np.int64), len(records))


@pytest.fixture
def rings():
    made = Rings(SUBSYSTEM, CAPACITY, CAPACITY)
    made.begin(7)
    yield made
    made.close()


def numbered(dtype, first, n):
    made = np.zeros(n, dtype)
    made["version"], made["subsystem"], made["type"], made["seq"] = VERSION, SUBSYSTEM, 1, np.arange(first, first + n)
    made["region"], made["first"] = -1, first
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["up", "down"]), st.integers(0, 2 * CAPACITY), st.integers(0, 2 * CAPACITY)), max_size=60))
def test_what_is_sent_arrives_once_in_order_and_what_has_no_room_is_counted(steps):
    rings = Rings(SUBSYSTEM, CAPACITY, CAPACITY)
    rings.begin(70_000)
    agent = Agent(rings)
    sent, taken, lost = {"up": 0, "down": 0}, {"up": 0, "down": 0}, {"up": 0, "down": 0}
    for way, n, limit in steps:
        records = numbered(MESSAGE if way == "up" else DECISION, sent[way], n)
        fitted = rings.send(records) if way == "up" else agent.send(records)
        assert fitted <= n
        sent[way] += fitted
        lost[way] += n - fitted
        got = agent.poll(limit) if way == "up" else rings.poll(DECISION, limit)
        assert got["seq"].tolist() == list(range(taken[way], taken[way] + len(got)))
        assert (got["mark"] == 0).all() and (got["region"] == -1).all()
        assert len(got) == min(limit, sent[way] - taken[way])
        taken[way] += len(got)
        assert sent[way] - taken[way] <= CAPACITY
    assert agent.c.overflowed(agent.up) == lost["up"]
    rings.close()


def test_an_older_agent_sees_that_its_time_is_over_and_takes_nothing_of_the_next_ones(rings):
    old = Agent(rings)
    rings.begin(8)
    rings.send(numbered(MESSAGE, 0, 3))
    assert old.c.restarted(old.up, old.up_own) and old.c.restarted(old.down, old.down_own)
    assert len(old.poll()) == 0
    old.send(numbered(DECISION, 0, 3))
    assert len(rings.poll(DECISION)) == 0
    new = Agent(rings)
    assert new.poll()["seq"].tolist() == [0, 1, 2]
    rings.retire()
    assert new.c.restarted(new.up, new.up_own)


def test_an_agent_of_another_subsystem_does_not_join(rings):
    assert Agent(rings, subsystem=1).joined == (ring.OTHER_SUBSYSTEM, ring.OTHER_SUBSYSTEM)


def test_signs_of_life_arrive(rings):
    agent = Agent(rings)
    assert rings.heartbeat_ns() == 0
    agent.c.beat(agent.down, 12_345)
    assert rings.heartbeat_ns() == 12_345


def test_an_agent_cannot_cut_the_memory_off(rings):
    for fd, size in rings.queues.values():
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size // 2)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size * 2)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, 1033, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 63 + CAPACITY * RECORD_WORDS), st.integers(-(2**63), 2**63 - 1)), max_size=20))
def test_whatever_an_agent_writes_into_the_memory_hostd_goes_on(scribbles):
    rings = Rings(SUBSYSTEM, CAPACITY, CAPACITY)
    rings.begin(3)
    agent = Agent(rings)
    for at, value in scribbles:
        agent.up[at], agent.down[at] = value, value
        assert 0 <= rings.send(numbered(MESSAGE, 0, 3)) <= 3
        assert len(rings.poll(DECISION)) <= CAPACITY
        rings.heartbeat_ns()
    rings.close()


def test_hostd_of_memory_brings_no_compiler_with_it():
    code = "import sys; import waveos.host.memory.hosted; sys.exit(bool({'numba', 'llvmlite', 'scipy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0
