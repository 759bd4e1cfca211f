"""A scenario says one thing, or why not: file, line, key and what to write instead."""

import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waveos.errors import ConfigError
from waveos.scenario import MITIGATIONS, Scenario, flatten, load_scenario, parse_value, scenario_names

GOOD = """\
name = "good"
[host]
workers = 4
[workload]
loads_per_s = [1000, 2000]
[[workload.classes]]
name = "GET"
share = 0.9
service = { fixed_us = 10, exponential_us = 1 }
slo_us = 200
[[workload.classes]]
name = "RANGE"
share = 0.1
service = { erlang_us = 500, stages = 4 }
[policies]
names = ["fifo", "shinjuku"]
[policies.params.shinjuku]
quantum_us = 30
[run]
duration_ms = 500
[objective]
GET = { p99_us = 200 }
RANGE = { p99_x_mean = 10 }
"""


def load(tmp_path, text=GOOD, settings=()):
    path = tmp_path / "good.toml"
    path.write_text(text)
    return load_scenario(str(path), settings)


def complaint(tmp_path, text=GOOD, settings=()):
    with pytest.raises(ConfigError) as told:
        load(tmp_path, text, settings)
    assert "\n" not in str(told.value)
    return str(told.value).replace(str(tmp_path) + "/", "")


def replaced(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


@pytest.mark.parametrize("name", scenario_names())
def test_every_shipped_scenario_loads_and_says_what_it_is_for(name):
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.about


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    scenario = load(tmp_path)
    assert scenario.host.workers == 4
    assert scenario.host.profile == "server"
    assert scenario.link.mitigations == list(MITIGATIONS)
    assert scenario.workload.classes[1].slo_us == 0
    assert scenario.base == tmp_path


def test_a_file_without_a_name_lends_its_own(tmp_path):
    assert load(tmp_path, replaced('name = "good"\n', "")).name == "good"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "workers = 4",
            "worker = 4",
            "good.toml:3: host.worker: unknown key `worker` (did you mean 'workers'?); allowed: profile, workers, threads, costs",
        ),
        ("[host]", "[hosts]", "good.toml:2: hosts: unknown key `hosts` (did you mean 'host'?)"),
        (
            "slo_us = 200",
            "slo_ms = 2",
            "good.toml:10: workload.classes.GET.slo_ms: unknown key `slo_ms`; the key is `slo_us`, in microseconds: write slo_us = 2000",
        ),
        ("slo_us = 200", 'slo = "2ms"', "unknown key `slo`; the key is `slo_us`, in microseconds: write slo_us = 2000"),
        (
            "duration_ms = 500",
            'duration = "2s"',
            "good.toml:20: run.duration: unknown key `duration`; the key is `duration_ms`, in milliseconds: write duration_ms = 2000",
        ),
        (
            "duration_ms = 500",
            'duration_ms = "2 s"',
            'run.duration_ms: duration_ms = "2 s": the unit is in the key\'s name; write duration_ms = 2000',
        ),
        (
            "quantum_us = 30",
            'quantum_us = "30ms"',
            'policies.params.shinjuku.quantum_us: quantum_us = "30ms": the unit is in the key\'s name; write quantum_us = 30000',
        ),
        (
            "duration_ms = 500",
            "duration_ms = -5",
            "good.toml:20: run.duration_ms: duration_ms = -5: wants virtual milliseconds that count, a number above 0",
        ),
        ("duration_ms = 500", "duration_ms = nan", "run.duration_ms: duration_ms = nan: wants"),
        (
            "[1000, 2000]",
            "[1000, -2000]",
            "good.toml:5: workload.loads_per_s: loads_per_s = -2000: wants a list of offered loads, in requests per second, each above 0",
        ),
        ("[1000, 2000]", '"20k/s"', 'workload.loads_per_s: loads_per_s = "20k/s": the unit is in the key\'s name; write loads_per_s = 20000'),
        ("[1000, 2000]", "[]", "good.toml:4: workload: no load is given"),
        ("workers = 4", "workers = 0", "host.workers: workers = 0: wants CPUs that serve requests, a whole number 1..1023"),
        ("workers = 4", "workers = 4.5", "host.workers: workers = 4.5: wants CPUs"),
        ("workers = 4", 'workers = "4"', 'host.workers: workers = "4": wants CPUs'),
        ("workers = 4", "workers = true", "host.workers: workers = true: wants CPUs"),
        ("share = 0.9", "share = 0.8", "workload: the classes' shares add up to 0.9; they must add up to 1"),
        ('name = "RANGE"', 'name = "GET"', "workload: two classes have the same name"),
        ("share = 0.1", "share = -0.1", "workload.classes.RANGE.share: share = -0.1: wants its part of all requests, above 0 and at most 1"),
        (", stages = 4", "", "workload.classes.RANGE.service: erlang_us and stages go together"),
        ("stages = 4", "exponential_us = 4", "workload.classes.RANGE.service: exponential_us and erlang_us exclude each other"),
        ("{ erlang_us = 500, stages = 4 }", "{}", "workload.classes.RANGE.service: no service time is given"),
        (
            "service = { erlang_us = 500, stages = 4 }\n",
            "",
            "workload.classes.RANGE.service: service is missing; it wants a service time, as {fixed_us = 10}",
        ),
        ("GET = { p99_us = 200 }", "GTE = { p99_us = 200 }", "objective.GTE: no such class (did you mean 'GET'?)"),
        (
            "GET = { p99_us = 200 }",
            "GET = { p99_ms = 2 }",
            "objective.GET.p99_ms: unknown key `p99_ms`; the key is `p99_us`, in microseconds: write p99_us = 2000",
        ),
        ("workers = 4", "workers = ", "good.toml is not valid TOML: Invalid value (at line 3, column 11)"),
        (
            "[run]",
            '[link]\nmitigations = ["wb", "wt"]\n[run]',
            'link.mitigations: mitigations = "wt": wants a list out of "wb", "wc_wt", "prestage", "prefetch"',
        ),
        (
            "[run]",
            '[agent]\nmessage_ns = "4us"\n[run]',
            'agent.message_ns: message_ns = "4us": the unit is in the key\'s name; write message_ns = 4000',
        ),
        ("[run]", '[agent]\nspeed = "fast"\n[run]', 'agent.speed: speed = "fast": wants "profile", or the IPU core'),
        (
            "loads_per_s =",
            'arrivals = "trace.csv"\nloads_per_s =',
            'workload.arrivals: arrivals = "trace.csv": wants "poisson" or {trace = "file.csv"}',
        ),
    ],
)
def test_what_cannot_be_is_one_line_with_place_and_remedy(tmp_path, old, new, told):
    assert told in complaint(tmp_path, replaced(old, new))


