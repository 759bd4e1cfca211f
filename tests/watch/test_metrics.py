"""What Prometheus is told: every figure of every daemon once, under names that follow its conventions."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from statuses import agentd, gone, memory, net, sched

from waveos.cli import run
from waveos.errors import ConfigError, LinkError
from waveos.watch import source, statistics
from waveos.watch.exporter import Exporter
from waveos.watch.metrics import Daemons, cumulative, registry_of, text
from waveos.watch.statistics import Kind

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docs" / "grafana.json"
ORDER = {each.name: statistics.labels_of(each) for each in statistics.everything()}


def told(*statuses: dict[str, Any], agents: Mapping[str, Any] | None = None) -> dict[str, dict[tuple[str, ...], float]]:
    """The samples by name, as a scraper reads them, by the values of their labels."""
    agents = agents or {}

    def ask_agent(path: str) -> Any:
        if agents[path] is None:
            raise LinkError("nobody there")
        return agents[path]

    exposed = text(registry_of(Daemons(list(agents), lambda: list(statuses), ask_agent)))
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(exposed):
        for sample in family.samples:
            key = tuple(sample.labels[label] for label in (*ORDER[family.name], "le") if label in sample.labels)
            assert key not in found.setdefault(sample.name, {}), f"{sample.name}{sample.labels} twice: a scrape would be refused"
            found[sample.name][key] = sample.value
    return found


def test_figures_come_in_base_units_under_the_enclaves_name():
    samples = told(sched())
    assert samples["wave_hostd_cpu_seconds_total"] == {("web",): 2.0}
    assert samples["wave_link_records_total"] == {("web", "to_agent"): 5_000, ("web", "to_host"): 1_000}
    assert samples["wave_decisions_total"]["web", "stale"] == 40
    assert samples["wave_threads"] == {("web", "all"): 12, ("web", "running"): 2, ("web", "runnable"): 3, ("web", "outside"): 0}
    assert samples["wave_enclave_info"] == {("web", "sched", "priority", "2-3", "shinjuku"): 1}
    memory_samples = told(memory())
    assert memory_samples["wave_memory_resident_bytes"] == {("cache",): 200 * 2**20}
    assert memory_samples["wave_memory_cpu_seconds_total"]["cache", "scan"] == pytest.approx(0.3)


def test_a_histogram_is_cumulative_and_ends_with_all_that_was_counted():
    samples = told(sched())
    buckets = [value for _, value in sorted(samples["wave_decision_staleness_seconds_bucket"].items(), key=lambda each: float(each[0][1]))]
    assert buckets == sorted(buckets) and buckets[-1] == 950
    assert samples["wave_decision_staleness_seconds_count"] == {("web",): 950}
    at = {float(edge): value for (_, edge), value in samples["wave_decision_staleness_seconds_bucket"].items()}
    assert at[16_384e-9] == 900 and at[8_192e-9] == 0


def test_a_histograms_sum_is_that_of_the_middles_of_its_bins():
    _, total_ns = cumulative([[8, 1], [10, 2]], 4)  # 8..10 and 10..12
    assert total_ns == 9 + 2 * 11


def test_an_enclave_whose_hostd_is_gone_is_down_and_nothing_else():
    samples = told(sched(), gone())
    assert samples["wave_hostd_up"] == {("web",): 1, ("old",): 0}
    assert all("old" not in key for name, keys in samples.items() for key in keys if name != "wave_hostd_up")


def test_an_agent_is_told_once_though_its_hostd_and_itself_tell_of_it():
    samples = told(sched(), agents={"/run/a.sock": agentd(), "/run/b.sock": None})
    assert samples["wave_agent_messages_total"] == {("", "web"): 4_900, ("rack7", "web"): 4_900}
    assert samples["wave_agentd_up"] == {("/run/a.sock",): 1, ("/run/b.sock",): 0}
    assert samples["wave_agentd_enclaves"] == {("/run/a.sock",): 2}


def test_where_no_daemon_runs_nothing_is_told():
    assert told() == {}


def test_names_follow_the_conventions():
    names = [each.name for each in statistics.everything()]
    assert len(names) == len(set(names))
    for each in statistics.everything():
        assert each.name.startswith("wave_") and each.name == each.name.lower() and "__" not in each.name
        assert not each.name.endswith("_total"), "the client library adds it"
        assert each.unit in ("", "seconds", "bytes")
        assert each.name.endswith(each.unit), "the unit is the name's end"
        assert each.kind is not Kind.HISTOGRAM or (each.unit == "seconds" and each.bins)
        assert each.meaning and not each.meaning.endswith(".") and len(statistics.labels_of(each)) <= 5


@pytest.mark.parametrize("status", [sched(), memory(), net()], ids=["sched", "memory", "net"])
def test_every_figure_of_a_status_is_a_statistic_or_is_left_out_for_a_reason(status):
    def leaves(value: Any, path: str = "") -> Iterator[str]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                if key not in statistics.NOT_EXPORTED:
                    yield from leaves(inner, f"{path}.{key}".lstrip("."))
        elif not isinstance(value, str):
            yield path

    known = {path for each in statistics.HOSTD for path in ([each.where] if isinstance(each.where, str) else each.where.values())}
    ports = {path for path in leaves(status) if path.startswith(("counters.client_", "counters.host_"))}  # of the kernel's rings: see wave status
    covered = {path for path in leaves(status) for one in known if path == one or path.startswith(one + ".") or fits(path, one)}
    assert {path for path in leaves(status) if path != "agent"} - covered - ports == set()
    if status["report"] and status["subsystem"] == "sched":
        assert set(status["report"]) - {each.where for each in statistics.AGENT} - set(statistics.NOT_EXPORTED) == set()


def fits(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(one in (part, "*") for part, one in zip(parts, wanted, strict=True))


def test_every_metric_that_the_dashboard_names_exists_with_the_labels_it_asks_for():
    dashboard = json.loads(DASHBOARD.read_text())
    known = {}
    for each in statistics.everything():
        suffixes = ("_bucket", "_sum", "_count") if each.kind is Kind.HISTOGRAM else ("_total",) if each.kind is Kind.COUNTER else ("",)
        known |= {each.name + suffix: {*statistics.labels_of(each), "le"} for suffix in suffixes}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    assert len(queries) > 10
    named = set()
    for query in queries:
        for name, selector in re.findall(r"(wave_\w+)(?:\{([^}]*)\})?", query):
            assert name in known, f"{name}: no such metric, in {query}"
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= known[name] | {"instance", "job"}, f"{name} has no label {labels - known[name]}"
            named.add(name)
    assert {"wave_decision_round_trip_seconds_bucket", "wave_decision_staleness_seconds_bucket", "wave_decisions_total", "wave_hostd_up"} <= named
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) and all(panel["title"] for panel in dashboard["panels"])


# The endpoint


@pytest.fixture
def serve():
    exporters: list[tuple[Exporter, threading.Thread]] = []

    def begin(listen: str, daemons: Daemons) -> Exporter:
        made = Exporter(listen, registry_of(daemons))
        thread = threading.Thread(target=made.serve)
        thread.start()
        exporters.append((made, thread))
        return made

    yield begin
    for made, thread in exporters:
        made.stop()
        thread.join()
        made.close()


def test_prometheus_reads_them_over_http_on_loopback(serve):
    url = serve("127.0.0.1:0", Daemons(ask=lambda: [sched()])).url
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert b'wave_hostd_up{enclave="web"} 1.0' in answer.read()


def test_a_proxy_reads_them_on_a_unix_socket_that_strangers_may_not_open(serve, tmp_path):
    path = tmp_path / "metrics.sock"
    exporter = serve(f"unix:{path}", Daemons(ask=lambda: [sched()]))
    assert path.stat().st_mode & 0o777 == 0o660 and not exporter.open_to_all
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        line.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        heard = b""
        while data := line.recv(65_536):
            heard += data
    assert heard.startswith(b"HTTP/1.0 200") and b"wave_hostd_up" in heard


def test_however_many_scrape_a_daemon_is_asked_once_a_second():
    asked, now = [], [0.0]
    daemons = Daemons(ask=lambda: asked.append(1) or [sched()], clock=lambda: now[0])
    for _ in range(20):
        list(daemons.collect())
    assert len(asked) == 1
    now[0] = 1.5
    list(daemons.collect())
    assert len(asked) == 2


def test_all_interfaces_only_when_told():
    made = Exporter("0.0.0.0:0", registry_of(Daemons(ask=list)))
    assert made.open_to_all
    made.close()


@pytest.mark.parametrize("listen", ["19283", ":19283", "127.0.0.1:port", "127.0.0.1:70000", "192.0.2.1:19283", "unix:/nowhere/at/all.sock"])
def test_a_place_that_is_none_is_said_in_a_line(listen, capsys):
    assert run(["metrics", "--listen", listen]) == 2
    assert f"--listen {listen}: " in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_in_a_line(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        assert run(["metrics", "--listen", listen]) == 2
    assert f"--listen {listen}: taken by another process" in capsys.readouterr().err


def test_a_socket_left_by_a_killed_exporter_is_taken_over_and_a_living_ones_is_not(tmp_path):
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    made = Exporter(f"unix:{path}", registry_of(Daemons(ask=list)))
    with pytest.raises(ConfigError, match="taken by another process"):
        Exporter(f"unix:{path}", registry_of(Daemons(ask=list)))
    made.close()
    assert not path.exists()


def test_once_prints_them_and_ends(monkeypatch, capsys):
    monkeypatch.setattr(source, "statuses", lambda *_, **__: [sched()])
    assert run(["metrics", "--once"]) == 0
    assert '\nwave_hostd_up{enclave="web"} 1.0\n' in capsys.readouterr().out


def test_the_list_describes_each(capsys):
    assert run(["metrics", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"name": "wave_fallbacks_total", "type": "counter", "unit": "", "labels": "enclave"}.items() <= next(
        row for row in rows if row["name"] == "wave_fallbacks_total"
    ).items()


def test_an_agentd_that_is_not_there_is_an_error_in_a_line(tmp_path):
    with pytest.raises(LinkError, match=r"no agentd tells of itself at .*nobody\.sock"):
        source.agent_status(tmp_path / "nobody.sock")


def test_another_machine_and_users_of_the_group_are_told_by_the_administration(monkeypatch):
    from waveos import admin

    class Fake:
        def __init__(self, *, start: bool) -> None:
            assert not start, "one who looks starts nothing"

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def enclaves(self) -> list[dict[str, Any]]:
            return [sched(), memory()]

    monkeypatch.setattr(admin, "Admin", Fake)
    monkeypatch.setenv("WAVE_ADMIN", "far:7443")
    assert [each["enclave"] for each in source.statuses()] == ["web", "cache"]
    web, nosuch = source.statuses(["web", "nosuch"], detail=True)
    assert web == sched() and nosuch["error"] == "no hostd runs for an enclave 'nosuch'; those that do: web, cache"


def test_an_administration_that_cannot_be_asked_is_said_and_tells_nothing(monkeypatch, capsys):
    monkeypatch.setenv("WAVE_ADMIN", "far:7443")
    from waveos import admin

    monkeypatch.setattr(admin, "Admin", Refused)
    assert told(*source.statuses()) == {}
    assert run(["top", "--once"]) == 2
    assert "name the folder in WAVE_ADMIN_TLS" in capsys.readouterr().err


class Refused:
    def __init__(self, *, start: bool) -> None:
        raise ConfigError("name the folder in WAVE_ADMIN_TLS")


def test_enclaves_are_those_with_a_control_socket(tmp_path, monkeypatch):
    from waveos.host import restore

    monkeypatch.setattr(restore, "RUN", tmp_path)
    assert source.enclaves() == [] and source.statuses() == []
    (tmp_path / "demo").mkdir()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "demo" / "control.sock"))
    assert source.enclaves() == ["demo"]
    [status] = source.statuses()
    assert status["enclave"] == "demo" and "no hostd runs" in status["error"]
    assert os.listdir(tmp_path) == ["demo"]
