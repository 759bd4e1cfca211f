"""One policy, three ways: in the virtual world, replayed here, and replayed by agentd in another process. The decisions are the same, to the bit."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import numpy as np
import pytest

from waveos import memory
from waveos.ipu_emulator import memory as model
from waveos.ipu_emulator.memory import SECOND, Setup, simulate
from waveos.ipu_emulator.memory.access import Moving
from waveos.ipu_emulator.memory.machine import load_costs
from waveos.ipu_emulator.profile import load_link
from waveos.link import open_link
from waveos.policy import load_policy
from waveos.policy.plain import PlainRuntime

DEADLINE_S = 60.0


class Recorder(PlainRuntime):
    """Keeps what the policy of a run was fed, and what it decided."""

    tapes: list[Recorder] = []

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.fed, self.decided = [], []
        Recorder.tapes.append(self)

    def feed(self, records):
        made = super().feed(records)
        self.fed.append(records.copy())
        self.decided.append(made.copy())
        return made


@pytest.fixture
def recorded(request, monkeypatch):
    """(stream, decisions) of a short run of that policy."""
    Recorder.tapes.clear()
    monkeypatch.setattr(model, "PlainRuntime", Recorder)
    access = Moving(1_024, 0.3, 20 * SECOND, 1e-4, True, 1)
    simulate(Setup(request.param, access, load_costs("zram", Path()), load_link("mount-evans"), batches=1_024, workers=1, duration_ns=50 * SECOND))
    tape = max(Recorder.tapes, key=lambda each: sum(map(len, each.decided)))  # the others are what warms up
    return request.param, np.concatenate(tape.fed), np.concatenate(tape.decided)


@pytest.mark.parametrize("recorded", ["sol", "region_age", "clock", "psi_backoff"], indirect=True)
def test_a_recorded_stream_is_decided_alike_in_the_model_in_a_replay_and_by_agentd(recorded):
    policy, stream, decided = recorded
    assert len(decided) > 1
    assert PlainRuntime(load_policy(policy)).feed(stream).tobytes() == decided.tobytes()
    with open_link(f"shm://test-{os.getpid()}-{secrets.token_hex(4)}", side="host", subsystem=memory) as host:
        host.start_wave_agent(policy, "--replay")
        host.await_agent(DEADLINE_S)
        taken, sent, end = [], 0, time.monotonic() + DEADLINE_S
        while sum(map(len, taken)) < len(decided):
            assert time.monotonic() < end, "not all decisions came"
            if sent < len(stream):
                sent += host.send_messages(stream[sent : sent + 512])
            taken.append(host.poll_txns(wait_ns=100_000).copy())
        assert np.concatenate(taken).tobytes() == decided.tobytes()
