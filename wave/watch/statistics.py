"""The statistics of the daemons, each of which describes itself: name, type, unit, meaning, and where in a status it is found.

Names are Prometheus's (a counter gets its `_total` there), units its base units. What means the same on `GET /metrics` of `wave serve` has the same name.
The page `docs/observe.md` and the exporter are made from this table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from waveos.meaning import Told

NS, MS, KIB, MIB = 1e-9, 1e-3, 1024.0, 1024.0**2


class Kind(Told):
    """What sort of figure it is."""

    GAUGE = 0, "goes up and down"
    COUNTER = 1, "only goes up; starts again at 0 with the daemon that counts"
    HISTOGRAM = 2, "how often something took so long: buckets whose edges are powers of two of a nanosecond"


@dataclass(frozen=True)
class Statistic:
    """One of them. `where` is a path into the document, its keys joined by dots, `*` for the sum over all keys; or label value -> path.

    Where the path leads to a table of figures, its keys become the values of `label`. A document without it has no such sample.
    """

    name: str
    kind: Kind
    unit: str  # "", "seconds" or "bytes"; the name ends with it
    meaning: str
    where: str | Mapping[str, str]
    label: str = ""
    factor: float = 1.0
    bins: int = 0  # of a histogram, to each power of two

    @property
    def exposed(self) -> str:
        """The name as Prometheus queries have it."""
        return self.name + ("_total" if self.kind is Kind.COUNTER else "")

    def values(self, document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(value of the label, figure or histogram) of all that the document has of it."""
        if isinstance(self.where, Mapping):
            for label, path in self.where.items():
                if (found := _dig(document, path.split("."))) is not None:
                    yield label, found
            return
        found = _dig(document, self.where.split("."))
        if isinstance(found, dict) and self.label:
            yield from ((str(key), value) for key, value in found.items())
        elif found is not None:
            yield "", found


def _dig(value: Any, path: list[str]) -> Any:
    """What lies there, or None."""
    if not path:
        return value
    if not isinstance(value, Mapping):
        return None
    if path[0] == "*":
        found = [each for inner in value.values() if (each := _dig(inner, path[1:])) is not None]
        return sum(found)
    return _dig(value.get(path[0]), path[1:])


def _gauge(name: str, meaning: str, where: str | Mapping[str, str], unit: str = "", label: str = "", factor: float = 1.0) -> Statistic:
    return Statistic(name, Kind.GAUGE, unit, meaning, where, label, factor)


def _counter(name: str, meaning: str, where: str | Mapping[str, str], unit: str = "", label: str = "", factor: float = 1.0) -> Statistic:
    return Statistic(name, Kind.COUNTER, unit, meaning, where, label, factor)


def _histogram(name: str, meaning: str, where: str, bins: int = 4) -> Statistic:
    return Statistic(name, Kind.HISTOGRAM, "seconds", meaning, where, factor=NS, bins=bins)


