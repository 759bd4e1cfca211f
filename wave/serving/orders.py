"""What a serving policy orders. `txns` is a handler's last argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from waveos.serving.records import BatchFlag, Placement, Recovery, Tier


def form_batch(txns: Any, instance: int, parts: Sequence[tuple[int, int, int]], cache_seq: int, flags: BatchFlag | int = 0) -> None:
    """Prefill `parts`, each (request, first token to compute, tokens to compute), as one batch: all of it is applied, or nothing.

    `cache_seq` is the newest number the policy has heard of the instance's cache.
    """
    requests, begins, tokens = zip(*parts, strict=True)
    n = len(parts)
    txns.order("form_batch", request=-1, instance=instance, more=n, key=cache_seq, tokens=n, how=int(flags))
    txns.order("part", request=requests, instance=instance, more=range(n - 1, -1, -1), key=begins, tokens=tokens)


def load(txns: Any, request: int, instance: int, tokens: int) -> None:
    """Bring the request's first `tokens` from host memory to the device, ahead of its batch."""
    txns.order("load", request=request, instance=instance, tokens=tokens)


def prefetch(txns: Any, request: int, instance: int, tokens: int) -> None:
    """Bring the request's first `tokens` from storage to host memory, while it waits."""
    txns.order("prefetch", request=request, instance=instance, tokens=tokens)


def cancel(txns: Any, request: int, instance: int) -> None:
    """Stop the request's prefetch."""
    txns.order("cancel", request=request, instance=instance)


def back_up(txns: Any, instance: int, blocks: Sequence[int], tier: Tier = Tier.HOST) -> None:
    """Copy these blocks to a lower tier, in the background."""
    txns.order("back_up", request=-1, instance=instance, key=blocks, tokens=1, how=int(tier))


def evict(txns: Any, instance: int, blocks: Sequence[int], tier: Tier = Tier.DEVICE) -> None:
    """Drop these blocks from a tier; a block that is in use stays, and that decision is stale."""
    txns.order("evict", request=-1, instance=instance, key=blocks, tokens=1, how=int(tier))


def route(txns: Any, request: int, instance: int, home: int = 0) -> None:
    """Have the request served by this instance, with this rank as its home."""
    txns.order("route", request=request, instance=instance, how=home)


def refuse(txns: Any, request: int, instance: int) -> None:
    """Answer the request with an error: it does not fit."""
    txns.order("refuse", request=request, instance=instance)


def place(txns: Any, instance: int, placement: Placement) -> None:
    """Deal the KV heads to the ranks in this way."""
    txns.order("place", request=-1, instance=instance, how=int(placement))


def recover(txns: Any, instance: int, recovery: Recovery) -> None:
    """Go on with the ranks that are alive."""
    txns.order("recover", request=-1, instance=instance, how=int(recovery))
