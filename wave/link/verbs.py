"""The verbs that are alike for every link which moves records through queues: checks, staging of transactions, the view of outcomes."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from waveos.errors import LinkError
from waveos.jit import jit
from waveos.link import MESSAGES, TXNS
from waveos.record import RECORD_WORDS, VERSION

Records = npt.NDArray[np.void]
Words = npt.NDArray[np.int64]
BATCH = 1_024
"""Most records a poll returns, and most transactions between two commits."""


class QueueVerbs:
    """A `Link` without its transport, which gives `_send(queue, records) -> fitted` and `_poll(queue, limit, wait_ns) -> records`."""

    def __init__(self, url: str, side: str, subsystem: Any) -> None:
        self.url, self.side, self.subsystem = url, side, subsystem
        self._message, self._outcome, self._decision = subsystem.MESSAGE, subsystem.OUTCOME, subsystem.DECISION
        self._outcome_type = subsystem.MESSAGE_TYPES["txn_outcome"]
        self._route: dict[int, int] = {}
        self._last: dict[int, Records] = {}
        self._staged: Records = np.zeros(BATCH, self._decision)
        self._staged_words: Words = self._staged.view(np.int64)
        self._first_word = VERSION << 32 | subsystem.SUBSYSTEM << 40
        self._txn_word = self._decision.fields["txn"][1] // 8
        self._created = 0
        self._next_txn = 1

    def _send(self, queue: int, records: Records) -> int:
        raise NotImplementedError

    def _poll(self, queue: int, limit: int, wait_ns: int) -> Records:
        raise NotImplementedError

    def send_messages(self, records: Records) -> int:
        """Send messages in order; how many fitted. What did not fit is counted: next send RESYNC and the whole state."""
        if self.side != "host":
            self._refuse("send_messages", "host")
        if records.dtype is not self._message and records.dtype != self._message:
            raise LinkError(f"messages are arrays of {self.subsystem.__name__}.MESSAGE, not of {records.dtype}")
        return self._route_records(records) if self._route else self._send(MESSAGES, records)

    def set_txns_outcomes(self, outcomes: Records) -> int:
        """Answer transactions, in one order with the messages; how many answers fitted."""
        if self.side != "host":
            self._refuse("set_txns_outcomes", "host")
        if outcomes.dtype is not self._outcome and outcomes.dtype != self._outcome:
            raise LinkError(f"outcomes are arrays of {self.subsystem.__name__}.OUTCOME, not of {outcomes.dtype}")
        return self._route_records(outcomes) if self._route else self._send(MESSAGES, outcomes)

    def poll_txns(self, limit: int = BATCH, wait_ns: int = 0, queue: int = TXNS) -> Records:
        """Take up to `limit` transactions, polling up to `wait_ns` for the first. The array holds until the next poll."""
        if self.side != "host":
            self._refuse("poll_txns", "host")
        return self._poll(queue, limit, wait_ns)

    def poll_messages(self, limit: int = BATCH, wait_ns: int = 0, queue: int = MESSAGES) -> Records:
        """Take up to `limit` messages and outcomes, polling up to `wait_ns` for the first. The array holds until the next poll."""
        if self.side != "agent":
            self._refuse("poll_messages", "agent")
        batch = self._last[queue] = self._poll(queue, limit, wait_ns)
        return batch

    def poll_txns_outcomes(self, queue: int = MESSAGES) -> Records:
        """The outcomes among the records of the last `poll_messages` of that queue."""
        if self.side != "agent":
            self._refuse("poll_txns_outcomes", "agent")
        last = self._last.get(queue, self._staged[:0].view(self._message))
        return np.ascontiguousarray(last[last["type"] == self._outcome_type]).view(self._outcome)

    def txn_create(self, n: int = 1) -> Records:
        """n new transactions to fill in: zero but for version, subsystem and number. They hold until `txns_commit`."""
        if self.side != "agent":
            self._refuse("txn_create", "agent")
        first, end = self._created, self._created + n
        if end > BATCH:
            raise LinkError(f"{end} transactions since the last commit; at most {BATCH} fit: call txns_commit")
        _stamp(self._staged_words, first, end, self._first_word, self._txn_word, self._next_txn)
        self._created, self._next_txn = end, self._next_txn + n
        return self._staged[first:end]

    def txns_commit(self, queue: int = TXNS) -> int:
        """Send the transactions created since the last commit; how many fitted. What did not is dropped and counted."""
        if self.side != "agent":
            self._refuse("txns_commit", "agent")
        n, self._created = self._created, 0
        return self._send(queue, self._staged[:n]) if n else 0

    def assoc_queue_with(self, queue: int, cpu: int) -> None:
        """Send messages about that CPU to that queue from now on; the order across queues is open."""
        if self.side != "host":
            self._refuse("assoc_queue_with", "host")
        self._route[cpu] = queue

    def _route_records(self, records: Records) -> int:
        queues = np.array([self._route.get(int(cpu), MESSAGES) for cpu in records["cpu"]])
        return sum(self._send(int(queue), records[queues == queue]) for queue in np.unique(queues))

    def _refuse(self, verb: str, side: str) -> NoReturn:
        raise LinkError(f"{verb} is the {side}'s; this is the {self.side}'s side of {self.url}")


@jit
def _stamp(words: Words, first: int, end: int, first_word: int, txn_word: int, txn: int) -> None:
    for k in range(first, end):
        words[k * RECORD_WORDS : (k + 1) * RECORD_WORDS] = 0
        words[k * RECORD_WORDS] = first_word
        words[k * RECORD_WORDS + txn_word] = txn + k - first
