"""A scenario of memory in the `local` world: a real RocksDB on this machine's kernel, zram as swap, hostd, and each policy in agentd; `--world local`.

What in the virtual world are models is the machine itself here: the link, the agent's core, and the costs of faults and reclaim. So of a scenario these are
read: `memory.gib`, `memory.batch_kib`, the moving hot set of `access`, `policies`, `run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from waveos import __version__
from waveos.bench import memory_live
from waveos.bench.memory_live import ORACLE, Live, Plan
from waveos.errors import ConfigError
from waveos.ipu_emulator.experiment import check_policies

Progress = Callable[[int, int, str], None]
PLACEMENTS = ("offload",)
"""Policies are in agentd, in its own process, always."""


def compare(scenario: Any, progress: Progress, tell: Callable[[str], None]) -> dict[str, Any]:
    """The oracle and every policy of the scenario, one after the other; what came out, as it stands in a results file.

    On KeyboardInterrupt what has been run is returned, marked `interrupted`. Raises ConfigError, PolicyError, MissingError.
    """
    scenario = check_policies(scenario, "memory")
    plan = plan_of(scenario)
    wanted = [ORACLE, *scenario.policies.names]
    runs: list[dict[str, Any]] = []
    interrupted = False
    try:
        with Live(plan, watch=True, tell=tell) as live:
            for policy in wanted:
                progress(len(runs), len(wanted), f"{policy}, some {plan.run_s:.0f} s")
                runs.append(live.run(policy, scrambled=scenario.access.scrambled, params=scenario.policies.params.get(policy)))
    except KeyboardInterrupt:
        interrupted = True
    results = memory_live.results(plan, runs)
    results |= {"name": scenario.name, "wave": __version__, "scenario": scenario.model_dump(exclude_none=True), "interrupted": interrupted}
    results["notes"] += _not_read(scenario)
    return results


def plan_of(scenario: Any) -> Plan:
    """How the scenario is run here. Raises ConfigError for what this world does not have."""
    access = scenario.access
    if access.pattern != "moving":
        raise ConfigError(
            f'access.pattern = "{access.pattern}" is of the virtual world; the database of the local one has a hot set that moves: --set access.pattern=moving'
        )
    return Plan(
        gib=scenario.memory.gib,
        settle_s=scenario.run.warmup_s,
        count_s=scenario.run.duration_s,
        hot_share=access.hot_share,
        move_s=access.move_s or math.inf,
        batch_kib=scenario.memory.batch_kib,
        seed=scenario.run.seed,
    )


def _not_read(scenario: Any) -> list[str]:
    clients = f"; one client asks, where the model has access.workers = {scenario.access.workers}" if scenario.access.workers != 1 else ""
    return [f"The link, the agent's core, costs, and times and strays of GETs are the machine's and the database's own, not the scenario's{clients}."]
