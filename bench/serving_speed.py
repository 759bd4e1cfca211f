"""How fast the emulated serving engine runs, beside vidur 0.0.26: requests and iterations of the same trace a second of CPU time.

Both serve the same requests with the same model on eight replicas, without any cache of prefixes, in chunks of the same size. Their results are not compared:
vidur's wheel comes without its profile tables, so it is given made-up ones. vidur is installed into an environment of its own, in Wave's cache folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, MissingError
from waveos.ipu_emulator.serving.simulate import Setup, Simulation, load_system
from waveos.ipu_emulator.serving.workload import Ask, Workload, bundled_trace, read_mooncake
from waveos.paths import cache_dir

OPTIONS = {
    "trace": ("", "a trace in Mooncake's format; by default the one that ships with Wave"),
    "requests": (600, "requests of it, from the first on"),
    "rounds": (3, "runs of each, in turns; figures are their medians"),
    "replicas": (8, "copies of the model"),
    "vidur": (True, "run vidur, too; false: Wave alone"),
    "strata_requests": (0, "requests that Wave serves through Strata's policies, with caches; 0: all of the trace"),
}
VIDUR = "0.0.26"
CHUNK, BATCH = 8_192, 128
"""Tokens of a prefill chunk, and requests of a batch, for both."""
_DRIVER = Path(__file__).with_name("vidur_run.py")


def run(trace: str = "", requests: int = 600, rounds: int = 3, replicas: int = 8, vidur: bool = True, strata_requests: int = 0) -> dict[str, Any]:
    """Both on one core, in turns; then Wave alone through Strata's policies."""
    if requests < 10 or rounds < 1 or replicas < 1:
        raise ConfigError(f"requests {requests}, rounds {rounds}, replicas {replicas}: at least 10 requests, one round and one replica")
    path = Path(trace) if trace else bundled_trace()
    workload = without_sharing(read_mooncake(path, requests))
    python = vidur_python() if vidur else None
    ours: list[tuple[float, int]] = []
    theirs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "trace.csv"
        rows = [f"2023-08-21,{ask.at_ns / 1e9},{ask.prompt},{ask.outputs}" for ask in workload.asks]
        table.write_text("\n".join(["Date,Time,PromptTokenCount,CompletionTokenCount", *rows]) + "\n")
        for _ in range(rounds):
            ours.append(_run_wave(workload, replicas))
            if python is not None:
                theirs.append(_run_vidur(python, table, replicas, folder))
    n = len(workload.asks)
    seconds, iterations = median(each[0] for each in ours), median(each[1] for each in ours)
    metrics: dict[str, float] = {"wave_requests_per_s": n / seconds, "wave_iterations_per_s": iterations / seconds}
    verdict = "vidur was not run: nothing to compare with"
    if theirs:
        vidur_s, vidur_iterations = median(each["cpu_s"] for each in theirs), median(each["iterations"] for each in theirs)
        metrics |= {"vidur_requests_per_s": n / vidur_s, "vidur_iterations_per_s": vidur_iterations / vidur_s, "ratio_requests": vidur_s / seconds}
        ratio = metrics["ratio_requests"]
        verdict = f"{ratio:.1f} times vidur's requests a second ({'at least' if ratio >= 10 else 'short of'} the 10 that are wanted)"
    strata = Simulation(Setup(load_system("strata"), "h100", "llama-3.1-8b", 1, replicas), read_mooncake(path, strata_requests)).run()
    metrics |= {"strata_requests": strata.requests, "strata_wall_s": strata.wall_s, "strata_peak_mib": strata.peak_mib}
    metrics |= {"strata_link_us_per_iteration": strata.link_us_per_iteration, "strata_host_us_freed_per_iteration": strata.policy_us_per_iteration}
    metrics = {name: round(value, 1) for name, value in metrics.items()}
    return {"name": "serving_speed", "metrics": metrics, "machine": describe_machine(), "timing": "measured", "verdict": verdict}


def without_sharing(workload: Workload) -> Workload:
    """The same lengths and times with prompts that have nothing in common, each in one block."""
    return replace(workload, asks=[Ask(ask.at_ns, ask.prompt, ask.outputs, [number + 1], [ask.prompt]) for number, ask in enumerate(workload.asks)])


def _run_wave(workload: Workload, replicas: int) -> tuple[float, int]:
    """CPU seconds and iterations; nothing is kept in host memory, as nothing is used twice."""
    params = {"page": 1, "write_threshold": 1e9, "batch_tokens": CHUNK, "batch_requests": BATCH, "mixed": 1}
    system = load_system("strata-io").model_copy(update={"params": params})
    simulation = Simulation(Setup(system, "h100", "llama-3.1-8b", 1, replicas), workload)
    begin = time.process_time()
    result = simulation.run()
    return time.process_time() - begin, result.iterations


def vidur_python() -> Path:
    """vidur's own interpreter; its environment is made on first use. Raises MissingError if it cannot be."""
    folder = cache_dir("peers") / "vidur"
    python = folder / "bin" / "python"
    if subprocess.run([python, "-c", "import vidur"], capture_output=True, check=False).returncode if python.exists() else True:
        for command in ([sys.executable, "-P", "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "-q", f"vidur=={VIDUR}"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise MissingError(
                    f"bench 'serving_speed' needs vidur {VIDUR}, which could not be installed into {folder}: {why}; or use --vidur false"
                )
    return python


def _run_vidur(python: Path, table: Path, replicas: int, folder: str) -> dict[str, float]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    command = [str(python), str(_DRIVER), str(table), str(replicas), str(CHUNK), str(BATCH), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    if done.returncode:
        raise MissingError(f"vidur {VIDUR} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}; or use --vidur false")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told
