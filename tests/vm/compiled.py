"""What agents and relays in a guest run, compiled out here for no processor in particular: in there it would take minutes, and is found in the cache."""

from __future__ import annotations

import os
import tempfile

import numpy as np

from waveos import memory, sched
from waveos.agents import agentd
from waveos.link import open_link
from waveos.policy import load_policy
from waveos.sched.laws import make_runtime

POLICIES = ("fifo", "shinjuku")
THREADS = 4_096

for name in POLICIES:
    bound = load_policy(name).bind(n_cpus=1, params={})
    make_runtime(bound, cpus=1, threads=THREADS, ahead=1)
agentd._compile()
with tempfile.NamedTemporaryFile() as device:
    os.truncate(device.name, 1 << 20)
    for url, subsystem in ((f"bar://{device.name}", sched), (f"shm://compiled-{os.getpid()}", sched), (f"shm://compiled-{os.getpid()}", memory)):
        with open_link(url, side="host", subsystem=subsystem) as host, open_link(url, side="agent", subsystem=subsystem) as agent:
            for link in (host, agent):
                link.check()
            host.await_agent()
            host.send_messages(np.zeros(1, subsystem.MESSAGE))
            agent.poll_messages(wait_ns=1)
            agent.txn_create()
            agent.txns_commit()
            host.poll_txns(wait_ns=1)
            if hasattr(host, "room"):
                host.room(n=1_000), host.heartbeat(), host.overflowed(1)
