"""Mechanism `sched_ext`: an enclave whose threads are of the kernel's extensible class (sched_ext.bpf.c has the idea)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from waveos.errors import ConfigError
from waveos.host.sched import attributes
from waveos.host.sched.governor import Governor
from waveos.host.sched.half import CPUS

OBJECT = Path(__file__).with_name("sched_ext.bpf.o")
ENDED = np.dtype([("kind", "u8"), ("reason", "S64"), ("message", "S192")])
VISITS = np.dtype([("n", "u8"), ("cpu", "u4", (CPUS,))])
OPS = Path("/sys/kernel/sched_ext/root/ops")


class SchedExt(Governor):
    """See `Mechanism` and `Governor`. While the agent is silent a FIFO queue in the kernel serves; after `default_ms` the scheduler is unregistered."""

    name = "sched_ext"
    _refusal = ""

    def __init__(self, enclave: Any, journal: Any, *, silent_ms: float = 20, default_ms: float = 1_000) -> None:
        if OPS.exists():
            raise ConfigError(f"this kernel is already governed by the sched_ext scheduler {OPS.read_text().strip()!r}: stop that one first")
        member = attributes.Attributes("EXT", flags=attributes.RESET_ON_FORK)
        super().__init__(enclave, journal, OBJECT, member, silent_ms, default_ms)
        try:
            self._bpf.section(".data").view(np.uint64)[0] = self._silent_ns
            self._visits: Any = self._bpf.section(".bss.visits")[: VISITS.itemsize].view(VISITS)[0]
            self._ended: Any = self._bpf.section(".bss.ended")[: ENDED.itemsize].view(ENDED)[0]
            self._bpf.attach("on_fork", "on_exit", "on_exec", "on_switch")
            self._scheduler: Any = self._bpf.struct_ops("wave_ops")
        except BaseException:
            self.close()
            raise

    def _enforce(self) -> None:
        """Have the CPUs look that have something to look at; where the kernel cannot kick them, be on each of them for a moment."""
        visits = self._attend.run()
        if visits:
            home = os.sched_getaffinity(0)
            for cpu in self._visits["cpu"][:visits].tolist():
                os.sched_setaffinity(0, {cpu})
            os.sched_setaffinity(0, home)

    def tick(self) -> None:
        """As any mechanism's; and the kernel may have ended the scheduler, say because a thread waited for half a minute."""
        if self._governed and self._ended["kind"]:
            self._refusal = b": ".join(filter(None, (self._ended["reason"], self._ended["message"]))).decode(errors="replace")
            self.agent_gone()
            self._let_be()
        super().tick()
        if self._governed and not self._half.live:
            self._enforce()

    def counters(self) -> dict[str, Any]:
        """As any mechanism's; `ended_by_kernel` is the kernel's reason for the last time it ended the scheduler, or empty."""
        return {**super().counters(), "ended_by_kernel": self._refusal}

    def _let_be(self) -> None:
        """No agent for long: unregister, and the kernel's default scheduler has the threads."""
        super()._let_be()
        self._scheduler.destroy()

    def _govern(self) -> None:
        """Register again, then take the members back."""
        self._ended["kind"] = 0
        self._scheduler = self._bpf.struct_ops("wave_ops")
        super()._govern()
