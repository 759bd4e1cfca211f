"""What a memory policy orders. `txns` is a handler's last argument; `region`, `first` and `batches` are numbers or arrays of equal length."""

from __future__ import annotations

from typing import Any


def scan(txns: Any, region: Any, first: Any, batches: Any) -> None:
    """Read and clear the access bits of these batches; they come as `accessed`."""
    txns.order("scan", region=region, first=first, batches=batches)


def reclaim(txns: Any, region: Any, first: Any, batches: Any, quota_bytes: Any) -> None:
    """Free the pages of these batches, at most `quota_bytes` for each order."""
    txns.order("reclaim", region=region, first=first, batches=batches, bytes=quota_bytes)


def bring_back(txns: Any, region: Any, first: Any, batches: Any, quota_bytes: Any) -> None:
    """Read these batches from swap before they are needed, at most `quota_bytes` for each order."""
    txns.order("bring_back", region=region, first=first, batches=batches, bytes=quota_bytes)


def keep(txns: Any, region: Any, first: Any, batches: Any) -> None:
    """Drop what is left of earlier orders to reclaim these batches."""
    txns.order("keep", region=region, first=first, batches=batches)


def limit(txns: Any, limit_bytes: int) -> None:
    """Let the enclave have so much resident; 0: as much as it likes."""
    txns.order("limit", region=-1, bytes=limit_bytes)