def test_of_several_mistakes_the_first_is_explained_and_the_others_counted(tmp_path):
    assert complaint(tmp_path, GOOD.replace("workers = 4", "workers = 0\nthreads = 0")).endswith("(1 more after this one)")


def test_an_unknown_scenario_is_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"no scenario 'rocksdbb' \(did you mean 'rocksdb'\?\); known: .*mm8"):
        load_scenario("rocksdbb")
    with pytest.raises(ConfigError, match=r"no scenario file 'nowhere/x\.toml'"):
        load_scenario("nowhere/x.toml")


def test_settings_override_by_dotted_key_and_class_name(tmp_path):
    scenario = load(
        tmp_path, settings=["host.workers=2", "workload.classes.RANGE.service={fixed_us=3}", "workload.classes.0.slo_us=1", "policies.names=fifo,edf"]
    )
    assert scenario.host.workers == 2
    assert scenario.workload.classes[1].service.fixed_us == 3
    assert scenario.workload.classes[1].service.form == "fixed"
    assert scenario.workload.classes[0].slo_us == 1
    assert scenario.policies.names == ["fifo", "edf"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("host.worker=2", "--set: host.worker: unknown key `worker` (did you mean 'workers'?)"),
        ("host.workers=-1", "--set: host.workers: workers = -1: wants"),
        ("run.duration_ms=2s", '--set: run.duration_ms: duration_ms = "2s": the unit is in the key\'s name; write duration_ms = 2000'),
        (
            "workload.classes.GTE.slo_us=1",
            "--set workload.classes.GTE.slo_us: no `GTE` in workload.classes (did you mean 'GET'?); there are GET, RANGE",
        ),
        ("host.workers", "--set host.workers: wants key=value, as --set run.seed=7"),
        ("host.workers.more=1", "--set host.workers.more: host.workers is a value, not a table"),
        ("name.x=1", "--set name.x: name is a value, not a table"),
    ],
)
def test_a_wrong_setting_is_told_by_its_flag(tmp_path, setting, told):
    assert complaint(tmp_path, settings=[setting]).startswith(told)


