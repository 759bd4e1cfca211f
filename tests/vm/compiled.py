"""What agents in a guest run, compiled out here for no processor in particular: in there it would take minutes, and is found in the cache."""

from __future__ import annotations

from waveos.agents import agentd
from waveos.policy import load_policy
from waveos.sched.laws import make_runtime

POLICIES = ("fifo", "shinjuku")
THREADS = 4_096

for name in POLICIES:
    bound = load_policy(name).bind(n_cpus=1, params={})
    make_runtime(bound, cpus=1, threads=THREADS, ahead=1)
agentd._compile()
