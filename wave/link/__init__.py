"""Links: what joins a host and its agent. A URL names one, and its scheme's class is found in the entry-point group `waveos.links`.

    host = open_link("shm://demo", side="host")        # makes the queues
    agent = open_link("shm://demo", side="agent")      # in another process: attaches to them

`Link` is what every kind offers: the verbs of the Wave paper, in which records cross as NumPy arrays of the subsystem's 64-byte dtypes.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from waveos.errors import LinkError, MissingError
from waveos.names import nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Records = npt.NDArray[np.void]

GROUP = "waveos.links"
MESSAGES, TXNS = 0, 1
"""The two queues every link starts with: host to agent (messages and outcomes, in one order), and agent to host (transactions)."""


class Link(Protocol):
    """One side of a link. Arrays returned by a poll are the link's own buffer: they hold until the next poll of that queue.

    Each verb belongs to one side; on the other it raises LinkError, as all do when the link is lost: then `reattach` or close it.
    """

    url: str
    side: str
    subsystem: Any

    # The host's verbs.
    def send_messages(self, records: Records) -> int:
        """Send messages in order; how many fitted. The rest was not sent and is counted by `overflowed`: send RESYNC and the whole state next."""

    def set_txns_outcomes(self, outcomes: Records) -> int:
        """Answer transactions: outcomes take their place in the order of the messages; how many fitted."""

    def poll_txns(self, limit: int = ..., wait_ns: int = 0, queue: int = TXNS) -> Records:
        """Take up to `limit` transactions, waiting (actively) up to `wait_ns` for the first."""

    def prefetch_txns(self, queue: int = TXNS) -> bool:
        """Start loading the next transaction; True if one is there."""

    # The agent's verbs.
    def poll_messages(self, limit: int = ..., wait_ns: int = 0, queue: int = MESSAGES) -> Records:
        """Take up to `limit` records of the one stream of messages and outcomes."""

    def poll_txns_outcomes(self, queue: int = MESSAGES) -> Records:
        """The outcomes among the records of the last `poll_messages`, as the subsystem's OUTCOME dtype."""

    def txn_create(self, n: int = 1) -> Records:
        """n new transactions to fill in, zero but for version, subsystem and number (`txn`)."""

    def txns_commit(self, queue: int = TXNS) -> int:
        """Send all transactions created since the last commit; how many fitted."""

    # Set-up, the host's.
    def create_queue(self, kind: str, capacity: int) -> int:
        """Make another queue of `kind` "messages" or "txns"; its number."""

    def destroy_queue(self, queue: int) -> None:
        """Take a queue out of service; its other side gets a LinkError."""

    def assoc_queue_with(self, queue: int, cpu: int) -> None:
        """Send messages about that CPU to that queue from now on."""

    def start_wave_agent(self, policy: str, *arguments: str) -> int:
        """Start an agent for this link that runs the policy; its pid."""

    def kill_wave_agent(self) -> None:
        """Stop this link's agent, in the end by force."""

    # Either side's.
    def overflowed(self, queue: int = MESSAGES) -> int:
        """How many records found that queue full since it was made."""

    def peer_alive(self) -> bool:
        """True while the other side is attached and lives."""

    def peer_joins(self) -> int:
        """How often a peer has attached: a host that sees it rise has a new agent, and sends RESYNC and its state."""

    def reattach(self) -> None:
        """Agent: attach anew after the host restarted."""

    def close(self) -> None:
        """Detach; the host's side ends the link."""


def open_link(url: str, side: str = "host", subsystem: Any = None, **options: Any) -> Link:
    """Open one side ("host" or "agent") of the link that `url` names, for a subsystem (default `waveos.sched`).

    `options` are those of the link's class. Raises LinkError if the link cannot be opened, MissingError if a part it needs is not installed.
    """
    scheme, separator, _ = url.partition("://")
    kinds = {entry.name: entry for entry in entry_points(group=GROUP)}
    if not separator:
        raise LinkError(f"{url!r} names no link: write SCHEME://NAME, for example shm://demo; schemes: {', '.join(sorted(kinds))}")
    if scheme not in kinds:
        raise LinkError(f"no link {scheme!r} for {url!r}{nearest(scheme, kinds)}; known: {', '.join(sorted(kinds))}")
    if side not in ("host", "agent"):
        raise LinkError(f"a link has the sides 'host' and 'agent', not {side!r}{nearest(side, ('host', 'agent'))}")
    if subsystem is None:
        from waveos import sched as subsystem
    try:
        kind = kinds[scheme].load()
    except ImportError as error:
        raise MissingError(f"the link {scheme!r} needs {error.name or kinds[scheme].value}, which is not installed: {error}") from error
    link: Link = kind(url, side=side, subsystem=subsystem, **options)
    return link
