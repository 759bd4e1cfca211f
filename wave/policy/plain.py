"""The runtime of plain policies: records in, decisions out, and nothing else, so that the virtual world, agentd and a replay run the same.

    runtime = PlainRuntime(load_policy("region_age"), {})
    decisions = runtime.feed(messages)

A subsystem whose policies are plain (`PLAIN = True`) offers, besides its records (MESSAGE, OUTCOME, DECISION), their types (MESSAGE_TYPES, DECISION_TYPES)
and HANDLERS:

- `SUBJECT`: the field that names what a record is about (a region, a request), in all three records; negative: nothing;
- `GONE`: the message types after which a subject's sequence number is forgotten;
- `redeliver(outcomes)`: decisions that failed, as messages, for policies without `txn_failed`;
- `OPENS`, where a stream has a beginning: the message type without which nothing else means anything. What comes before it, or before a RESYNC, was
  meant for an agent that died, and is not delivered.

It may have these types, whose meaning is the same everywhere: `txn_outcome`, `batch_end`, `resync` (required); `txn_failed`, `txn_committed`, `timer_expired`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from waveos.errors import PolicyError
from waveos.names import nearest
from waveos.outcome import Outcome
from waveos.policy.reason import last_line
from waveos.record import VERSION

if TYPE_CHECKING:
    from waveos.policy.policy import Policy

Records = npt.NDArray[np.void]

NEVER_NS = 1 << 62
ORDERS_AT_ONCE = 1 << 20
"""Decisions one call of a handler may order; a policy that floods is stopped with a clear error."""


class Txns:
    """What one policy orders: decisions, and to be woken. A handler's last argument."""

    def __init__(self, subsystem: Any) -> None:
        self._dtype, self._types = subsystem.DECISION, subsystem.DECISION_TYPES
        self.ordered: list[Records] = []
        self.wishes: dict[int, int] = {}  # delay by timer, counted from the end of this batch

    def order(self, decision: str, **fields: Any) -> None:
        """Order one decision of that type for each element of the fields; a number stands for as many as there are."""
        if decision not in self._types:
            raise ValueError(f"no decision {decision!r}{nearest(decision, self._types)}; there are: {', '.join(self._types)}")
        n = max((len(value) for value in fields.values() if np.ndim(value)), default=1)
        if n > ORDERS_AT_ONCE:
            raise OverflowError(f"{n} orders from one handler call; at most {ORDERS_AT_ONCE}")
        made = np.zeros(n, self._dtype)
        made["type"] = self._types[decision]
        for name, value in fields.items():
            made[name] = value
        if n:
            self.ordered.append(made)

    def wake_after(self, delay_ns: int, timer: int = 0) -> None:
        """Have timer_expired called `delay_ns` after this batch on the agent's clock, once; the message's `seq` is the timer's number. Again: moved."""
        self.wishes[timer] = int(delay_ns)