HOSTD = (
    _gauge("wave_agent_attached", "1 while an agent decides for the enclave, 0 while the kernel's own policy holds", "attached"),
    _gauge("wave_agent_attached_seconds", "For how long the present agent has decided", "agent.for_s", "seconds"),
    _counter("wave_agent_attachments", "Times that an agent came, or a policy was changed", "attachments"),
    _counter("wave_agents_lost", "Times that the agent went away, by itself or because it was silent", "agents_lost"),
    _counter("wave_agents_refused", "Would-be agents that were shown out: a user who may not, or one too many", "agents_refused"),
    _gauge("wave_hostd_uptime_seconds", "Since hostd began", "hostd.up_s", "seconds"),
    _counter("wave_hostd_cpu_seconds", "CPU time of hostd", "hostd.cpu_ns", "seconds", factor=NS),
    _counter(
        "wave_hostd_page_faults",
        "Page faults of hostd since it locked its memory; each is a pause of the loop that enforces",
        {"minor": "hostd.page_faults", "major": "hostd.page_faults_from_disk"},
        label="kind",
    ),
    _counter("wave_hostd_wakeups", "Times that hostd's loop woke up", "hostd.wakeups"),
    _gauge("wave_hostd_journal_entries", "Changes to the machine that hostd would put back now", "hostd.journal"),
    _counter(
        "wave_link_records",
        "Records of 64 bytes between host and agent",
        {"to_agent": "counters.messages", "to_host": "counters.decisions"},
        label="direction",
    ),
    _counter("wave_link_overflows", "Messages that found the queue full; the agent then gets the whole state anew", "counters.overflow"),
    _counter("wave_decisions", "Transactions of the agent, by what became of them", "counters.outcomes", label="outcome"),
    _histogram(
        "wave_decision_round_trip_seconds", "From the event to the act: decisions for a CPU that waited or was preempted", "counters.round_trip_ns"
    ),
    _histogram("wave_decision_staleness_seconds", "Age of the state behind a decision when it was committed, prestaged ones too", "counters.age_ns"),
    _histogram("wave_decision_enforcement_seconds", "The host's part of the round trip: from decided to committed", "counters.enforced_ns"),
    _counter("wave_strays", "Times that the kernel ran a thread before a decision said so", "counters.strays"),
    _counter("wave_deviations", "Times that the kernel ran another thread than the one decided", "counters.deviations"),
    _counter("wave_hostd_acts", "Times that hostd had to step in to enforce a decision", "counters.acts"),
    _counter("wave_fallbacks", "Times that the kernel's side gave the agent up and went on by itself", "counters.fallbacks"),
    _gauge(
        "wave_threads",
        "Threads of the enclave: all of them, on a CPU, waiting for one, and children that could not be taken in",
        {"all": "counters.threads", "running": "counters.running", "runnable": "counters.queued.runnable", "outside": "counters.outside"},
        label="state",
    ),
    _gauge("wave_staged_decisions", "Decisions that wait in the host for their CPU", "counters.queued.staged"),
    _gauge("wave_enclave_governed", "1 while the members have Wave's attributes, 0 once they are the kernel's default again", "counters.governed"),
    # memory
    _counter("wave_memory_passes", "Looks at all pages", "counters.passes"),
    _counter("wave_memory_advised_bytes", "Memory that decisions moved, by advice", "counters.advised_kib", "bytes", "advice", KIB),
    _counter("wave_memory_cpu_seconds", "CPU time of the mechanism, by what for", "counters.cpu_ms", "seconds", "part", MS),
    _gauge("wave_memory_processes", "Processes of the enclave", "counters.processes"),
    _gauge("wave_memory_limit_bytes", "The limit that the agent has set; 0: the operator's own", "counters.limit_mib", "bytes", factor=MIB),
    _gauge("wave_memory_resident_bytes", "Memory of the enclave that is resident", "counters.regions.*.resident_mib", "bytes", factor=MIB),
    _gauge("wave_memory_swap_bytes", "Memory of the enclave that is in swap", "counters.regions.*.swap_mib", "bytes", factor=MIB),
    _counter("wave_memory_replays", "Times that the agent's queue was full and the whole state was sent anew", "counters.replays_after_loss"),
    _counter("wave_agent_silences", "Times that the agent gave no sign of life for too long", "counters.silences"),
    # net
    _gauge("wave_net_serving", "1 while an agent steers packets, 0 while they take the kernel's path", "counters.serving"),
    _gauge("wave_net_workers_gone", "Workers that have ended", "counters.workers_gone"),
    _counter(
        "wave_net_packets",
        "Packets of the data path, by what became of them",
        {
            each: f"counters.{each}"
            for each in (
                *("requests", "replies", "steered", "shed", "malformed", "unknown_class", "no_slot", "lost", "late", "refused"),
                *("over_rate", "by_table"),
            )
        },
        label="event",
    ),
    _counter("wave_net_cuts", "Times that a wire was cut", "counters.cuts"),
)
"""Of an enclave, as its hostd tells; label `enclave`."""

