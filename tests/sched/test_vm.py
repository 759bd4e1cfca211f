"""Virtual machines in virtual time: what ticks, sleep and turbo do to their work, what the two policies promise, and who polices a silent agent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from waveos.cli.app import app
from waveos.errors import ConfigError, PolicyError
from waveos.ipu_emulator import sched as engine
from waveos.ipu_emulator.profile import load_host, load_link
from waveos.ipu_emulator.vm import MS, Setup, simulate
from waveos.ipu_emulator.vm.cores import Cores, Tick
from waveos.ipu_emulator.vm.experiment import assumed_names, compare, gains
from waveos.ipu_emulator.vm.part import load_assumptions, load_part, part_names
from waveos.report import vm as report
from waveos.scenario import load_scenario
from waveos.sched.tenants import shared
from waveos.testing import interpreted
from waveos.trace import RunEnd, TraceKind

XEON = load_part("xeon-8468v")
SMALL = Setup(
    policy="vm",
    part=XEON,
    guests=load_assumptions().guests,
    host=load_host("server"),
    link=load_link("mount-evans"),
    speed=0.6,
    cores=4,
    machines=4,
    warmup_ns=5 * MS,
    duration_ns=40 * MS,
    trace=True,
)
CROWDED = replace(SMALL, policy="vm_coscheduling", machines=12, busy_share=0.7, ticks="off")
FEW = ("vm.busy_shares=[0.1]", "run.duration_ms=100", "run.warmup_ms=20")


def sharing(setup, trace):
    return shared(trace, lambda cpu: cpu % setup.cores, lambda tid: tid // setup.vcpus)


def runs(trace):
    """(cpu, tid) of every time that a thread came onto a CPU."""
    return [(int(e["cpu"]), int(e["tid"])) for e in trace if e["kind"] == TraceKind.RUN_BEGIN]


# Parts


def test_every_figure_of_a_part_has_a_source_and_one_part_of_each_maker_is_there():
    assert {"xeon-8468v", "epyc-9454"} <= set(part_names())
    for name in part_names():
        part = load_part(name)
        assert all(part.sources.values())
        assert {field for field in type(part.assumed).model_fields if "assumed" in part.sources[field]}, "nothing is said to be assumed"


def test_the_turbo_limit_falls_with_the_number_of_active_cores_as_published():
    assert [XEON.ceiling_mhz(n) for n in (1, 24, 25, 30, 48)] == [3800, 3800, 3700, 3700, 3200]
    epyc = load_part("epyc-9454")
    assert [epyc.ceiling_mhz(n) for n in (1, 48)] == [3800, 3650]
    limits = [epyc.ceiling_mhz(n) for n in range(1, 49)]
    assert limits == sorted(limits, reverse=True)


def test_the_power_budget_sustains_all_cores_at_base_under_the_heaviest_load_and_more_when_others_sleep_deeper():
    heaviest = load_part("xeon-8468v", scale={"load_share": 2})
    assert heaviest.assumed.load_share == 1
    assert heaviest.power_mhz(48, 0, 0, 0.0) == pytest.approx(heaviest.published.base_mhz)
    shallow, deep, woken = (XEON.power_mhz(24, *idle) for idle in ((24, 0, 0.0), (0, 24, 0.0), (0, 24, 0.2)))
    assert shallow < woken < deep


def test_a_scaled_figure_stays_what_it_is():
    part = load_part("xeon-8468v", scale={"power_exponent": 0.1, "deep_share": 0.5})
    assert part.assumed.power_exponent == 1
    assert part.assumed.deep_share == XEON.assumed.deep_share / 2


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("turbo_cores = [24,", "turbo_cores = [50,", "turbo_cores rise"),
        ("turbo_mhz = [3800,", "turbo_mhz = [3100,", "turbo_mhz fall"),
        ("load_share = 0.75", "load_share = 1.5", "assumed.load_share"),
        ("cores = 48\n", 'cores = "48"\n', "published.cores"),
        ('load_share = "assumed"\n', "", "names none for load_share"),
        ("base_mhz = 2400", "base_mhz =", "parts.toml"),
        ("threads_per_core = 2\n", "threads_per_core = 2\nrings = 3\n", "published.rings"),
    ],
)
def test_a_part_that_cannot_be_is_told_with_its_file(tmp_path, old, new, told):
    from waveos.ipu_emulator.vm.part import DATA

    text = (DATA / "parts" / "xeon-8468v.toml").read_text()
    assert old in text
    (tmp_path / "parts.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=told.replace("[", r"\[")):
        load_part("parts.toml", tmp_path)


# Cores


def cores(ticks="off", held=frozenset(), n=4):
    made = Cores(XEON, n, 1, Tick(ticks, 1_000_000, 2_700.0, 1_200.0), 0.2, held)
    for cpu in range(2 * n):
        made.fall_idle(cpu, 0)
    for core in range(n):
        made.settle(core, made.stay[core])
    return made


def test_a_core_sleeps_as_deep_as_the_shallower_of_its_cpus():
    made = cores()
    assert made.real == [0, 0, 4, 0]
    made.wake(1, 1_000_000)
    assert made.real == [1, 0, 3, 0]
    made.predicted_ns[1] = 100_000.0
    made.fall_idle(1, 1_100_000)
    assert made.real == [0, 1, 3, 0]


def test_waking_a_deep_core_takes_long_and_a_cpu_whose_sibling_is_awake_is_there_at_once():
    made = cores()
    assert made.wake(0, 50_000_000) == XEON.exit_ns(XEON.deep) == 145_000
    assert made.wake(4, 50_000_000) == 0


def test_a_cpu_that_is_woken_again_soon_expects_to_be_and_sleeps_shallow():
    made, now = cores(), 0
    for _ in range(20):
        now += 50_000
        made.wake(0, now)
        made.fall_idle(0, now)
    assert made.idle_depth[0] == 1


def test_the_frequency_rises_when_power_control_has_seen_that_a_core_sleeps():
    made = Cores(XEON, 47, 1, Tick("off", 1_000_000, 2_700.0, 1_200.0), 0.2)
    for cpu in range(94):
        made.fall_idle(cpu, 0)
    waiting = made.mhz
    for core in range(47):
        assert made.settle(core, made.stay[core])
    assert made.mhz > waiting
    assert not made.settle(0, made.stay[0])
    assert not made.settle(1, made.stay[1] - 1)


def test_ticks_lower_the_turbo_limit_of_those_that_work_while_others_sleep_and_held_turbo_keeps_it_so():
    at = {}
    for name, ticks, held in (("on", "periodic", ()), ("off", "off", ()), ("held", "off", ("turbo",)), ("busy", "nohz_idle", ())):
        made = cores(ticks, frozenset(held), n=47)
        made.wake(0, 10_000_000)
        at[name] = made.mhz
    assert at["on"] < at["off"] == at["busy"]
    assert at["held"] < at["off"]


def test_siblings_slow_each_other_and_a_tick_takes_its_time_from_whom_it_finds():
    quiet, busy = cores("off"), cores("nohz_idle")
    assert quiet.share(0, False) == 1
    assert quiet.share(0, True) == (1 + XEON.assumed.smt_gain) / 2
    assert busy.share(0, False) == pytest.approx(1 - 0.0027)
    assert cores("periodic").share(0, False) < busy.share(0, False)


# The model


def test_equal_seeds_give_equal_traces_and_other_seeds_others():
    one, two, other = (simulate(replace(SMALL, seed=seed)) for seed in (3, 3, 4))
    assert one.trace.tobytes() == two.trace.tobytes()
    assert one.figures == two.figures
    assert one.trace.tobytes() != other.trace.tobytes()


def test_a_vcpu_alone_works_at_its_frequency_less_what_its_ticks_and_pauses_take():
    guests = SMALL.guests.model_copy(update={"pause_us": 1e-3, "burst_ms": 1e4})
    alone = replace(SMALL, guests=guests, machines=1, vcpus=1, busy_share=1.0, duration_ns=100 * MS)
    off, on = simulate(replace(alone, ticks="off")), simulate(replace(alone, ticks="nohz_idle"))
    speed = 1 / (0.2 + 0.8 * 2400 / off.figures["mhz"])
    assert off.figures["performance"] == pytest.approx(speed, rel=1e-3)
    tick_share = (load_host("server").tick_ns + guests.vm_exit_ns) / 1e6
    assert on.figures["performance"] / off.figures["performance"] == pytest.approx(1 - tick_share, rel=1e-3)


def test_work_is_neither_lost_nor_made_by_preemption():
    """One machine after the other in turns of the quantum does what one alone would, less the switches."""
    guests = SMALL.guests.model_copy(update={"pause_us": 1e-3, "burst_ms": 1e4})
    alone = replace(SMALL, guests=guests, cores=1, machines=1, busy_share=1.0, ticks="off", duration_ns=200 * MS)
    crowd = simulate(replace(alone, machines=4))
    assert crowd.figures["preemptions_per_s"] > 100
    assert 4 * crowd.figures["performance"] == pytest.approx(simulate(alone).figures["performance"], rel=0.01)
    assert crowd.figures["slowest"] > 0.7 * crowd.figures["performance"]


def test_with_a_link_that_costs_nothing_offload_is_as_good_as_the_host():
    ideal = replace(SMALL, link=load_link("ideal"), message_ns=0.0, speed=1.0, duration_ns=100 * MS)
    on_host, offload = (simulate(replace(ideal, placement=place)).figures["performance"] for place in ("on-host", "offload"))
    assert on_host == offload
    assert simulate(replace(ideal, link=SMALL.link, speed=0.6)).figures["performance"] == pytest.approx(offload, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"machines": 300}, "300 machines"),
        ({"cores": 48}, "48 cores for machines: xeon-8468v has 48"),
        ({"host": load_host("ideal")}, "has no tick"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        simulate(replace(SMALL, **changes))


# What the ticks cost


@pytest.fixture(scope="module")
def gained():
    return gains(scenario=load_scenario("vm", FEW))


def test_no_ticks_is_a_gain_and_its_parts_make_it_up(gained):
    parts = [gained[f"vm_gain_from_{name}"] for name in ("ticks", "sleep", "turbo")]
    assert np.prod([1 + part for part in parts]) == pytest.approx(1 + gained["vm_gain_max"])
    assert gained["vm_gain_from_ticks"] > 0
    assert gained["vm_gain_from_turbo"] > gained["vm_gain_from_ticks"]  # few are busy: their frequency matters most
    assert gained["vm_gain_max"] > 0


def test_the_gain_shrinks_as_more_machines_are_busy(gained):
    full = gains(scenario=load_scenario("vm", FEW), busy_shares=[1.0])
    assert 0 < full["vm_gain_max"] < gained["vm_gain_max"]


def test_next_to_ticks_of_busy_cpus_alone_only_their_time_is_gained(gained):
    kernel_like = gains(scenario=load_scenario("vm", [*FEW, "vm.ticks=nohz_idle"]))
    assert kernel_like["vm_gain_from_sleep"] == kernel_like["vm_gain_from_turbo"] == 0
    assert kernel_like["vm_gain_max"] < gained["vm_gain_max"]


def test_every_assumed_figure_can_be_varied_and_a_dearer_tick_gains_more(gained):
    assert {"vm_exit_ns", "control_us", "tick_ns", "link", "memory_share"} <= set(assumed_names())
    dear = gains({"tick_ns": 2, "vm_exit_ns": 2}, scenario=load_scenario("vm", FEW))
    assert dear["vm_gain_from_ticks"] > 1.5 * gained["vm_gain_from_ticks"]
    with pytest.raises(ConfigError, match=r"no assumed figure 'tick' \(did you mean 'tick_ns'"):
        gains({"tick": 2})
    with pytest.raises(ConfigError, match="above 0"):
        gains({"tick_ns": 0})


# The policies


def test_pairs_stay_on_the_siblings_of_one_core():
    trace = simulate(replace(SMALL, machines=12, busy_share=0.5)).trace
    homes = {tid: {cpu for cpu, other in runs(trace) if other == tid} for _, tid in runs(trace)}
    assert len(homes) > 20  # of 24; an idle one may not have woken
    assert all(len(cpus) == 1 for cpus in homes.values())
    for tid in set(homes) & {tid - 1 for tid in homes if tid % 2}:
        (one,), (two,) = homes[tid], homes[tid + 1]
        assert one % SMALL.cores == two % SMALL.cores and one != two


def test_a_pair_whose_core_is_held_by_another_moves_to_an_empty_one_if_the_policy_may_move_it():
    crowd = replace(SMALL, machines=8, busy_share=0.4, duration_ns=100 * MS)
    pinned, moved = simulate(crowd), simulate(replace(crowd, params={"move": 1}))
    homes = {tid: {cpu % SMALL.cores for cpu, other in runs(moved.trace) if other == tid} for _, tid in runs(moved.trace)}
    assert any(len(cores) > 1 for cores in homes.values())
    assert moved.figures["wake_p99_us"] < pinned.figures["wake_p99_us"]


@pytest.mark.parametrize("changes", [{}, {"mitigations": ()}, {"placement": "on-host", "link": load_link("on-host")}, {"vcpus": 3}], ids=str)
def test_no_two_tenants_are_on_one_core_at_a_time_over_a_whole_trace(changes):
    setup = replace(CROWDED, **changes)
    run = simulate(setup)
    assert sharing(setup, run.trace) == []
    assert len(runs(run.trace)) > 100
    assert any(e["kind"] == TraceKind.RUN_END and e["value"] == RunEnd.PREEMPTED for e in run.trace)
    assert run.figures["slowest"] > 0  # and every machine has its turn


def test_both_cpus_of_a_core_work_for_its_tenant():
    trace = simulate(CROWDED).trace
    assert len({cpu for cpu, _ in runs(trace)}) == 2 * CROWDED.cores


def test_without_core_scheduling_tenants_do_share_cores():
    pinned = replace(CROWDED, policy="vm", vcpus=3)
    assert sharing(pinned, simulate(pinned).trace)
    default = replace(CROWDED, policy="kernel", placement="kernel", ticks="nohz_idle")
    assert sharing(default, simulate(default).trace)


def test_a_switch_of_tenants_that_does_not_wait_for_both_cpus_is_found(tmp_path):
    """The policy with its one safeguard taken out: the proof fails, so it is not the load that keeps tenants apart."""
    from waveos.agents.sched import vm_coscheduling

    source = Path(vm_coscheduling.__file__).read_text()
    broken = source.replace("tenant = holder(self, other)\n", "tenant = -1\n").replace('name="vm_coscheduling"', 'name="broken"')
    assert broken.count("tenant = -1\n") == 1
    (tmp_path / "broken.py").write_text(broken)
    setup = replace(CROWDED, policy=str(tmp_path / "broken.py"))
    with interpreted():
        assert sharing(setup, simulate(setup).trace)


@pytest.mark.parametrize("placement", ["on-host", "offload"])
def test_core_scheduling_holds_in_the_compiled_engine_too(placement):
    """Requests of three tenants, of microseconds: its other host, which preempts, prestages and loses races a hundred times as often."""
    classes = tuple(
        engine.RequestClass(name, engine.Service("exponential", mean_ns=mean), share=1 / 3) for name, mean in (("a", 5e3), ("b", 2e4), ("c", 1e5))
    )
    setup = engine.Setup(
        "vm_coscheduling",
        60_000,
        classes,
        params={"quantum_us": 30},
        placement=placement,
        workers=8,
        threads=128,
        duration_ns=60 * MS,
        message_ns=50.0,
        trace_for_ns=10**9,
    )
    simulation = engine.Simulation(setup)
    while not simulation.advance(10**9):
        pass
    trace = simulation.result().trace
    assert len(trace) < engine.TRACE_EVENTS  # it is whole
    begins = trace[trace["kind"] == TraceKind.RUN_BEGIN]
    assert len(begins) > 2_000
    numbered = trace.copy()  # a thread serves one tenant after the other: name each run by its tenant
    current = {}
    order = np.lexsort((np.arange(len(numbered)), numbered["time_ns"]))
    for at in order:
        event = numbered[at]
        if event["kind"] == TraceKind.RUN_BEGIN:
            current[int(event["cpu"])] = int(event["value"]) * 1_000 + int(event["tid"])
            event["tid"] = current[int(event["cpu"])]
        elif event["kind"] == TraceKind.RUN_END:
            event["tid"] = current[int(event["cpu"])]
    assert shared(numbered, lambda cpu: cpu % 4, lambda tid: tid // 1_000) == []


# Who polices the agent

DIES = replace(SMALL, machines=12, busy_share=1.0, ticks="off", agent_dies_ns=30 * MS, duration_ns=100 * MS)


def test_without_ticks_a_timer_of_the_hosts_own_gives_a_silent_agent_up_and_the_machines_run_on():
    run = simulate(DIES)
    guests = DIES.guests
    silent = run.fell_back_ns - DIES.agent_dies_ns
    assert guests.silent_ms * MS < silent <= (guests.silent_ms + guests.watch_ms) * MS
    late = run.trace[run.trace["time_ns"] > run.fell_back_ns + 20 * MS]
    assert {int(e["tid"]) for e in late if e["kind"] == TraceKind.RUN_BEGIN} == set(range(24))


def test_a_watchdog_on_the_tick_would_never_look_once_the_ticks_are_off():
    """What must not be: in ghOSt the tick looks after the agent. Then a tickless policy switches off the clock that polices it, and machines starve."""
    run = simulate(replace(DIES, watchdog="tick"))
    assert run.fell_back_ns == 0
    late = run.trace[run.trace["time_ns"] > DIES.agent_dies_ns + 40 * MS]
    assert len({int(e["tid"]) for e in late if e["kind"] == TraceKind.RUN_BEGIN}) < 24
    with_ticks = simulate(replace(DIES, watchdog="tick", ticks="periodic"))
    assert with_ticks.fell_back_ns > 0


def test_an_agent_that_lives_is_not_given_up():
    assert simulate(replace(DIES, agent_dies_ns=0)).fell_back_ns == 0


# The command

TINY = ("vm.busy_shares=[0.2,0.8]", "vm.cores=4", "vm.machines=4", "run.duration_ms=20", "run.warmup_ms=5")


def test_the_comparison_has_the_kernel_each_policy_in_each_place_and_the_gain_taken_apart():
    results = compare(load_scenario("vm", TINY))
    ids = [each["id"] for each in results["configs"]]
    assert ids[0] == "kernel/kernel/nohz_idle"
    assert {"vm/on-host/periodic", "vm/offload/periodic", "vm/offload/off", "vm_coscheduling/offload/off", "vm/offload/off/time alone"} <= set(ids)
    gain = results["gains"][0]
    product = np.prod([[1 + value for value in gain[name]] for name in report.EFFECTS], axis=0)
    assert product == pytest.approx([1 + value for value in gain["gain"]])
    columns, rows = report.table(results)
    assert len(rows) == len(ids) and all(len(row) == len(columns) for row in rows)


def test_the_commands_run_it_and_keep_its_results(tmp_path):
    flags = [word for setting in TINY for word in ("--set", setting)]
    out, page = tmp_path / "results.json", tmp_path / "report.html"
    done = CliRunner().invoke(app, ["compare", "vm", *flags, "--policy", "vm", "--out", str(out), "--report", str(page), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["subsystem"] == "vm"
    assert page.read_text().count("<svg") == 2
    again = CliRunner().invoke(app, ["report", str(out), "--out", str(tmp_path / "again.html")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.html").read_text() == page.read_text()
    one = CliRunner().invoke(app, ["run", "vm", *flags, "--placement", "on-host"])
    assert one.exit_code == 0, one.output
    assert "offload" not in one.output
    drawn = CliRunner().invoke(app, ["trace", "vm", *flags, "--for-ms", "10", "--out", str(tmp_path / "trace.json")])
    assert drawn.exit_code == 0, drawn.output
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("vm.part=xeon-8468w", r"no part 'xeon-8468w' \(did you mean 'xeon-8468v'\?\)"),
        ("vm.host=sever", "no host profile 'sever'"),
        ("vm.ticks=on", "vm.ticks"),
        ("vm.busy_shares=[1.5]", "vm.busy_shares"),
        ("vm.busy_shares=[]", "vm.busy_shares"),
        ("vm.machine=3", "machines"),
        ("vm.cores=48", "48 cores for machines"),
        ('policies.names=["vn"]', "no policy 'vn'"),
        ('policies.names=["sol"]', "policy 'sol' is of subsystem memory, not sched"),
        ("agent.message_ns=measured", "wants a number"),
        ("policies.params.vm.quantum=3", "no parameter 'quantum'"),
    ],
)
def test_a_scenario_that_cannot_be_is_told(setting, told):
    with pytest.raises(Exception, match=told) as raised:
        compare(load_scenario("vm", [*TINY, setting] if not setting.startswith("vm.busy") else [setting]))
    assert type(raised.value).__module__ == "waveos.errors"


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "vm", "--no-saturation"],
        ["compare", "vm", "--loads", "3"],
        ["run", "vm", "--load", "3"],
    ],
)
def test_what_scenarios_of_machines_do_not_have_is_refused(arguments):
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError), done.output


def test_a_handler_that_does_not_return_is_stopped_and_its_policy_named(tmp_path):
    (tmp_path / "loop.py").write_text(
        "from waveos import sched\nfrom waveos.policy import Policy\n"
        "class Loop(Policy, subsystem=sched, name='loop'):\n    def thread_runnable(self, msg, txns):\n        i = 1\n        while i:\n            i += 2\n"
    )
    with pytest.raises(PolicyError, match=r"policy '.*loop.py' did not return from thread_runnable within 2 s"):
        compare(load_scenario("vm", [*FEW, f'policies.names=["{tmp_path}/loop.py"]']), ["offload"])
