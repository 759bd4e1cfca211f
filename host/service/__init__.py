"""A RocksDB service for live scheduling: worker processes that block until there is a request, and an open-loop client that wakes them.

`Service` is what benches use. The workers are processes that opened one database read-only, all on one CPU; a request is a line of shared memory and a
wake-up; nobody waits for replies, completion times are read from the memory afterwards.
"""

from waveos.host.service.board import Board
from waveos.host.service.client import Load, Served, draw_load
from waveos.host.service.service import Service, client_on

__all__ = ["Board", "Load", "Served", "Service", "client_on", "draw_load"]
