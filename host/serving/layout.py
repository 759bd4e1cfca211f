"""KV between tiers: the device keeps a layer's tokens together, host memory and files keep a token's layers together.

On the device computing reads one layer of many tokens; below it a transfer moves all layers of few tokens, in large pieces. Copying from one to the other
changes the layout as it goes (Strata, section 3). A page is one token, so every slot is of use and a block's tokens may lie anywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from waveos.jit import jit


@jit
def to_device(device: Any, layer: int, head: int, slots: Any, host: Any, host_slots: Any) -> None:
    """Copy one head of one layer: host [slot, layer, k or v, head, dim] to a rank's device [layer, k or v, head, slot, dim]."""
    for which in range(2):
        for at in range(len(slots)):
            for each in range(device.shape[4]):
                device[layer, which, head, slots[at], each] = host[host_slots[at], layer, which, head, each]


@jit
def to_host(host: Any, host_slots: Any, device: Any, layer: int, head: int, slots: Any) -> None:
    """The other way."""
    for which in range(2):
        for at in range(len(slots)):
            for each in range(device.shape[4]):
                host[host_slots[at], layer, which, head, each] = device[layer, which, head, slots[at], each]


def compile_copies() -> None:
    """Have both compiled, or loaded, before many processes want them."""
    device, host, slots = np.zeros((1, 2, 1, 2, 4)), np.zeros((2, 1, 2, 1, 4)), np.zeros(1, np.int64)
    to_device(device, 0, 0, slots, host, slots)
    to_host(host, slots, device, 0, 0, slots)
