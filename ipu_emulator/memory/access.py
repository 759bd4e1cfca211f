"""Access processes: how often each page batch is accessed, now.

A process gives `rates(now_ns)`, the share of all accesses that falls on each batch, as float32 that adds up to 1, and `hot(now_ns)`, which batches are
worth keeping, as the oracle of the model is told it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from waveos.errors import ConfigError


class Access(Protocol):
    """What the model asks of an access process."""

    def rates(self, now_ns: int) -> Any:
        """[batches] float32, the share of accesses of each batch; the same object as long as nothing changed."""

    def hot(self, now_ns: int) -> Any:
        """[batches] bool."""


class Moving:
    """A share of the batches is hot and takes nearly all accesses, evenly; it moves fully, every so often, to batches that were cold.

    The hot set is one interval in address order, or with `scrambled` as many batches all over the address space.
    """

    def __init__(self, batches: int, hot_share: float, move_ns: int, stray_share: float, scrambled: bool, seed: int) -> None:
        self.batches, self.size = batches, max(1, round(batches * hot_share))
        self.move_ns, self.stray_share = move_ns, stray_share
        self._order = np.random.default_rng(seed).permutation(batches) if scrambled else None
        self._made: tuple[int, Any, Any] = (-1, None, None)

    def _at(self, now_ns: int) -> tuple[int, Any, Any]:
        step = now_ns // self.move_ns if self.move_ns else 0
        if step != self._made[0]:
            places = (step * self.size + np.arange(self.size)) % self.batches
            hot = np.zeros(self.batches, bool)
            hot[places if self._order is None else self._order[places]] = True
            rates = np.full(self.batches, self.stray_share / self.batches, np.float32)
            rates[hot] += np.float32((1 - self.stray_share) / self.size)
            self._made = (step, rates, hot)
        return self._made

    def rates(self, now_ns: int) -> Any:
        return self._at(now_ns)[1]

    def hot(self, now_ns: int) -> Any:
        return self._at(now_ns)[2]


class Zipf:
    """Batch of rank r is accessed in proportion to 1 / r^s; ranks lie all over the address space. The hot ones are those with the first `hot_share` ranks."""

    def __init__(self, batches: int, s: float, hot_share: float, seed: int) -> None:
        rank = np.random.default_rng(seed).permutation(batches)
        rates = (1.0 + rank) ** -s
        self._rates = (rates / rates.sum()).astype(np.float32)
        self._hot = rank < batches * hot_share

    def rates(self, now_ns: int) -> Any:
        return self._rates

    def hot(self, now_ns: int) -> Any:
        return self._hot


class Recorded:
    """Rates from a file: an .npz with `rates`, [steps, batches] of any unit, each step lasting `step_ms`; it repeats."""

    def __init__(self, path: Path, batches: int, hot_share: float) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                rates, self._step_ns = np.asarray(file["rates"], np.float32), int(float(file["step_ms"]) * 1e6)
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(f"{path} holds no recorded accesses ({error}); wants an .npz with `rates`, [steps, batches], and `step_ms`") from None
        if rates.ndim != 2 or rates.shape[1] != batches or (rates < 0).any() or (rates.sum(axis=1) <= 0).any():
            raise ConfigError(
                f"{path}: `rates` is {rates.shape}; wants [steps, {batches}] of numbers that are not negative, and some above 0 in each step"
            )
        self._rates = rates / rates.sum(axis=1, keepdims=True)
        kept = max(1, round(batches * hot_share))
        self._hot = np.zeros(rates.shape, bool)
        np.put_along_axis(self._hot, np.argsort(-rates, axis=1, kind="stable")[:, :kept], True, axis=1)

    def rates(self, now_ns: int) -> Any:
        return self._rates[now_ns // self._step_ns % len(self._rates)]

    def hot(self, now_ns: int) -> Any:
        return self._hot[now_ns // self._step_ns % len(self._hot)]
