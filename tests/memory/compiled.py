"""What the agent of a memory enclave runs in a guest, compiled out here for no processor in particular: in there it would take minutes."""

from __future__ import annotations

import os

import numpy as np

from waveos import memory
from waveos.link import open_link

with open_link(f"shm://compiled-{os.getpid()}", side="host", subsystem=memory) as host:
    agent = open_link(host.url, side="agent", subsystem=memory)
    host.send_messages(np.zeros(1, memory.MESSAGE))
    agent.poll_messages(1)
    agent.txn_create(1)
    agent.txns_commit()
    host.poll_txns()
    agent.check()
    agent.close()
