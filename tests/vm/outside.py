"""What is outside a guest and joined to it: an agentd, in the memory that the guest has as the BAR of a PCI device (QEMU's ivshmem)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

BAR_BYTES = 1 << 20
POLICY = "fifo"


@contextlib.contextmanager
def joined_by_bar(wanted: bool) -> Iterator[tuple[str, ...]]:
    """QEMU's options for such a device, and an agent at its other end meanwhile; nothing if it is not wanted."""
    if not wanted:
        yield ()
        return
    with tempfile.NamedTemporaryFile(prefix="wave-bar-", dir="/dev/shm") as memory:
        os.truncate(memory.name, BAR_BYTES)
        agent = subprocess.Popen([sys.executable, "-P", "-m", "waveos.agents.agentd", f"bar://{memory.name}", POLICY, "--idle-us", "1"])
        try:
            backend = f"memory-backend-file,id=bar,share=on,mem-path={memory.name},size={BAR_BYTES}"
            yield "-object", backend, "-device", "ivshmem-plain,memdev=bar"
            if agent.poll() is not None:
                raise AssertionError(f"the agent outside ended, with status {agent.returncode}")
        finally:
            agent.terminate()
            agent.wait()
