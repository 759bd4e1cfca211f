"""The host of the memory model: page batches, what accesses do to them, and the host's half of the contract.

A batch has so many resident pages; an access to another page of it is a fault. All of it is arrays over batches, so that 256 GiB in batches of 256 KiB
take some 20 ms a step.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from waveos.errors import ConfigError
from waveos.ipu_emulator.memory.access import Access
from waveos.memory import DECISION_TYPES, GROUP, MESSAGE, OUTCOME, Decision, Message
from waveos.names import nearest
from waveos.outcome import Outcome
from waveos.record import VERSION

PAGE_BYTES = 4_096
REGION = 0
_DATA = Path(__file__).parent.parent / "data" / "memory"
_Ns = Annotated[float, Field(ge=0)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PageCosts(_Table):
    """By page of 4 KiB."""

    scan_ns: _Ns
    touch_ns: _Ns
    reclaim_ns: _Ns
    fault_ns: _Ns
    read_ns: _Ns
    minor_ns: _Ns
    compressed_share: Annotated[float, Field(ge=0, le=1)]


class HostCosts(_Table):
    """By decision."""

    record_ns: _Ns
    call_ns: _Ns


class Costs(_Table):
    """What memory management costs a host: a TOML file with `source` and `verified`."""

    name: str
    verified: bool
    source: str
    page: PageCosts
    host: HostCosts


def load_costs(name: str, base: Path) -> Costs:
    """By name, or by path of a TOML file relative to `base`. Raises ConfigError."""
    known = sorted(path.stem for path in _DATA.glob("*.toml"))
    path = base / name if name.endswith(".toml") else _DATA / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"memory.costs: no costs {name!r}{nearest(name, known)}; there are: {', '.join(known)}; or give a path ending in .toml")
    try:
        return Costs.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}" if first else str(error)
        raise ConfigError(f"{path}: {why}") from None


class Machine:
    """One process of `batches` batches with `pages` pages each, its workers, and the mechanism that acts on it."""

    def __init__(self, access: Access, costs: Costs, *, batches: int, pages: int, workers: int, get_ns: float, seed: int) -> None:
        self.access, self.costs, self.batches, self.pages = access, costs, batches, pages
        self.workers, self.get_ns = workers, get_ns
        self._padded = -(-batches // GROUP) * GROUP
        self._rng = np.random.default_rng(seed)
        self.resident = np.full(batches, pages, np.int16)
        self._since = np.zeros(batches, np.float32)  # accesses since the policy's last scan
        self._young = np.zeros(batches, bool)  # accessed since the kernel's own hand passed
        self._changed = np.zeros(batches, np.int64)  # the region's sequence number at the last change of each batch
        self._refaulted = np.zeros(batches, bool)  # came back since that was last told
        self._cached = np.zeros(batches, np.int16)  # pages read ahead of the fault that maps them
        self.seq = 1
        self.limit_pages, self._hand = 0, 0
        self.host_ns = {"scan": 0.0, "reclaim": 0.0, "decisions": 0.0}  # CPU time of the mechanism
        self.gets = self.faults = self.stall_ns = self.told_stall_ns = self.refault_pages = self.told_refault_pages = 0.0
        self.answered = dict.fromkeys((each.name.lower() for each in Outcome), 0)

    # What the workers do.

    def advance(self, now_ns: int, step_ns: int) -> tuple[float, float]:
        """Serve GETs for a step that begins now. Returns (GETs served, faults among them)."""
        rates = self.access.rates(now_ns)
        wanted = self.workers * step_ns / self.get_ns
        mean = rates * np.float32(wanted)
        much = mean > 12  # there, every step accesses the batch, and Poisson is as good as its mean
        accesses = np.where(much, mean, 0).astype(np.float32)
        few = ~much
        accesses[few] = self._rng.poisson(mean[few])
        hit = accesses > 0
        missing = np.flatnonzero(hit & (self.resident < self.pages))
        stall_ns = 0.0
        faults = 0.0
        if len(missing):
            touched = 1 - np.exp(-accesses[missing] / self.pages)
            came = self._rng.binomial(self.pages - self.resident[missing], touched).astype(np.int16)
            some = came > 0
            back = missing[some]
            minor = np.minimum(came[some], self._cached[back])
            self._cached[back] -= minor
            self.resident[back] += came[some]
            faults = float(came.sum())
            minor_faults = float(minor.sum())
            stall_ns = (faults - minor_faults) * self.costs.page.fault_ns + minor_faults * self.costs.page.minor_ns
            self._refaulted[back] = True
            self.refault_pages += faults - minor_faults
            self.seq += 1
            self._changed[back] = self.seq
        self._since += accesses
        self._young |= hit
        if self.limit_pages:
            stall_ns += self._reclaim_to_limit()  # the worker whose fault goes over the limit reclaims by itself
        busy_ns = wanted * self.get_ns + stall_ns + self._walks_ns
        self._walks_ns = 0.0
        served = wanted * self.workers * step_ns / busy_ns
        self.gets += served
        self.faults += faults
        self.stall_ns += stall_ns * served / wanted / self.workers
        return served, faults

    _walks_ns = 0.0  # page walks after scans, which the workers' next accesses pay

    @property
    def resident_pages(self) -> int:
        return int(self.resident.sum())

    @property
    def footprint_pages(self) -> float:
        """Resident, and what swap takes of memory."""
        resident = self.resident_pages + int(self._cached.sum())
        return resident + self.costs.page.compressed_share * (self.batches * self.pages - resident)

    def reclaim_now(self, cold: Any) -> None:
        """Free all pages of these batches: the oracle's act."""
        here = np.flatnonzero(cold & (self.resident > 0))
        self.host_ns["reclaim"] += float(self.resident[here].sum()) * self.costs.page.reclaim_ns
        self._take(here)

    # What the mechanism tells.

    def introduce(self, now_ns: int) -> Any:
        """The region, as the host tells a new agent."""
        told = _message(Message.REGION_MAPPED, now_ns, self.seq)
        told["count"], told["bytes"] = self.batches, self.pages * PAGE_BYTES
        return told

    def tell_refaults(self, now_ns: int) -> Any:
        """Batches that came back since the last call, as messages."""
        words = self._words(self._refaulted)
        groups = np.flatnonzero(words)
        told = _message(Message.REFAULTED, now_ns, self.seq, len(groups))
        told["first"], told["batches"] = GROUP * groups, words[groups]
        if len(told):
            pages = self.refault_pages - self.told_refault_pages
            told["count"] = pages / len(told)
            told["stall_us"] = pages / len(told) * self.costs.page.fault_ns / 1e3
        self.told_refault_pages = self.refault_pages
        self._refaulted[:] = False
        return told

    def tell_pressure(self, now_ns: int) -> Any:
        """The stall since the last call, as a share of each worker's time."""
        told = _message(Message.PRESSURE, now_ns, 0)
        told["region"], told["bytes"] = -1, self.resident_pages * PAGE_BYTES
        told["stall_us"] = (self.stall_ns - self.told_stall_ns) / 1e3
        self.told_stall_ns = self.stall_ns
        return told

    # What the mechanism does.

    def apply(self, decisions: Any, now_ns: int) -> tuple[Any, Any]:
        """Carry out decisions, all or nothing each. Returns (access bits that were asked for, outcomes), both as messages."""
        self.host_ns["decisions"] += len(decisions) * self.costs.host.record_ns
        chosen = (decisions["region"] == REGION) & (decisions["first"] >= 0) & (decisions["first"] < self.batches) & (decisions["first"] % GROUP == 0)
        limits = decisions["type"] == Decision.LIMIT
        outcome = np.where(chosen | limits, Outcome.COMMITTED, Outcome.NOT_IN_ENCLAVE).astype(np.uint8)
        known = np.isin(decisions["type"], list(DECISION_TYPES.values()))
        moves = np.isin(decisions["type"], (Decision.RECLAIM, Decision.BRING_BACK))
        outcome[~known | (moves & (decisions["bytes"] <= 0))] = Outcome.INVALID
        newest = self._by_group(self._changed)
        groups = np.where(chosen, decisions["first"] // GROUP, 0)
        named = np.unpackbits(np.ascontiguousarray(decisions["batches"]).view(np.uint8), bitorder="little").reshape(-1, GROUP).view(bool)
        stale = ((newest[groups] > decisions["seq"][:, None]) & named).any(axis=1)
        outcome[(outcome == Outcome.COMMITTED) & stale & moves] = Outcome.STALE
        kib = np.zeros(len(decisions), np.uint32)
        bits = []
        for kind in Decision:
            of = (decisions["type"] == kind) & (outcome == Outcome.COMMITTED)
            if not of.any():
                continue
            if kind == Decision.SCAN:
                bits.append(self._scan(self._flags(groups[of], decisions["batches"][of]), now_ns))
            elif kind == Decision.RECLAIM:
                kib[of] = self._reclaim(groups[of], decisions["batches"][of], decisions["bytes"][of])
            elif kind == Decision.BRING_BACK:
                kib[of] = self._bring_back(groups[of], decisions["batches"][of], decisions["bytes"][of])
            elif kind == Decision.LIMIT:
                self.limit_pages = int(decisions["bytes"][of][-1] // PAGE_BYTES)
                self.host_ns["reclaim"] += self._reclaim_to_limit()
        told = np.zeros(len(decisions), OUTCOME)
        for name in ("version", "subsystem", "region", "first", "batches", "txn"):
            told[name] = decisions[name]
        told["type"], told["seq"], told["time_ns"], told["age_ns"] = Message.TXN_OUTCOME, self.seq, now_ns, now_ns - decisions["time_ns"]
        told["kib"], told["outcome"], told["decision"] = kib, outcome, decisions["type"]
        for code, n in enumerate(np.bincount(outcome)):
            self.answered[Outcome(code).name.lower()] += int(n)
        return (np.concatenate(bits) if bits else np.zeros(0, MESSAGE)), told.view(MESSAGE)

    def _scan(self, asked: Any, now_ns: int) -> Any:
        """Read and clear access bits; the workers' next accesses walk the page tables again."""
        here = np.flatnonzero(asked)
        since = self._since[here]
        touched = np.zeros(self.batches, bool)
        touched[here] = since > 0
        self._walks_ns += float((self.resident[here] * (1 - np.exp(-since / self.pages))).sum()) * self.costs.page.touch_ns
        self.host_ns["scan"] += float(self.resident[here].sum()) * self.costs.page.scan_ns
        self._since[here] = 0
        asked_words, touched_words = self._words(asked), self._words(touched)
        groups = np.flatnonzero(asked_words)
        told = _message(Message.ACCESSED, now_ns, self.seq, len(groups))
        told["first"], told["batches"], told["touched"] = GROUP * groups, asked_words[groups], touched_words[groups]
        return told

    def _reclaim(self, groups: Any, words: Any, quotas: Any) -> Any:
        """Free these batches' pages, each order up to its quota; KiB by order."""
        chosen = self._rows(groups, words)
        pages = np.where(chosen, self._by_group(self.resident)[groups], 0)
        fits = np.cumsum(pages, axis=1) * PAGE_BYTES <= quotas[:, None]
        places = (GROUP * groups[:, None] + np.arange(GROUP))[chosen & fits]
        freed = np.where(fits, pages, 0).sum(axis=1)
        self._take(places)
        self.host_ns["reclaim"] += float(freed.sum()) * self.costs.page.reclaim_ns + len(groups) * self.costs.host.call_ns
        return freed * (PAGE_BYTES // 1024)

    def _bring_back(self, groups: Any, words: Any, quotas: Any) -> Any:
        """Read these batches' pages ahead of their faults; KiB by order."""
        chosen = self._rows(groups, words)
        pages = np.where(chosen, self.pages - self._by_group(self.resident)[groups], 0)
        fits = np.cumsum(pages, axis=1) * PAGE_BYTES <= quotas[:, None]
        places = (GROUP * groups[:, None] + np.arange(GROUP))[chosen & fits]
        self._cached[places] = self.pages - self.resident[places]
        read = np.where(fits, pages, 0).sum(axis=1)
        self.host_ns["reclaim"] += float(read.sum()) * self.costs.page.read_ns + len(groups) * self.costs.host.call_ns
        return read * (PAGE_BYTES // 1024)

    def _reclaim_to_limit(self) -> float:
        """What the kernel does over a limit: its hand goes round and takes what was not accessed since it last came by. Returns the CPU time, ns."""
        over = self.resident_pages - self.limit_pages if self.limit_pages else 0
        if over <= 0:
            return 0.0
        looked, freed = 0, 0
        while over > 0 and looked < 3 * self.batches:
            n = min(max(GROUP, over // self.pages), self.batches - self._hand)
            window = slice(self._hand, self._hand + n)
            old = np.flatnonzero(~self._young[window] & (self.resident[window] > 0)) + self._hand
            old = old[: int(np.searchsorted(np.cumsum(self.resident[old]), over)) + 1]
            self._young[window] = False
            pages = int(self.resident[old].sum())
            self._take(old)
            over, freed, looked = over - pages, freed + pages, looked + n
            self._hand = (self._hand + n) % self.batches
        return freed * self.costs.page.reclaim_ns + looked * self.pages * self.costs.page.scan_ns

    def _take(self, places: Any) -> None:
        self.resident[places], self._cached[places] = 0, 0
        self._young[places] = False
        self._refaulted[places] = False

    def _by_group(self, of_batches: Any) -> Any:
        """[groups, GROUP] int64."""
        padded = np.zeros(self._padded, np.int64)
        padded[: self.batches] = of_batches
        return padded.reshape(-1, GROUP)

    def _rows(self, groups: Any, words: Any) -> Any:
        """[orders, GROUP] bool: which batches each order names, of those there are."""
        named = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little").reshape(-1, GROUP).view(bool)
        return named & (GROUP * groups[:, None] + np.arange(GROUP) < self.batches)

    def _flags(self, groups: Any, words: Any) -> Any:
        """[batches] bool from words of groups."""
        all_words = np.zeros(self._padded // GROUP, np.uint64)
        np.bitwise_or.at(all_words, groups, words)
        return np.unpackbits(all_words.view(np.uint8), bitorder="little").view(bool)[: self.batches]

    def _words(self, flags: Any) -> Any:
        padded = np.zeros(self._padded, bool)
        padded[: self.batches] = flags
        return np.packbits(padded, bitorder="little").view(np.uint64)


def _message(kind: Message, now_ns: int, seq: int, n: int = 1) -> Any:
    told = np.zeros(n, MESSAGE)
    told["version"], told["subsystem"], told["type"], told["seq"], told["time_ns"], told["region"] = VERSION, 2, kind, seq, now_ns, REGION
    return told
