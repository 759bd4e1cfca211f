"""`wave record|replay`: what a live enclave's threads did, kept; and what another policy would have made of it, in virtual time."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.agentd import parameter
from waveos.cli.live_trace import end
from waveos.cli.probe import parse_length
from waveos.cli.results import check_outputs, keep_results, write_report
from waveos.cli.running import measure, open_pool
from waveos.cli.terminal import Json, print_json, print_table, talk
from waveos.errors import ConfigError

commands = typer.Typer()


@commands.command("record")
def record(
    name: Annotated[
        str | None, typer.Argument(help="The enclave; without it the only one of this machine.", metavar="ENCLAVE", show_default=False)
    ] = None,
    length: Annotated[str, typer.Option("--for", help="How long, as 10s or 500ms.")] = "10s",
    out: Annotated[Path, typer.Option("--out", help="The recording to write.")] = Path("recording.tape"),
    as_json: Json = False,
) -> int | None:
    """Keep the messages, decisions and outcomes of a live enclave, for `wave replay`. Only looks on: daemons and threads notice nothing."""
    seconds = parse_length(length, "--for")
    check_outputs(out)
    enclave = name or import_module("waveos.watch.source").only_enclave()
    kept = import_module("waveos.watch.recording").record(enclave, seconds)
    about = {key: kept.about[key] for key in ("policy", "params", "mechanism", "cpus")}
    import_module("waveos.tape").write(out, {**about, "enclave": enclave, "lost": kept.lost}, kept.messages, kept.decisions)
    told = {"messages": len(kept.messages), "decisions": len(kept.decisions), "lost": kept.lost}
    if as_json:
        print_json({"path": str(out), "enclave": enclave, "seconds": seconds, **told, "ended": kept.over or None})
    else:
        print(out)
        talk(", ".join(f"{count:,} {what}" for what, count in told.items()) + f"; wave replay {out} --policy NAME asks what another policy had done")
    return end(kept, out)


@commands.command("replay")
def replay(
    path: Annotated[Path, typer.Argument(help="A recording, by `wave record` or `wave agentd --record`.", metavar="FILE")],
    policy: Annotated[str, typer.Option("--policy", help="The policy that is to meet the same arrivals and service demands.")],
    params: Annotated[list[str] | None, typer.Option("--param", "-p", help="A parameter of it, as quantum_us=100. May be given again.")] = None,
    placement: Annotated[str, typer.Option(help="Where it decides: on-host, on a core beside the enclave's, or offload, on an IPU.")] = "on-host",
    link: Annotated[str, typer.Option(help="offload: the link's profile.")] = "mount-evans",
    host: Annotated[str, typer.Option(help="What the host's cores cost: a profile, as server or this-machine.")] = "server",
    out: Annotated[Path | None, typer.Option("--out", help="Write the results to this file, as JSON.", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write an HTML report to this file.", show_default=False)] = None,
    as_json: Json = False,
) -> int | None:
    """What another policy would have made of a recorded run, in virtual time, beside the recorded policy there and what was measured."""
    if placement not in ("on-host", "offload"):
        raise ConfigError(f"--placement {placement}: wants on-host or offload")
    check_outputs(out, report)
    facts, messages, _ = import_module("waveos.tape").read(path)
    model = import_module("waveos.ipu_emulator.replay")
    demands = model.demands_of(messages, len(facts.get("cpus") or ()))
    chosen = {facts["policy"]: facts.get("params") or {}}
    chosen[policy] = dict(map(parameter, params or []))
    scenario = model.scenario_of(demands, path.name, list(chosen), chosen, link, host)
    with open_pool(None) as pool:
        scenario = import_module("waveos.ipu_emulator.experiment").check_policies(scenario, pool=pool)
        costs = import_module("waveos.bench.policy").message_costs(list(chosen), chosen)
        compared = model.comparison_of(scenario, demands, costs, placement)
        code = measure(compared, pool, saturation=False)
    measured = demands.measured()
    results = {**compared.results(), "recorded": {"policy": facts["policy"], "classes": measured, "unfinished": demands.unfinished}}
    results["notes"] = [*results["notes"], *model.LIMITS]
    keep_results(results, out, stopped=code)
    if report is not None and code is None:
        write_report(results, report)
    if as_json:
        print_json(results)
        return code
    rows = [_row(f"{facts['policy']}, recorded", name, of, "", "") for name, of in measured.items()]
    for each in results["configs"]:
        point = each["points"][0]
        rows += [_row(each["id"], name, of, f"{point['preemptions']:,}", f"{point['stale_share']:.2%}") for name, of in point["classes"].items()]
    columns = ("policy", "class", "count", "mean us", "p50 us", "p99 us", "p99.9 us", "preemptions", "stale")
    profiles = f"host profile {host}, link profile {link if placement == 'offload' else 'on-host'}: assumed"
    print_table(columns, rows, title=f"{path.name}: runnable to blocked; the first measured, the others modelled ({profiles})", numbers=columns[2:])
    for note in results["notes"]:
        talk(f"note: {note}")
    return code


def _row(who: str, name: str, of: Mapping[str, Any], preemptions: str, stale: str) -> tuple[str, ...]:
    times = (f"{of[key]:,.1f}" if of[key] is not None else "" for key in ("mean_us", "p50_us", "p99_us", "p999_us"))
    return (who, name, f"{of['count']:,}", *times, preemptions, stale)
