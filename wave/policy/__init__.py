"""What the author of a policy imports: the class, the state it may declare, and the operations on that state.

from waveos.policy import Policy, ring, push, pop, size
"""

from __future__ import annotations

from waveos.jit import jitable_checked as jitable
from waveos.policy.bind import Bound
from waveos.policy.find import load_policy, policy_names
from waveos.policy.policy import Param, Policy
from waveos.policy.state import array, discard, heap, heap_key, heap_pop, heap_push, heaps, per_cpu, per_thread, pop, push, ring, rings, size

__all__ = [
    "Bound",
    "Param",
    "Policy",
    "array",
    "discard",
    "heap",
    "heap_key",
    "heap_pop",
    "heap_push",
    "heaps",
    "jitable",
    "load_policy",
    "per_cpu",
    "per_thread",
    "policy_names",
    "pop",
    "push",
    "ring",
    "rings",
    "size",
]