def test_each_value_knows_where_it_came_from(tmp_path):
    origin = load(tmp_path, settings=["run.seed=9", ("policies.names", ["fifo"], "--policy")]).origin
    path = str(tmp_path / "good.toml")
    assert origin["host.workers"] == path
    assert origin["host.threads"] == "default"
    assert origin["run.seed"] == "--set"
    assert origin["policies.names"] == "--policy"
    assert origin["workload.classes.RANGE.share"] == path
    assert origin["workload.classes.RANGE.slo_us"] == "default"
    assert origin["policies.params.shinjuku.quantum_us"] == path


def test_a_scenario_survives_being_dumped_and_read_again(tmp_path):
    scenario = load(tmp_path)
    assert Scenario.model_validate(scenario.model_dump()).model_dump() == scenario.model_dump()


@given(
    st.recursive(
        st.one_of(st.integers(-(10**9), 10**9), st.booleans(), st.text("abc_-", min_size=1)), lambda inner: st.lists(inner, max_size=3), max_leaves=5
    )
)
def test_values_read_as_in_toml(value):
    def write(value):
        if isinstance(value, list):
            return f"[{', '.join(map(write, value))}]"
        return f'"{value}"' if isinstance(value, str) else str(value).lower()

    assert parse_value(write(value)) == value


def test_words_need_no_quotes_and_commas_make_lists():
    assert parse_value("fifo") == "fifo"
    assert parse_value("fifo,shinjuku") == ["fifo", "shinjuku"]
    assert parse_value("4,8") == [4, 8]
    assert parse_value("my policy.py:Class") == "my policy.py:Class"


@given(st.dictionaries(st.text("abc", min_size=1), st.dictionaries(st.text("def", min_size=1), st.integers(), min_size=1), min_size=1))
def test_flattening_keeps_every_leaf_once(tables):
    leaves = list(flatten(tables))
    assert len({key for key, _ in leaves}) == len(leaves) == sum(map(len, tables.values()))


def test_a_scenario_is_read_without_numpy_and_numba():
    script = textwrap.dedent(
        """
        import sys
        from waveos.scenario import load_scenario
        load_scenario("mm8")
        heavy = {"numpy", "numba", "typer", "rich"} & set(sys.modules)
        assert not heavy, heavy
        """
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True)


@pytest.mark.parametrize("quote", ['"', "'"])
def test_a_quoted_step_of_a_key_may_hold_dots(quote):
    scenario = load_scenario("rocksdb", [f"policies.params.{quote}./my.py{quote}.quantum_us=5"])
    assert scenario.policies.params["./my.py"] == {"quantum_us": 5}
    assert scenario.origin["policies.params../my.py.quantum_us"] == "--set"


def test_a_quote_that_is_not_closed_is_one_line():
    with pytest.raises(ConfigError, match="a key is steps with dots between them"):
        load_scenario("rocksdb", ['policies.params."my.py.quantum_us=5'])


def test_a_parameter_that_is_no_number_says_that_one_is_wanted():
    with pytest.raises(ConfigError, match=r"policies.params.shinjuku.quantum_us: 'abc' is no number"):
        load_scenario("rocksdb", ["policies.params.shinjuku.quantum_us=abc"])


def test_serving_has_no_scenarios_and_says_where_to_go(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('subsystem = "serving"')
    with pytest.raises(ConfigError, match="serving has no scenarios; see `wave serve`, `wave bench strata`"):
        load_scenario(str(path))
    path.write_text('subsystem = "servng"')
    with pytest.raises(ConfigError, match=r"there are sched, memory, net, vm$"):
        load_scenario(str(path))
