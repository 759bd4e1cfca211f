"""docs/validation.md: where the models were held against theory and against this machine, and where not. `make validation` writes it, nobody else does.

Each part is the object of a bench, kept as out/validation/NAME.json; what is there is not measured again (delete it, or name it: `validate.py live`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEPT = HERE.parent / "out" / "validation"
WAVE = [sys.executable, "-P", "-c", "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))"]
BENCHES = {"theory": [], "conformance": [], "net": [], "live": [], "memory": []}
"""And their options."""
Figures = Mapping[str, Any]


def main(anew: Iterable[str]) -> None:
    """Run what is not there, and write the page. A bench that cannot run here leaves a line that says why."""
    KEPT.mkdir(parents=True, exist_ok=True)
    anew = set(anew)
    found: dict[str, Any] = {}
    for name, options in BENCHES.items():
        path = KEPT / f"{name}.json"
        if name in anew or not path.exists():
            print(f"validation: wave bench {name} ...", file=sys.stderr)
            done = subprocess.run([*WAVE, "bench", name, *options, "--json"], stdout=subprocess.PIPE, stderr=None, text=True, check=False)
            if done.returncode == 0:
                path.write_text(done.stdout)
        found[name] = json.loads(path.read_text()) if path.exists() else None
    arm = KEPT / "arm.json"  # `make test-arm` takes far longer than all of this, and is asked for by itself
    found["arm"] = json.loads(arm.read_text()) if arm.exists() else None
    (HERE / "validation.md").write_text(page(found))


def page(found: Mapping[str, Any]) -> str:
    """The page, of the benches' objects by name; None where one did not run."""
    parts = [_HEAD]
    for name, title, write in (
        ("theory", "Scheduling against queueing theory", _theory),
        ("net", "Network against queueing theory", _net_theory),
        ("live", "Scheduling against this machine", _live),
        ("net", "Network against this machine", _net_live),
        ("memory", "Memory against this machine", _memory),
        ("conformance", "The same decisions in every world", _conformance),
    ):
        result = found.get(name)
        parts.append(f"## {title}\n")
        if result is None:
            parts.append(f"Not done here: `wave bench {name}` did not run.\n")
            continue
        lines = list(write(result["metrics"]))
        parts.append("\n".join(lines) + "\n")
        machine = result["machine"]
        parts.append(f"`wave bench {name}`, timing: {result['timing']}; {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}.\n")
    return "\n".join([*parts, "## On 64-bit Arm\n", _arm(found.get("arm")), _TAIL])


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    columns = list(columns)
    yield "| " + " | ".join(columns) + " |"
    yield "|---|" + "--:|" * (len(columns) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _theory(m: Figures) -> Iterator[str]:
    yield f"{m['pairs']:,.0f} pairs of case and seed; theory lies in {m['covered_share']:.1%} of the 95 % intervals (an honest one misses one in twenty)."
    yield f"The widest interval of a mean is {m['max_half_width_share_mean']:.2%} of the value, of a 99th percentile {m['max_half_width_share_p99']:.2%}."


def _net_theory(m: Figures) -> Iterator[str]:
    names = [key.removeprefix("theory_").removesuffix("_error") for key in m if key.startswith("theory_") and key.endswith("_error")]
    rows = [(name.replace("_", ", "), f"{m[f'theory_{name}_error']:+.2%}", f"±{m[f'theory_{name}_interval']:.2%}") for name in names]
    yield from _table(("mean latency", "model over theory", "95 % interval"), rows)


def _ratio(predicted: float, measured: float) -> str:
    return f"{predicted / measured:.2f}" if measured else ""


def _live(m: Figures) -> Iterator[str]:
    rows = []
    for key in m:
        if key.startswith("predicted_") and (other := "measured_" + key.removeprefix("predicted_")) in m and "_p999" not in key:
            rows.append((key.removeprefix("predicted_").replace("_", " "), f"{m[key]:,.1f}", f"{m[other]:,.1f}", _ratio(m[key], m[other])))
    yield from _table(("figure (percent of its saturation last)", "predicted", "measured", "ratio"), rows)
    yield ""
    left_out = ", ".join(f"{m[f'{name}_disturbed_share']:.0%} ({name.replace('_', ' ')})" for name in ("kernel", "kernel_tuned", "wave", "wave_mlfq"))
    yield f"Of the requests at 70 % load {left_out} are left out at the median of the rounds, because the CPU itself was slow in their busy period."
    yield "Why tails are not predicted: [Live](live.md#what-it-is-worth-here)."


def _net_live(m: Figures) -> Iterator[str]:
    if "live_rate_per_s" not in m:
        yield "Not done here: the live part of `wave bench net` did not run."
        return
    rows = []
    for name in ("rss", "jbsq", "slo"):
        measured, predicted = m[f"live_{name}_get_p99_us"], m[f"predicted_{name}_get_p99_us"]
        spread = f"{m[f'live_{name}_get_p99_us_low'] / 1e3:.1f} to {m[f'live_{name}_get_p99_us_high'] / 1e3:.1f}"
        rows.append((name, f"{predicted / 1e3:.1f}", f"{measured / 1e3:.1f}", spread, _ratio(predicted, measured)))
    yield f"GET p99 in ms of four workers (timed waits) at {m['live_rate_per_s']:,.0f} requests/s, end to end through three namespaces."
    yield ""
    yield from _table(("policy", "predicted", "measured, median", "rounds", "ratio"), rows)


_MEMORY = (
    ("oracle, hot set side by side: saved", "model_oracle_saved_share", "live_oracle_saved_share"),
    ("sol, side by side: saved", "model_memory_saved_share", "live_sol_saved_share"),
    ("sol, side by side: throughput", "model_throughput_ratio", "live_sol_throughput_ratio"),
    ("psi_backoff, side by side: saved", "model_psi_memory_saved_share", "live_psi_saved_share"),
    ("psi_backoff, side by side: throughput", "model_psi_throughput_ratio", "live_psi_throughput_ratio"),
)


def _memory(m: Figures) -> Iterator[str]:
    rows = [(what, f"{m[model]:.3f}", f"{m[live]:.3f}", _ratio(m[model], m[live])) for what, model, live in _MEMORY if model in m and live in m]
    if not rows:
        yield "Not done here: the live part of `wave bench memory` did not run."
        return
    yield from _table(("figure, a share", "modelled", "measured", "ratio"), rows)
    yield ""
    yield "The model has batches of 256 KiB, the live database VMAs of 2 MiB; costs a page are measured, on the machine that `data/memory/zram.toml` names."
    yield "With a scrambled hot set the two are not one experiment: every 2 MiB are partly hot."


def _conformance(m: Figures) -> Iterator[str]:
    yield f"{m['runs']:,.0f} runs through every link, compiled and as plain Python: {m['identical_share']:.1%} made the same bytes."


def _arm(found: Figures | None) -> str:
    if found is None:
        return "Not done here: `make test-arm` was not run to its end.\n"
    failed = found["failures"] + found["errors"]
    passed = found["tests"] - failed - found["skipped"]
    return f"""`make test-arm` (ring, links, contract, agents; {found["python"]} of Debian's for arm64, numba's Arm code, {found["emulator"]}):
{passed:,} tests passed, {failed:,} failed, {found["skipped"]:,} were skipped.

The instructions are Arm's, the memory under them is this machine's, which keeps stores in order: for what an Arm may reorder stands the strict model alone.
"""


_HEAD = """# Validation

<!-- written by `make validation`; not by hand -->

Where the models were held against theory and against this machine, with the noise, and where they were not. A ratio is predicted over measured.
"""

_TAIL = """## Ordering and protocol

- The rings run on a strict memory model that reorders and withholds as hardware may (`tests/ring`): leaving out any one flush, fence or invalidate makes a
  test fail. Guests ignore memory types, so the link `bar` in a guest shows behaviour and proves no ordering.
- The protocol of queues and transactions is model-checked by spin, with crashes, restarts and loss (`tests/protocol`).

## What is not validated

- Any absolute number of an offloaded configuration: no IPU was measured. Link profiles are recalled or assumed, and every table says so.
- The VM model: no virtual machine was run. Turbo bins and sleep states are published, what they do to guests is assumed.
- The serving model beyond the figures of its sources: no GPU was measured.
- `sched_ext` speeds: it was run in emulated guests alone, whose times mean nothing.
- Arm: no Arm processor ran any of it, an emulated one did (above); no time on Arm is known.
- More than two cores, more than one NUMA node, and real network cards.
"""

if __name__ == "__main__":
    main(sys.argv[1:])
