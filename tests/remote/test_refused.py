"""Who may speak: keys and how they are kept, peers without one, and peers whose key is taken back while they speak."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import zmq
from two_machines import until

from waveos import record
from waveos.cli import run
from waveos.errors import ConfigError, LinkError
from waveos.keys import LOOK_S, Keys
from waveos.link import exchange as exchanges
from waveos.link.frames import Kind, pack, pack_json
from waveos.link.zmq import parse_url
from waveos.sched import MESSAGE, Message
from waveos.sched.records import SUBSYSTEM


def refusals(machines) -> list[str]:
    return [line for line in machines.said if "refused" in line or "dropped" in line]


def test_an_unknown_key_is_refused_and_said_once_and_the_host_is_told_what_to_do(machines, tmp_path):
    agent = machines.link("agent")
    stranger = Keys(tmp_path / "stranger")
    public = stranger.new().public
    stranger.add("dpu", machines.dpu.own().public)
    host = machines.link("host", keys=stranger)
    until(lambda: agent.peer_alive() or "wave keys add NAME" in host.trouble, host.trouble)
    assert public in host.trouble and not host.peer_alive()
    host.close()
    again = machines.link("host", keys=stranger)
    until(lambda: agent.peer_alive() or "wave keys add NAME" in again.trouble)
    assert len([line for line in refusals(machines) if public in line]) == 1
    machines.dpu.add("stranger", public)
    until(lambda: agent.peer_alive() and again.peer_alive(), "it is let in once its key is added")


def test_a_peer_in_plain_text_is_refused_and_said_once(machines):
    agent = machines.link("agent")
    context = zmq.Context()
    try:
        for _ in range(3):
            plain = context.socket(zmq.DEALER)
            plain.linger = 0
            plain.connect(parse_url(machines.url)[1])
            plain.send(pack_json(Kind.HELLO, record.VERSION, SUBSYSTEM, 1, {"enclave": "x", "txns": 64}))
            until(lambda: agent.peer_alive() or refusals(machines))
            assert not plain.poll(50)
            plain.close()
        assert len(refusals(machines)) == 1 and "CURVE" in refusals(machines)[0]
        assert not agent.peer_alive()
    finally:
        context.destroy(0)


def test_a_host_does_not_speak_with_whoever_has_not_the_key_it_expects(machines, tmp_path):
    machines.link("agent")
    machines.host.add("elsewhere", Keys(tmp_path / "elsewhere").new().public)
    from waveos.link import open_link

    url = f"zmq+tcp://elsewhere@127.0.0.1:{machines.port}"
    host = open_link(url, side="host", keys=machines.host)
    machines.open.append(host)
    until(lambda: machines.open[0].poll_messages() is None or "'elsewhere'" in host.trouble or "nobody" in host.trouble)
    assert not host.peer_alive()


def test_what_a_host_sends_is_dropped_within_a_second_of_its_revocation_though_its_connection_stays(machines):
    host, agent = machines.both()
    machines.dpu.revoke("h1")
    revoked_s = time.monotonic()
    message, newest_s = np.zeros(1, MESSAGE), 0.0
    dropped = agent._exchange
    end_s = revoked_s + 30
    while dropped.dropped < 20 and time.monotonic() < end_s:
        host.send_messages(message)
        if len(agent.poll_messages()):
            newest_s = time.monotonic()
    assert dropped.dropped >= 20
    assert newest_s <= revoked_s + 5.0 and LOOK_S <= 0.5, "half a second is what it takes; a busy machine may stop us meanwhile"
    assert not agent.peer_alive()
    assert len([line for line in refusals(machines) if "h1" in line and "revoked" in line]) == 1
    machines.dpu.add("h1", machines.host.own().public)
    until(lambda: agent.peer_alive() and host.peer_alive(), "added again, it may speak again")


def test_what_an_agent_decides_is_dropped_within_a_second_of_its_revocation(machines):
    host, agent = machines.both()
    machines.host.revoke("dpu")
    revoked_s, newest_s = time.monotonic(), 0.0
    while host.peer_alive():
        agent.txn_create(1)
        agent.txns_commit()
        if len(host.poll_txns()):
            newest_s = time.monotonic()
        assert time.monotonic() < revoked_s + 30
    assert newest_s <= revoked_s + 5.0 and LOOK_S <= 0.5, "half a second is what it takes; a busy machine may stop us meanwhile"
    assert "revoked" in host.trouble
    machines.host.add("dpu", machines.dpu.own().public)
    until(lambda: agent.peer_alive() and host.peer_alive())


def test_a_key_that_has_expired_is_as_good_as_none(machines, monkeypatch):
    machines.dpu.add("h1", machines.host.own().public, days=1)
    host, agent = machines.both()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 2 * 86_400)
    until(lambda: host.send_messages(np.zeros(1, MESSAGE)) >= 0 and not agent.peer_alive(), "a clock that steps ends what has expired")
    monkeypatch.setattr(time, "time", now)
    until(lambda: agent.peer_alive() and host.peer_alive(), "and a clock that steps back brings it back")


def test_an_own_key_that_has_expired_is_said_to_be(machines, tmp_path, monkeypatch):
    keys = Keys(tmp_path / "short")
    keys.new(days=1)
    keys.add("dpu", machines.dpu.own().public)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 2 * 86_400)
    with pytest.raises(LinkError, match=r"own key has expired on .*--replace"):
        machines.link("host", keys=keys)


def test_a_host_that_is_refused_goes_on_trying_though_its_own_key_expires_meanwhile(machines, tmp_path, monkeypatch):
    agent = machines.link("agent")
    stranger = Keys(tmp_path / "stranger")
    public = stranger.new(days=1).public
    stranger.add("dpu", machines.dpu.own().public)
    host = machines.link("host", keys=stranger)  # the agent lets nobody in, and refuses nobody, until one of its verbs is called
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 2 * 86_400)
    until(lambda: agent.peer_alive() or f"wave keys add NAME {public}" in host.trouble, host.trouble)
    machines.dpu.add("stranger", public)
    until(lambda: agent.peer_alive() and host._session is not None, "its thread has died")


def test_a_host_whose_key_is_replaced_is_at_no_moment_refused(machines):
    host, agent = machines.both()
    old = machines.host.own().public
    machines.dpu.add("h1-new", machines.host.new(replace=True).public)
    host.send_messages(np.zeros(1, MESSAGE))
    until(lambda: len(agent.poll_messages()), "who runs has the old key")
    host.close()
    until(lambda: not agent.peer_alive())
    agent.reattach()
    host = machines.link("host")
    until(lambda: agent.peer_alive() and host.peer_alive())
    machines.dpu.revoke("h1")
    until(lambda: agent.peer_alive() and agent._exchange.keys.known(old).state == "revoked")
    host.send_messages(np.zeros(1, MESSAGE))
    until(lambda: len(agent.poll_messages()), "the new one is another")
    assert host.broken == 0 and agent._exchange.dropped == 0


def test_each_refusal_is_said_once_a_minute_at_most(machines, monkeypatch):
    agent = machines.link("agent")
    say = agent._exchange.say_seldom
    for _ in range(1_000):
        say("refused it", ", from somewhere")
    assert refusals(machines) == ["refused it, from somewhere"]
    monkeypatch.setattr(exchanges, "SAID_EVERY_S", 0.0)
    say("refused it")
    assert len(refusals(machines)) == 2
    monkeypatch.setattr(exchanges, "SAID_EVERY_S", 60.0)
    for number in range(5_000):
        say(f"refused {number}")
    assert len(refusals(machines)) <= 2 + exchanges.MAX_ROUTES, "who has very many keys does not fill the log"


ODD = ["0", "-1", "1000000000", "1" * 3_000, "1e999", "-1e999", "NaN", "2.0", "true", "null", '"8"', "[8]", '{"a": 1}', "[" * 400 + "]" * 400]
"""What a hello may say where a number stands, as JSON."""


def test_a_hello_that_says_what_cannot_be_is_refused_with_a_line_and_the_agent_serves_the_others(machines):
    agentd = machines.agentd("fifo")
    host = machines.link("host", about={"enclave": "honest", "cpus": 1, "threads": 8})
    until(host.peer_alive)
    hellos = [{"enclave": '"e"', "txns": "64", name: odd} for name in ("enclave", "txns", "messages", "cpus", "threads", "ahead") for odd in ODD]
    hellos += [{"enclave": '"e"'}, {"enclave": '"e"', "txns": "64", "ahead": "4"}, {"txns": "64"}]
    for number, told in enumerate(hellos):
        body = "{" + ", ".join(f'"{name}": {value}' for name, value in told.items()) + "}"
        with host._lock:
            host._socket.send(pack(Kind.HELLO, record.VERSION, SUBSYSTEM, number, body=body.encode()))
    host.send_messages(state())
    assert until(lambda: host.poll_txns()["tid"].tolist()) == [3], "it decides for a host that came before"
    later = machines.link("host", about={"enclave": "later", "cpus": 1, "threads": 8})
    until(later.peer_alive, "and for one that comes after")
    assert host.broken == 0
    agentd.terminate()
    _, error = agentd.communicate(timeout=60)
    assert agentd.returncode == 0
    lines = error.splitlines()
    assert all(line.startswith("agentd: zmq+tcp://") and "refused h1: " in line and len(line) < 300 for line in lines), error
    for says in (
        "cpus 0: 1 to 1024 can be",
        "threads 1000000000: 1 to 65536 can be",
        "ahead 4: 0 to 3 can be",
        "a hello says messages as a whole number, of 2 to 16777216 records",
        "a hello says txns as a whole number, of 2 to",
        "a hello says cpus as a whole number",
        "a hello says enclave, a name",
    ):
        assert any(says in line for line in lines), says
    assert len(set(lines)) == len(lines)


def state() -> np.ndarray:
    """An enclave with one idle CPU, and one thread that can run."""
    told = np.zeros(5, MESSAGE)
    told["version"], told["subsystem"], told["tid"], told["cpu"], told["seq"] = record.VERSION, SUBSYSTEM, -1, -1, 1
    told["type"] = Message.RESYNC, Message.CPU_NEW, Message.CPU_IDLE, Message.THREAD_NEW, Message.THREAD_RUNNABLE
    told["cpu"][1:3], told["tid"][3:] = 0, 3
    return told


def test_a_host_is_told_why_what_it_says_of_its_enclave_cannot_be_and_comes_in_once_it_can(machines):
    agentd = machines.agentd("fifo")
    host = machines.link("host", about={"enclave": "e", "cpus": 0})
    until(lambda: "the host says of its enclave cpus 0: 1 to 1024 can be; mend what it says" in host.trouble)
    host._about["cpus"] = 1
    until(host.peer_alive)
    assert agentd.poll() is None


def test_a_welcome_or_refusal_that_says_what_cannot_be_makes_no_session_and_no_second_line(machines):
    host = machines.link("host")

    def hear(kind: Kind, body: str) -> None:
        with host._lock:
            host._hear(pack(kind, record.VERSION, SUBSYSTEM, host._asked, body=body.encode()))

    deep = "[" * 400 + "]" * 400
    for odd in ODD:
        hear(Kind.WELCOME, f'{{"messages": {odd if odd != "1000000000" else 1 << 25}}}')
        hear(Kind.REFUSED, f'{{"why": {odd}}}')
        assert host._session is None
        assert host.trouble.endswith(("does not say why", ": 8"))
    for body in ("", "7", "{}", "\xff", deep, '{"messages": 1'):
        hear(Kind.WELCOME, body)
    assert host.nonsense == len(ODD) + 6
    hear(Kind.REFUSED, '{"why": "a line\\nwave: and another\\u001b[31m"}')
    assert host.trouble.endswith("refuses this host: a linewave: and another[31m")
    hear(Kind.WELCOME, f'{{"messages": 64, "policy": {deep}, "pid": true}}')
    assert (host._session is not None, host.policy, host.await_agent(0)) == (True, "", 0)


# ── the files, and the command ───────────────────────────────────────────────────────────────────────────────────────


def test_the_secret_is_its_owners_alone_and_a_key_in_use_is_not_replaced_unasked(tmp_path):
    keys = Keys(tmp_path / "k")
    first = keys.new()
    assert stat.S_IMODE(os.stat(tmp_path / "k" / "own.toml").st_mode) == 0o600
    with pytest.raises(ConfigError, match="--replace"):
        keys.new()
    assert keys.new(replace=True).public != first.public
    assert not [path for path in (tmp_path / "k").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "public = 7",
        'public = "zz"',
        "public = [",
        'public = "' + "0" * 64 + '"\nexpires = "soon"',
        'public = "' + "0" * 64 + '"\nmore = 1',
        "\0\xff",
    ],
)
def test_a_malformed_key_file_is_nobodys_key_and_is_said_to_be_one(machines, text):
    (machines.dpu.folder / "peers" / "h1.toml").write_text(text)
    [peer] = machines.dpu.peers()
    assert peer.state == "malformed"
    with pytest.raises(LinkError, match=r"h1\.toml .*; remove it, or add the key anew"):
        machines.dpu.peer("h1")
    assert Keys(machines.dpu.folder).known(machines.host.own().public) is None
    (machines.dpu.folder / "own.toml").write_text(text)
    with pytest.raises(LinkError, match=r"own\.toml"):
        machines.dpu.own()


def test_a_damaged_file_of_one_peer_is_in_no_others_way(machines, monkeypatch, capsys):
    (machines.dpu.folder / "peers" / "bad.toml").write_text("public = [")
    machines.dpu.add("h2", "0" * 64)
    assert machines.dpu.revoke("h2").state == "revoked"
    assert machines.dpu.peer().name == "h1"
    with pytest.raises(LinkError, match="remove it, or add the key anew"):
        machines.dpu.revoke("bad")
    monkeypatch.setenv("WAVE_KEYS", str(machines.dpu.folder))
    assert run(["keys", "list"]) == 0
    shown = capsys.readouterr()
    assert "malformed" in shown.out and "h1" in shown.out and "remove it" in shown.err
    machines.dpu.add("bad", "1" * 64)
    assert [key.state for key in machines.dpu.peers()] == ["valid", "valid", "revoked"]


ALL_USERS = os.geteuid() == 0 and "4294967295" in Path("/proc/self/uid_map").read_text()


@pytest.mark.skipif(not ALL_USERS, reason="root's, where all users are known: it gives files to one")
def test_what_root_writes_into_anothers_folder_is_that_ones_to_read_whatever_the_umask(tmp_path):
    folder, target = tmp_path / "k", tmp_path / "target"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12_345, 12_346)
    target.write_text("as it was")
    before = os.umask(0o077)
    try:
        public = Keys(folder).new().public
        (folder / f".own.toml.{os.getpid()}").symlink_to(target)
        Keys(folder).new(replace=True)
        Keys(folder).add("dpu", public)
    finally:
        os.umask(before)
    found = {path.relative_to(folder).as_posix(): path.lstat() for path in folder.rglob("*")}
    assert {name: (stat.S_IMODE(each.st_mode), each.st_uid, each.st_gid) for name, each in found.items()} == {
        "own.toml": (0o600, 12_345, 12_346),
        "peers": (0o755, 12_345, 12_346),
        "peers/dpu.toml": (0o644, 12_345, 12_346),
    }
    assert (target.read_text(), target.stat().st_uid) == ("as it was", 0)


def test_the_command_makes_adds_lists_and_revokes_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WAVE_KEYS", str(tmp_path / "k"))
    assert run(["keys", "list"]) == 0
    assert run(["keys", "new", "--days", "30"]) == 0
    public = capsys.readouterr().out.strip()
    assert run(["keys", "add", "dpu", public]) == 0
    assert run(["keys", "add", "dpu", "0" * 64]) == 2
    assert "wave keys revoke dpu" in capsys.readouterr().err
    assert run(["keys", "add", "other", "what"]) == 2
    assert run(["keys", "add", "../x", public]) == 2
    assert run(["keys", "revoke", "dqu"]) == 2
    assert "did you mean 'dpu'" in capsys.readouterr().err
    assert run(["keys", "revoke", "dpu"]) == 0
    assert run(["keys", "list"]) == 0
    shown = capsys.readouterr().out
    assert "revoked" in shown and "secret" not in shown and Keys().own().secret not in shown


def test_an_own_key_that_has_expired_is_listed_as_that_and_used_by_nothing(machines, monkeypatch, capsys):
    public = machines.host.new(days=1, replace=True).public
    monkeypatch.setenv("WAVE_KEYS", str(machines.host.folder))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 2 * 86_400)
    assert run(["keys", "list", "--json"]) == 0
    own, dpu = json.loads(capsys.readouterr().out)
    assert (own["own"], own["state"], own["public"]) == (True, "expired", public)
    assert (dpu["name"], dpu["state"]) == ("dpu", "valid")
    assert run(["relay", "web", machines.url]) == 4
    assert "own key has expired" in capsys.readouterr().err
    with pytest.raises(LinkError, match="own key has expired"):
        machines.host.own()


def test_a_frame_of_another_version_is_refused_with_a_line(machines):
    host, agent = machines.both()
    host._socket.send(pack(Kind.DATA, record.VERSION + 1, SUBSYSTEM, 5))
    host._socket.send(pack_json(Kind.HELLO, record.VERSION + 1, SUBSYSTEM, 6, {"enclave": "x", "txns": 64}))
    host._socket.send(b"WAVE\x63 of a later layout, as long as a header is, and longer than that too")
    until(
        lambda: (
            agent.peer_alive()
            and len([line for line in machines.said if "install the same waveos" in line or "no frame of this version" in line]) >= 2
        )
    )
    assert agent.peer_alive() and host.peer_alive()
