"""The limit study of decode: tokens a second that one user of Llama-3-405B can get from HBM3, all from one set of constants.

Published are three of the six (arXiv 2507.14397); the constants are those that give them back, so these are *fitted*, and the other three *predicted*.
"""

from __future__ import annotations

from typing import Any

from waveos.bench.machine import describe_machine
from waveos.ipu_emulator.gpu import decode_step, load_gpu, load_limits, load_model

OPTIONS: dict[str, Any] = {}
CHIPS = (8, 32, 128)
CONTEXTS = {"4k": 4_096, "128k": 131_072}


def run() -> dict[str, Any]:
    """The six figures; `labels` says for each whether it is fitted or predicted."""
    gpu, model, published = load_gpu("xpu-hbm3"), load_model("llama-3.1-405b"), load_limits().published
    metrics = {
        f"utps_405b_tp{chips}_{name}": round(1.0 / decode_step(gpu, model, chips, context).total_s, 1)
        for chips in CHIPS
        for name, context in CONTEXTS.items()
    }
    exact = all(round(metrics[name]) == value for name, value in published.items())
    labels = {name: "fitted" if name in published else "predicted" for name in metrics}
    told = ", ".join(f"{name.removeprefix('utps_405b_')} {value:.1f} {labels[name]}" for name, value in metrics.items())
    return {
        "name": "limits",
        "metrics": metrics,
        "labels": labels,
        "machine": describe_machine(),
        "timing": "modelled",
        "verdict": f"{'the published figures come out exact after rounding' if exact else 'NOT the published figures'}: {told}",
    }