AGENT = (
    _counter("wave_agent_messages", "Messages that the agent has taken in since it joined", "messages"),
    _counter("wave_agent_decisions", "Decisions that it has sent", "decisions"),
    _counter("wave_agent_batches", "Batches of messages after which its policy was asked", "batches"),
    _counter("wave_agent_doorbells", "Times that it rang the host's doorbell", "rings"),
    _gauge("wave_agent_waiting_threads", "Runnable threads in the policy's hands", "waiting"),
    _counter("wave_agent_dropped", "Threads that left while the policy held them", "dropped"),
    _counter("wave_agent_restaged", "Staged threads that were offered to a CPU that fell idle", "restaged"),
    _counter("wave_agent_redelivered", "Threads that came back after a failed transaction", "redelivered"),
    _counter(
        "wave_agent_unserved", "Batches after which a CPU idled while the policy held a thread; more than 0 is a fault of the policy", "unserved"
    ),
    _histogram(
        "wave_agent_event_seconds",
        "The first part of the round trip: from the host's clock in a message to its being read (with --measure)",
        "event_ns",
        256,
    ),
    _histogram("wave_agent_decide_seconds", "The agent's part: from reading a batch to having sent its decisions (with --measure)", "decide_ns", 256),
    _counter("wave_relay_losses", "Times that a relay lost its agent on the other machine, or hostd", "losses"),
)
"""Of an enclave, as its agent tells; labels `host` (empty: this one) and `enclave`."""

AGENTD = (
    _gauge("wave_agentd_enclaves", "Enclaves that this agentd serves now", "serving"),
    _gauge("wave_agentd_uptime_seconds", "Since agentd began", "up_s", "seconds"),
    _counter("wave_agentd_cpu_seconds", "CPU time of agentd; it polls, so near one core is its normal state", "cpu_ns", "seconds", factor=NS),
)
"""Of a process agentd; label `agentd`, its socket."""

UP = _gauge("wave_hostd_up", "1 if the enclave's hostd answers, 0 if not", "up")
AGENTD_UP = _gauge("wave_agentd_up", "1 if the agentd answers at its socket, 0 if not", "up")
INFO = _gauge("wave_enclave_info", "1; what the enclave is, in labels: subsystem, mechanism, cpus, policy", "enclave")

NOT_EXPORTED = {
    "enclave": "a label",
    "subsystem": "in wave_enclave_info",
    "mechanism": "in wave_enclave_info",
    "cpus": "in wave_enclave_info",
    "policy": "in wave_enclave_info",
    "members": "a text: processes come and go",
    "params": "the policy's parameters: see `wave status`",
    "pid": "changes with each start",
    "start": "likewise",
    "uid": "a number that means nothing to Prometheus",
    "far": "an address",
    "report": "the agent's part",
    "on_cpus": "what each CPU does this moment: `wave top`",
    "ended_by_kernel": "a text",
    "sensor": "a text",
    "batches": "of a region of memory: their sum says nothing",
    "live": "said by wave_agent_attached",
}
"""Keys of a status that are no statistic, and why."""


def everything() -> tuple[Statistic, ...]:
    """All statistics, each once."""
    return (UP, INFO, *HOSTD, *AGENT, AGENTD_UP, *AGENTD)


def labels_of(statistic: Statistic) -> tuple[str, ...]:
    """The names of its labels, in their order."""
    if statistic is INFO:
        return ("enclave", "subsystem", "mechanism", "cpus", "policy")
    first = ("host", "enclave") if statistic in AGENT else ("agentd",) if statistic in AGENTD or statistic is AGENTD_UP else ("enclave",)
    return (*first, *((statistic.label,) if statistic.label else ()))
