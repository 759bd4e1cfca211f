"""The administration: who may read reads, who may order orders, and whatever is wrong is said in one line."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from stand_in import DEADLINE_S, REPORT, STATUS, WAVE, until

from waveos import admin, figures
from waveos.admin import Admin
from waveos.cli import run
from waveos.errors import ConfigError, LinkError

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="root's")


def free_port() -> int:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


def test_a_status_comes_through_the_wire_as_hostd_tells_it() -> None:
    told = {**STATUS, "report": REPORT}
    assert figures.from_message(figures.to_message(told)) == told
    bare = {**STATUS, "policy": None, "agent": None, "report": None, "params": {}}
    assert figures.from_message(figures.to_message(bare)) == bare


@pytest.mark.parametrize("report", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}, {"a": {"b": 1}, "a/b": {"c": 2}}, {"a": [1], "a/b/c": 2}])
def test_figures_that_want_the_same_place_are_no_readers_end(report) -> None:
    assert figures.from_message(figures.to_message({**STATUS, "report": report}))["counters"] == STATUS["counters"]


def test_statuses_policies_and_orders(world) -> None:
    web, db = world.hostd("web"), world.hostd("db")
    world.serve()
    with Admin() as asked:
        assert [each["enclave"] for each in asked.enclaves()] == ["db", "web"]
        assert asked.status("web")["counters"] == STATUS["counters"]
        assert {each["name"]: each["code"] for each in asked.policies()}["fifo"] == "waveos.agents.sched.fifo:Fifo"
        with pytest.raises(ConfigError, match="name the enclave: db, web"):
            asked.status()
        with pytest.raises(ConfigError, match="no hostd runs for an enclave 'wep'"):
            asked.status("wep")
    with Admin(control=True) as asked:
        told = asked.set_policy("web", "shinjuku", {"quantum_us": 30})
        assert told == {"policy": "shinjuku", "params": {"quantum_us": 30.0}, "generation": 2, "was": "fifo"}
        assert web.asked[-1] == {"do": "set-policy", "policy": "shinjuku", "params": {"quantum_us": 30.0}}
        web.answers["set-policy"] = {"ok": False, "error": "the enclave has no agent now"}
        with pytest.raises(ConfigError, match="has no agent now"):
            asked.set_policy("web", "fifo")
        (db.place / "journal").touch()
        with subprocess.Popen(["true"]) as ended:
            db.answers["status"]["pid"] = ended.pid
        assert asked.drain("db") is False, "its hostd is gone and its journal is not"
        assert db.asked[-1] == {"do": "stop"}


@pytest.mark.parametrize(
    ("report", "named"),
    [
        ({"messages": 1 << 64}, "in its report, 'messages' is 18446744073709551616"),
        ({"of": {"policy": -(1 << 63) - 1}}, "'of/policy'"),
        ({"event_ns": [[1_000, -1]]}, "'event_ns'"),
        ({"event_ns": [[1_000, None]]}, "'event_ns'"),
        ({"event_ns": [[float("inf"), 1]]}, "'event_ns'"),
        ({"rounds": [10**400]}, "'rounds'"),
        ({"policy": "\ud800"}, "'policy'"),
        ({"\ud800": 1}, r"'\\ud800'"),
        ([1], "cannot be passed on"),
    ],
)
def test_a_report_that_cannot_be_passed_on_costs_its_own_enclave_alone(world, report, named) -> None:
    world.hostd("web").answers["status"]["report"] = report
    world.hostd("db")
    world.serve()
    with Admin() as asked:
        for told in (asked.enclaves(), next(asked.counters(every_ms=100))[1]):
            db, web = told
            assert (db["enclave"], db["report"]) == ("db", REPORT)
            assert web.keys() == {"enclave", "error"} and web["enclave"] == "web"
            assert re.search(named, web["error"]) and len(web["error"].splitlines()) == 1
        assert asked.status("db")["report"] == REPORT
        for ask in (lambda: asked.status("web"), lambda: next(asked.counters("web"))):
            with pytest.raises(LinkError, match=named):
                ask()
        world.hostds["web"].answers["status"]["report"] = REPORT
        until(lambda: asked.enclaves()[1].get("report") == REPORT, "it is as good as any once it reports what can be")


def test_an_order_at_the_socket_to_read_is_refused_in_one_line(world) -> None:
    web = world.hostd("web")
    world.serve()
    from waveos.proto import admin_pb2 as pb
    from waveos.proto import admin_pb2_grpc as stubs

    with grpc.insecure_channel(f"unix:{admin.socket_path(False)}") as channel:
        control = stubs.ControlStub(channel)
        for call, request in (
            (control.SetPolicy, pb.SetPolicyRequest(enclave="web", policy="fifo")),
            (control.Drain, pb.DrainRequest(enclave="web")),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call(request)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert f"this socket is to read; {admin.socket_path(True)} is to order" in refused.value.details()
    assert web.asked == []


def test_health_and_reflection_say_what_is_served(world) -> None:
    world.serve()
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    for control in (False, True):
        with grpc.insecure_channel(f"unix:{admin.socket_path(control)}") as channel:
            well = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="wave.admin.v1.Read"))
            assert well.status == health_pb2.HealthCheckResponse.SERVING
            question = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(question)
            names = {each.name for each in answer.list_services_response.service}
            assert {"wave.admin.v1.Read", "wave.admin.v1.Control", "grpc.health.v1.Health"} <= names


def test_many_who_listen_to_counters_cost_hostd_one_question_an_interval(world) -> None:
    web = world.hostd("web")
    world.serve()
    with Admin() as asked, Admin() as other:
        streams = [each.counters("web", every_ms=200) for each in (asked, other) for _ in range(4)]
        first = [next(each) for each in streams]
        assert len({statuses[0]["counters"]["rings"] for _, statuses in first}) == 1
        assert len(web.asked) <= 4
        (again, _), (before, _) = next(streams[0]), first[0]
        assert again > before
        with pytest.raises(ConfigError, match="every_ms = 5: 100 or more"):
            next(asked.counters("web", every_ms=5))
        web.close()
        (web.place / "control.sock").unlink()
        with pytest.raises(ConfigError, match="no hostd runs"):
            for _ in streams[0]:
                pass


def test_the_sockets_are_for_those_whom_they_are_for(world) -> None:
    world.serve()
    assert stat.S_IMODE(admin.socket_path(True).stat().st_mode) == 0o600
    read = admin.socket_path(False).stat()
    try:
        import grp

        assert (stat.S_IMODE(read.st_mode), read.st_gid) == (0o660, grp.getgrnam("wave").gr_gid)
    except KeyError:
        assert stat.S_IMODE(read.st_mode) == 0o600, "without that group nobody but the owner"


@ROOT
def test_root_gives_up_all_that_it_does_not_need(world) -> None:
    process = world.serve()
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    try:
        assert status["Uid"].split() == [str(pwd.getpwnam("wave-admin").pw_uid)] * 4
        assert int(status["CapEff"], 16) == 0
    except KeyError:
        assert int(status["CapEff"], 16) == 1, "CAP_CHOWN"


@ROOT
def test_who_may_not_come_in_is_told_who_may(world) -> None:
    world.serve()
    code = "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); import socket\n"
    code += "for path in sys.argv[1:]:\n try: socket.socket(socket.AF_UNIX).connect(path)\n except PermissionError: print('refused')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *(str(admin.socket_path(each)) for each in (False, True))], capture_output=True, text=True
    )
    if "refused" not in done.stdout and done.returncode:
        pytest.skip("nobody may not run this Python")
    assert done.stdout.split() == ["refused"] * 2


def test_what_a_power_cut_left_is_in_nobodys_way_and_a_second_service_is_refused(world) -> None:
    process = world.serve()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert admin.socket_path(False).is_socket() and admin.socket_path(True).is_socket()
    (world.run / "web").mkdir()
    with socket.socket(socket.AF_UNIX) as dead:  # a hostd's, likewise
        dead.bind(str(world.run / "web" / "control.sock"))
    world.serve()
    with Admin(start=False) as asked:
        assert asked.enclaves() == []
        with pytest.raises(ConfigError, match="no hostd runs for an enclave 'web'"):
            asked.status("web")
    assert "an administration serves" in world.refused()


def test_without_a_service_one_who_may_not_start_it_is_told_how(world) -> None:
    with pytest.raises(ConfigError, match=r"no administration runs on this machine .*systemctl start wave-admin"):
        Admin(start=False)


@ROOT
def test_root_without_a_service_gets_one_that_ends_with_the_last_enclave(world, capsys) -> None:
    web = world.hostd("web")
    assert run(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == REPORT
    assert run(["enclaves"]) == 0
    assert "sched_ext" in capsys.readouterr().out
    assert run(["set-policy", "web", "shinjuku", "--param", "quantum_us=30"]) == 0
    assert "web: shinjuku, no longer fifo" in capsys.readouterr().out
    web.close()  # killed: its socket lies there still
    until(lambda: not admin.socket_path(False).exists(), "it ends")


def test_over_tcp_certificates_say_who_may_read_and_who_may_order(world, certificates, tmp_path, monkeypatch) -> None:
    web = world.hostd("web")
    port = free_port()
    files = ["--cert", f"{certificates}/server.pem", "--key", f"{certificates}/server.key", "--clients", f"{certificates}/ca.pem"]
    world.serve("--listen", f"127.0.0.1:{port}", *files, "--controller", "operator")
    monkeypatch.setenv("WAVE_ADMIN", f"localhost:{port}")

    def be(name: str) -> None:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).mkdir()
        for source, target in ((f"{name}.pem", "cert.pem"), (f"{name}.key", "key.pem"), ("ca.pem", "ca.pem")):
            shutil.copy(certificates / source, tmp_path / name / target)
        monkeypatch.setenv("WAVE_ADMIN_TLS", str(tmp_path / name))

    be("reader")
    with Admin() as asked:
        assert asked.status("web")["report"] == REPORT
    with Admin(control=True) as asked, pytest.raises(ConfigError, match=r"set-policy: the certificate of localhost, reader may read"):
        asked.set_policy("web", "fifo")
    be("operator")
    with Admin(control=True) as asked:
        assert asked.set_policy("web", "shinjuku")["was"] == "fifo"
    be("stranger")
    web.asked.clear()
    with Admin() as asked, pytest.raises(LinkError, match="lets nobody in with these certificates"):
        asked.status("web")
    assert web.asked == []
    be("expired")
    with pytest.raises(ConfigError, match="expired on"):
        Admin()
    monkeypatch.delenv("WAVE_ADMIN_TLS")
    with pytest.raises(ConfigError, match="name the folder of"):
        Admin()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as plain, pytest.raises(grpc.FutureTimeoutError):  # without TLS nobody is heard
        grpc.channel_ready_future(plain).result(timeout=1)


@pytest.mark.parametrize(
    ("address", "cert", "code", "says"),
    [
        ("foo", "reader", 2, "WAVE_ADMIN='foo': write HOST:PORT"),
        ("localhost:7443", "junk", 2, "cert.pem: no certificate in PEM"),
        ("localhost:7443", "operator", 2, "is not the key of"),
        ("localhost:1", "reader", 4, "nobody answers (Connection refused)"),
        ("wave.invalid:7443", "reader", 4, "nobody answers ("),
    ],
)
def test_what_is_wrong_with_another_machines_administration_is_one_line(certificates, tmp_path, address, cert, code, says) -> None:
    (tmp_path / "cert.pem").write_text("junk" if cert == "junk" else (certificates / f"{cert}.pem").read_text())
    shutil.copy(certificates / "reader.key", tmp_path / "key.pem")
    shutil.copy(certificates / "ca.pem", tmp_path / "ca.pem")
    surroundings = {**os.environ, "WAVE_ADMIN": address, "WAVE_ADMIN_TLS": str(tmp_path)}
    done = subprocess.run([*WAVE, "status", "web"], env=surroundings, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_what_is_wrong_with_the_address_or_the_files_is_said_in_one_line(world, certificates, tmp_path) -> None:
    server, key, ca = (str(certificates / name) for name in ("server.pem", "server.key", "ca.pem"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        at = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "Address already in use" in world.refused("--listen", at, "--cert", server, "--key", key, "--clients", ca)
    (tmp_path / "open.key").write_bytes((certificates / "server.key").read_bytes())
    (tmp_path / "open.key").chmod(0o644)
    (tmp_path / "junk").write_text("junk")
    for arguments, says in (
        ((server, key), "mutual TLS or not at all: give --clients"),
        ((f"{tmp_path}/none.pem", key, ca), "none.pem: No such file"),
        ((str(certificates / "expired.pem"), str(certificates / "expired.key"), ca), "expired on"),
        ((server, str(certificates / "reader.key"), ca), "is not the key of"),
        ((f"{tmp_path}/junk", key, ca), "no certificate in PEM"),
        ((server, f"{tmp_path}/junk", ca), "no private key in PEM"),
        ((server, f"{tmp_path}/open.key", ca), "can be read by others"),
    ):
        options = [word for pair in zip(("--cert", "--key", "--clients"), arguments, strict=False) for word in pair]
        assert says in world.refused("--listen", "127.0.0.1:1", *options)
    assert "write HOST:PORT" in world.refused("--listen", "here", "--cert", server, "--key", key, "--clients", ca)
    assert "are for --listen" in world.refused("--cert", server)


def test_the_service_ends_cleanly_and_takes_its_sockets_with_it(world) -> None:
    process = world.serve()
    process.terminate()
    assert process.wait(DEADLINE_S) == 0
    assert not admin.socket_path(False).exists() and not admin.socket_path(True).exists()
