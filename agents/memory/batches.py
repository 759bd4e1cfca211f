"""The page batches of all regions as one long row, so that a policy looks at a million of them with a few NumPy operations.

batches = Batches(idle="u2", resident="?")       # columns: one array an attribute, zero for a new batch
batches.map(msg); batches.unmap(msg); batches.hear(msgs)
scanned, touched = batches.take()                # what was heard since, as one truth value a batch
memory.reclaim(txns, *batches.where(cold), quota_bytes=...)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.memory import GROUP

Flags = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]

_GROW = 64  # groups


class Batches:
    """Columns over batches. Every region begins at a multiple of GROUP; `live` tells which places are batches, and `bytes` how large each is."""

    def __init__(self, **columns: str) -> None:
        self.regions: dict[int, tuple[int, int]] = {}  # (first group, batches) by region
        self._columns = {"live": "?", "bytes": "i8", **columns}
        self._region = np.full(0, -1, np.int32)  # of each group
        self._first = np.zeros(0, np.int32)
        self._scanned, self._touched = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        for name, dtype in self._columns.items():
            setattr(self, name, np.zeros(0, dtype))

    def __len__(self) -> int:
        return GROUP * len(self._region)

    def map(self, msg: Any) -> slice:
        """Take a region in (again: from the beginning); its places."""
        if msg.region in self.regions:
            self.unmap(msg)
        groups = -(-int(msg.count) // GROUP)
        begin = self._find(groups)
        self.regions[msg.region] = (begin, int(msg.count))
        self._region[begin : begin + groups] = msg.region
        self._first[begin : begin + groups] = GROUP * np.arange(groups)
        places = slice(GROUP * begin, GROUP * begin + int(msg.count))
        for name in self._columns:
            getattr(self, name)[places] = 0
        self.live[places], self.bytes[places] = True, msg.bytes  # type: ignore[attr-defined]
        return places

    def unmap(self, msg: Any) -> None:
        """Forget a region; nothing if it is not known."""
        begin, count = self.regions.pop(msg.region, (0, 0))
        groups = slice(begin, begin - (-count // GROUP))
        self._region[groups], self._scanned[groups], self._touched[groups] = -1, 0, 0
        self.live[GROUP * begin : GROUP * begin + count] = False  # type: ignore[attr-defined]

    def hear(self, msgs: Any) -> None:
        """Keep which batches were scanned, and touched, for `take`."""
        groups, known = self._groups(msgs)
        np.bitwise_or.at(self._scanned, groups, msgs["batches"][known])
        np.bitwise_or.at(self._touched, groups, msgs["touched"][known])

    def take(self) -> tuple[Flags, Flags]:
        """(scanned, touched) since the last call."""
        told = _flags(self._scanned) & self.live, _flags(self._touched) & self.live  # type: ignore[attr-defined]
        self._scanned[:], self._touched[:] = 0, 0
        return told

    def named(self, msgs: Any) -> Flags:
        """The batches that these messages or outcomes name."""
        words = np.zeros(len(self._region), np.uint64)
        groups, known = self._groups(msgs)
        np.bitwise_or.at(words, groups, msgs["batches"][known])
        return _flags(words) & self.live  # type: ignore[attr-defined,no-any-return]

    def where(self, chosen: Flags) -> tuple[Any, Any, Words]:
        """These batches as (region, first, batches) of orders, a group each."""
        words = np.packbits(chosen, bitorder="little").view(np.uint64)
        groups = np.flatnonzero(words)
        return self._region[groups], self._first[groups], words[groups]

    def _groups(self, msgs: Any) -> tuple[Any, Flags]:
        """The groups that messages are about; those of regions that are not mapped are left out."""
        found = np.full(len(msgs), -1)
        for region in np.unique(msgs["region"]).tolist():
            begin, count = self.regions.get(region, (0, 0))
            inside = (msgs["region"] == region) & (msgs["first"] >= 0) & (msgs["first"] < count)
            found[inside] = begin + msgs["first"][inside] // GROUP
        known = found >= 0
        return found[known], known

    def _find(self, groups: int) -> int:
        """The first run of free groups that is long enough, made if there is none."""
        taken = np.flatnonzero(np.append(self._region, 0) >= 0)
        gaps = np.diff(np.concatenate([[-1], taken])) - 1
        fitting = np.flatnonzero(gaps >= groups)
        if len(fitting):
            return int(taken[fitting[0]] - gaps[fitting[0]])
        begin = len(self._region) - int(gaps[-1])
        more = max(_GROW, begin + groups - len(self._region), len(self._region) // 2)
        self._region = np.concatenate([self._region, np.full(more, -1, np.int32)])
        for name in ("_first", "_scanned", "_touched"):
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(more, getattr(self, name).dtype)]))
        for name, dtype in self._columns.items():
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(GROUP * more, dtype)]))
        return begin


class Quota:
    """How much may be moved: a share of all memory each second, and no more than the host allows; saved up for `burst_s` at most."""

    def __init__(self, share_per_s: float, burst_s: float = 2.0) -> None:
        self.share_per_s, self.burst_s = share_per_s, burst_s
        self.allowed_bytes_per_s = float("inf")
        self._left, self._at_ns = 0.0, 0

    def choose(self, of: Batches, wanted: Flags, now_ns: int, order: Any = None) -> Flags:
        """As many of the wanted batches as fit, those with the highest `order` first, or from where they lie."""
        sizes, live = of.bytes, of.live  # type: ignore[attr-defined]
        bytes_per_s = min(self.share_per_s * float(sizes[live].sum()), self.allowed_bytes_per_s)
        if self._at_ns:
            self._left = min(bytes_per_s * self.burst_s, self._left + bytes_per_s * (now_ns - self._at_ns) * 1e-9)
        self._at_ns = now_ns
        places = np.flatnonzero(wanted)
        if order is not None:
            places = places[np.argsort(-order[places].astype(np.int64), kind="stable")]
        cost = np.cumsum(sizes[places])
        kept = places[: int(np.searchsorted(cost, self._left, side="right"))]
        if len(kept):
            self._left -= float(cost[len(kept) - 1])
        chosen = np.zeros(len(wanted), bool)
        chosen[kept] = True
        return chosen


def _flags(words: Words) -> Flags:
    return np.unpackbits(words.view(np.uint8), bitorder="little").view(bool)