class PlainRuntime:
    """One policy with its state. What is fed decides what comes out: no clock, no randomness but the policy's seeds, no input or output.

    The runtime keeps the newest sequence number of each subject and stamps it on decisions, gives decisions their numbers, turns outcomes into
    `txn_failed`, `txn_committed` or what the subsystem redelivers, keeps timers, and begins anew on a RESYNC.
    """

    def __init__(self, policy: type[Policy], params: dict[str, float] | None = None, handling: Callable[[str], None] = lambda name: None) -> None:
        """`handling`: told the name of each handler before it is called, and "" after."""
        self.policy_class, self._handling = policy, handling
        self.subsystem: Any = policy.subsystem
        self._values = policy.param_values(params)
        self._names = {code: name for name, code in self.subsystem.MESSAGE_TYPES.items()}
        types = self.subsystem.MESSAGE_TYPES
        self._outcome, self._batch_end, self._resync = types["txn_outcome"], types["batch_end"], types["resync"]
        self._bulk = {name: _takes_many(handler) for name, handler in policy.handlers.items()}
        self._opens: int | None = getattr(self.subsystem, "OPENS", None)
        self._open = self._opens is None
        self._txn = 1
        self._made: list[Records] = []
        self._restart()

    def _restart(self) -> None:
        self.policy: Any = self.policy_class()
        for name, value in self._values.items():
            setattr(self.policy, name, value)
        self.now_ns = 0  # the agent's clock, as of the last BATCH_END
        self.host_ns = 0  # the host's, as of its newest message
        self._newest: dict[int, int] = {}
        self._timers: dict[int, int] = {}
        self._txns = Txns(self.subsystem)
        self._call("start", self.policy.start)

    @property
    def next_timer_ns(self) -> int:
        """When the first timer expires on the agent's clock; far in the future if none is set."""
        return min(self._timers.values(), default=NEVER_NS)

    def feed(self, records: Records) -> Records:
        """Give the policy these records, in order; what it decided, stamped, ready for the link. Raises PolicyError when a handler raises."""
        for code, run in _runs(records):
            if code == self._resync:
                self._open = True
                self._restart()
                continue
            self._open = self._open or code == self._opens
            if not self._open and code != self._batch_end:
                continue
            if code == self._outcome:
                self._note(run.view(self.subsystem.OUTCOME))
                self._settle(run.view(self.subsystem.OUTCOME))
            elif code == self._batch_end:
                for each in np.split(run, len(run)):
                    self._end_batch(each)
            else:
                self._note(run)
                self.host_ns = max(self.host_ns, int(run["time_ns"].max()))
                self._deliver(self._names.get(code, ""), run)
            if code in self.subsystem.GONE:
                for subject in run[self.subsystem.SUBJECT].tolist():
                    self._newest.pop(subject, None)
        made, self._made = self._made, []
        return np.concatenate(made) if made else np.zeros(0, self.subsystem.DECISION)

    def _note(self, run: Records) -> None:
        """Keep each subject's newest sequence number."""
        subjects, numbers = run[self.subsystem.SUBJECT], run["seq"]
        if len(run) > 1 and (subjects == subjects[0]).all():
            subjects, numbers = subjects[:1], numbers.max(keepdims=True)
        for subject, number in zip(subjects.tolist(), numbers.tolist(), strict=True):
            if subject >= 0 and number > self._newest.get(subject, -1):
                self._newest[subject] = number

    def _settle(self, outcomes: Records) -> None:
        """Tell the policy what became of its decisions, in the order in which they were answered."""
        types, handlers = self.subsystem.MESSAGE_TYPES, self.policy_class.handlers
        failed = outcomes["outcome"] != Outcome.COMMITTED
        edges = np.flatnonzero(np.diff(failed)) + 1
        for part in np.split(outcomes, edges):
            name = "txn_failed" if part["outcome"][0] != Outcome.COMMITTED else "txn_committed"
            if name in handlers:
                told = part.copy()
                told["type"] = types[name]
                self._deliver(name, told)
            elif name == "txn_failed":
                for code, run in _runs(self.subsystem.redeliver(part)):
                    self._deliver(self._names[code], run)

    def _end_batch(self, end: Records) -> None:
        self.now_ns = int(end["time_ns"][0])
        self._set_timers()
        self._deliver("batch_end", end)
        for timer in sorted(number for number, due_ns in self._timers.items() if due_ns <= self.now_ns):
            del self._timers[timer]
            told = np.zeros(1, self.subsystem.MESSAGE)
            told["type"], told["seq"], told["time_ns"], told[self.subsystem.SUBJECT] = (
                self.subsystem.MESSAGE_TYPES["timer_expired"],
                timer,
                self.now_ns,
                -1,
            )
            self._deliver("timer_expired", told)
        self._set_timers()

    def _set_timers(self) -> None:
        for timer, delay_ns in self._txns.wishes.items():
            self._timers[timer] = self.now_ns + delay_ns
        self._txns.wishes.clear()

    def _deliver(self, name: str, run: Records) -> None:
        """Call the handler for a run of records of one type: with all of them, or with one after the other."""
        if name not in self.policy_class.handlers:
            return
        handler = getattr(self.policy, name)
        if self._bulk[name]:
            self._call(name, handler, run.copy(), run)  # the handler may keep it: the link reuses its own
        else:
            for row in run:
                self._call(name, handler, SimpleNamespace(**dict(zip(run.dtype.names or (), row.item(), strict=True))), run)

    def _call(self, name: str, function: Any, message: Any = None, run: Records | None = None) -> None:
        self._handling(name)
        try:
            function() if message is None else function(message, self._txns)
            self._take()
        except PolicyError:
            raise
        except Exception as error:
            raise PolicyError(
                f"policy {self.policy_class.name!r}: {name} raised {last_line(error, self.policy_class)}{_about(message, run)}"
            ) from error
        finally:
            self._handling("")

    def _take(self) -> None:
        """Stamp what a handler ordered."""
        for made in self._txns.ordered:
            made["version"], made["subsystem"], made["time_ns"] = VERSION, self.subsystem.SUBSYSTEM, self.host_ns
            made["decided_ns"] = self.now_ns
            made["txn"] = np.arange(self._txn, self._txn + len(made))
            self._txn += len(made)
            subjects, inverse = np.unique(made[self.subsystem.SUBJECT], return_inverse=True)
            made["seq"] = np.array([self._newest.get(subject, -1) for subject in subjects.tolist()])[inverse]
            self._made.append(made)
        self._txns.ordered = []


def _runs(records: Records) -> Iterator[tuple[int, Records]]:
    """(type, records) for each run of consecutive records of one type."""
    types = records["type"]
    edges = [0, *(np.flatnonzero(types[1:] != types[:-1]) + 1).tolist(), len(records)]
    for begin, end in itertools.pairwise(edges):
        if end > begin:
            yield int(types[begin]), records[begin:end]


def _takes_many(handler: Any) -> bool:
    return bool(handler.__code__.co_varnames[1] == "msgs")


def _about(message: Any, run: Records | None) -> str:
    """The message a handler raised on, as words; of many, the first."""
    if message is None or run is None:
        return ""
    if isinstance(message, SimpleNamespace):
        fields, more = vars(message), ""
    else:
        fields, more = dict(zip(run.dtype.names or (), run[0].item(), strict=True)), f" and {len(run) - 1} more" if len(run) > 1 else ""
    told = ", ".join(f"{name}={value}" for name, value in fields.items() if name not in ("mark", "version", "subsystem", "type"))
    return f"; the message: {told}{more}"
