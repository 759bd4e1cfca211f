"""Requests through the namespaces: steered by an agent in a process of its own, and by the kernel when the agent dies, hangs or ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "xsk"))
from wire import why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
PORT, WORKERS = 5_000, 4
PATIENCE_S = 60.0
PATIENCE_NS = 20_000_000  # the XDP program's own
FALLBACK_S = 0.05


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    from waveos.host.net import topology
    from waveos.host.net.client import Client
    from waveos.host.net.service import UdpService

    times = [np.full(10, 50_000, np.int64), np.full(10, 2_000_000, np.int64)]
    with (
        topology.network(f"test-net-{os.getpid()}") as network,
        UdpService(network, port=PORT, workers=WORKERS, times_ns=times),
        Client(network, PORT) as client,
    ):
        yield network, client


def plan(rate: float, seconds: float, seed: int = 1) -> Any:
    from waveos.host.net.client import draw_plan

    return draw_plan(rate, seconds, 0.1, flows=64, slo_us=(2_000, 20_000), seed=seed)


def serving(network: Any, policy: str, *arguments: str, ring_size: int = 2_048, patience_s: float = 60.0) -> Any:
    """With much patience: on a machine with other work to do no request takes the kernel's path because the agent had to wait for a core."""
    from waveos.host.net.datapath import Datapath

    path = Datapath(network, port=PORT, workers=WORKERS, ring_size=ring_size)
    try:
        for port in (path.ports.client, path.ports.host):
            port.control["patience_ns"] = int(patience_s * 1e9)
        path.start_agent(policy, *arguments)
        wait_for(lambda: path.serving or path.agent_gone)
        assert not path.agent_gone
    except BaseException:
        path.close()
        raise
    return path


@pytest.mark.parametrize("policy", ["rss", "net_round_robin", "power_of_two", "jbsq", "darc", "slo_steering"])
def test_every_request_is_answered_and_steered_or_on_the_kernels_path(world: Any, policy: str) -> None:
    network, client = world
    with serving(network, policy, "--nap-us", "50") as path:
        answered = client.run(plan(300, 0.5), patience_s=PATIENCE_S)
        assert answered.unanswered == 0
        assert path.ports.client.redirect.counters()["redirected"] > 0
        assert path.ports.host.redirect.counters()["redirected"] > 0


def test_what_would_be_late_is_refused_and_the_client_told(world: Any) -> None:
    network, client = world
    with serving(network, "admission", "--nap-us", "50", "--param", "slack=0.000001"):
        sent = plan(300, 0.5)
        answered = client.run(sent, patience_s=PATIENCE_S)
        assert answered.unanswered == 0
        assert np.sum(answered.plan["status"] == 1) > len(sent) / 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_agent_costs_what_was_in_the_rings_and_no_more(world: Any, number: int) -> None:
    network, client = world
    with serving(network, "jbsq", "--nap-us", "50", patience_s=PATIENCE_NS / 1e9) as path:
        sent, hit = plan(400, 2.0), []

        def strike(since_s: float) -> None:
            if since_s > 0.5 and not hit:
                os.kill(path.agent_pid, number)
                hit.append(time.monotonic_ns())

        answered = client.run(sent, patience_s=2.0, heard=strike)
        at = answered.start_ns + answered.plan["at_ns"]
        missing = at[answered.plan["done_ns"] == 0]
        assert hit and len(missing) <= 4_096 + 4_096, "bounded by the rings"
        assert path.ports.client.redirect.counters()["unserved"] > 0, "the kernel's path took over"
        # Whatever was sent once the heart was silent for its patience went by the kernel's path: nothing of that is missing.
        patience_ns = int(path.ports.client.control["patience_ns"][0])
        assert patience_ns < FALLBACK_S * 1e9
        assert np.all(missing < hit[0] + FALLBACK_S * 1e9)
        assert np.any((at > hit[0] + FALLBACK_S * 1e9) & (answered.plan["done_ns"] > 0))


def test_an_agent_that_goes_on_after_it_hung_has_the_traffic_back_and_nothing_is_answered_twice(world: Any) -> None:
    network, client = world
    with serving(network, "jbsq", "--nap-us", "50", patience_s=PATIENCE_NS / 1e9) as path:
        os.kill(path.agent_pid, signal.SIGSTOP)
        try:
            beat = int(path.ports.client.control["heartbeat_ns"][0])
            wait_for(lambda: time.monotonic_ns() - beat > 2 * int(path.ports.client.control["patience_ns"][0]))
            assert client.run(plan(300, 0.3), patience_s=PATIENCE_S).unanswered == 0
            unserved = path.ports.client.redirect.counters()["unserved"]
            assert unserved > 0, "the kernel's path"
        finally:
            os.kill(path.agent_pid, signal.SIGCONT)
        wait_for(lambda: int(path.ports.client.control["heartbeat_ns"][0]) > beat)
        before = path.ports.client.redirect.counters()["redirected"]
        assert client.run(plan(300, 0.3), patience_s=PATIENCE_S).unanswered == 0
        assert path.ports.client.redirect.counters()["redirected"] > before


def test_the_namespaces_are_as_before_after_all_that(world: Any) -> None:
    from waveos.host.net import topology

    network, client = world
    with serving(network, "rss", "--nap-us", "50") as path:
        os.kill(path.agent_pid, signal.SIGKILL)
        wait_for(lambda: path.agent_gone)
    assert topology.find(network.name) == network
    assert client.run(plan(200, 0.2), patience_s=PATIENCE_S).unanswered == 0, "the bridge alone"


PINNED = """
from waveos import net
from waveos.policy import Policy

class Pinned(Policy, subsystem=net, name="pinned"):
    def worker_new(self, msg, txns):
        for i in range(64):
            net.set_entry(txns, index=msg.worker * 64 + i, worker=0)

    def request_arrived(self, msg, txns):
        net.steer(txns, request=msg.request, worker=3)
"""
LIMITED = """
from waveos import net
from waveos.policy import Policy

class Limited(Policy, subsystem=net, name="limited"):
    def worker_new(self, msg, txns):
        net.set_rate(txns, request_class=1, per_s=20)

    def request_arrived(self, msg, txns):
        net.steer(txns, request=msg.request, worker=2)
"""


def test_entries_of_the_table_steer_without_the_policy_being_asked(world: Any, tmp_path: Path) -> None:
    network, client = world
    (tmp_path / "pinned.py").write_text(PINNED)
    with serving(network, str(tmp_path / "pinned.py"), "--nap-us", "50") as path:
        sent = plan(300, 0.5)
        answered = client.run(sent, patience_s=PATIENCE_S)
        assert answered.unanswered == 0
        assert set(answered.plan["worker"].tolist()) == {0}, "all 256 entries name worker 0; the policy would have said 3"
        path.stop_agent()
        wait_for(lambda: path.counters.get("replies") == len(sent))
        assert path.counters["by_table"] == path.counters["requests"] == len(sent)


BY_FLOW = """
from waveos import net
from waveos.policy import Policy

class ByFlow(Policy, subsystem=net, name="by-flow"):
    def flow_opened(self, msg, txns):
        net.steer_flow(txns, flow=msg.flow, worker=1 + msg.request_class)

    def request_arrived(self, msg, txns):
        net.steer(txns, request=msg.request, worker=3)
"""


def test_a_flow_is_told_of_when_it_begins_and_steered_as_a_whole(world: Any, tmp_path: Path) -> None:
    from waveos.host.net.client import draw_plan

    network, client = world
    (tmp_path / "by_flow.py").write_text(BY_FLOW)
    with serving(network, str(tmp_path / "by_flow.py"), "--nap-us", "50") as path:
        sent = draw_plan(300, 0.5, 0.0, flows=4, slo_us=(2_000, 20_000), seed=1)
        workers = client.run(sent, patience_s=PATIENCE_S).plan["worker"].tolist()
        assert set(workers) == {1, 3}, "3 until the flow's entry was set, then 1"
        assert workers.count(1) > len(sent) / 2
        path.stop_agent()
        wait_for(lambda: path.counters.get("by_table") == workers.count(1))


def test_a_class_over_its_rate_is_refused_and_others_are_not(world: Any, tmp_path: Path) -> None:
    network, client = world
    (tmp_path / "limited.py").write_text(LIMITED)
    with serving(network, str(tmp_path / "limited.py"), "--nap-us", "50") as path:
        answered = client.run(plan(400, 1.0), patience_s=PATIENCE_S)
        assert answered.unanswered == 0
        ranges = answered.plan[answered.plan["request_class"] == 1]
        refused = int(np.sum(ranges["status"] == 1))
        assert 0 < refused < len(ranges)
        assert np.all(answered.plan["status"][answered.plan["request_class"] == 0] == 0)
        path.stop_agent()
        wait_for(lambda: path.counters.get("over_rate") == refused)


LEFT = """
import os, signal, time
from waveos.host.net import topology
from waveos.host.net.datapath import Datapath
path = Datapath(topology.find({name!r}), port={port}, workers=2)
print(path.start_agent("rss", "--nap-us", "50"), flush=True)
while not path.serving:
    assert not path.agent_gone
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_owner_leaves_is_restored_and_its_agent_ends(world: Any) -> None:
    import subprocess

    from waveos.host.net.datapath import JOURNAL
    from waveos.host.restore import names, path_of, restore

    network, client = world
    done = subprocess.run(
        [sys.executable, "-P", "-c", LEFT.format(name=network.name, port=PORT)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    name = JOURNAL + network.name
    socket_left = path_of(name).parent / "agent.sock"
    assert socket_left.exists() and name in names()
    agent = int(done.stdout)
    wait_for(lambda: not Path(f"/proc/{agent}").exists() or "Z" in Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2][:3])
    lines, failed = restore([name])
    assert lines and not failed
    assert not socket_left.exists() and name not in names()
    assert client.run(plan(200, 0.2), patience_s=PATIENCE_S).unanswered == 0


def test_a_network_has_one_data_path(world: Any) -> None:
    from waveos.errors import ConfigError
    from waveos.host.net.datapath import Datapath

    network, _ = world
    with Datapath(network, port=PORT, workers=WORKERS), pytest.raises(ConfigError, match="already has an owner"):
        Datapath(network, port=PORT, workers=WORKERS)


def test_the_agent_has_no_capability_and_serves(world: Any) -> None:
    network, client = world
    with serving(network, "rss", "--nap-us", "50") as path:
        status = Path(f"/proc/{path.agent_pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status and "CapPrm:\t0000000000000000" in status
        assert client.run(plan(200, 0.2), patience_s=PATIENCE_S).unanswered == 0


def test_strange_packets_are_dropped_and_counted_and_requests_go_on(world: Any) -> None:
    network, client = world
    from waveos.host.net.topology import inside
    from waveos.net.records import RPC, RPC_MAGIC, RPC_VERSION

    with serving(network, "rss", "--nap-us", "50") as path:
        strange = np.zeros(4, RPC)
        strange["magic"], strange["version"] = RPC_MAGIC, RPC_VERSION
        strange["request_class"][0], strange["version"][1], strange["kind"][2], strange["magic"][3] = 200, 9, 7, 1
        with inside(network.client.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
            for record in strange:
                plain.sendto(record.tobytes(), (network.host.address, PORT))
            for size in (0, 1, 39, 1_472, 1_473, 60_000):
                plain.sendto(bytes(size), (network.host.address, PORT))
            for _ in range(1_000):
                plain.sendto(b"flood", (network.host.address, PORT + 100))
        assert client.run(plan(200, 0.2), patience_s=PATIENCE_S).unanswered == 0
        assert not path.agent_gone
        # Seven come whole and are no requests: another version, kind, magic, and too short or with nothing in it; larger ones come in fragments.
        wait_for(lambda: path.counters.get("malformed") == 3 + 4 and path.counters.get("unknown_class") == 1)
        assert path.ports.client.redirect.counters()["fragments"] > 0, "the kernel's"
        assert path.ports.client.redirect.counters()["passed"] >= 1_000, "the flood was none of its business"


HOARD = """
from waveos import net
from waveos.policy import Policy

class Hoard(Policy, subsystem=net, name="hoard"):
    def request_arrived(self, msg, txns):
        pass
"""


def test_when_all_packet_memory_is_held_requests_are_refused_and_the_agent_goes_on(world: Any, tmp_path: Path) -> None:
    network, client = world
    (tmp_path / "hoard.py").write_text(HOARD)
    with serving(network, str(tmp_path / "hoard.py"), "--nap-us", "50", ring_size=64) as path:
        answered = client.run(plan(1_000, 0.5), patience_s=1.0)
        refused = int(np.sum(answered.plan["status"] == 1))
        assert refused > 0 and not path.agent_gone
        assert answered.unanswered + refused == len(answered.plan)
        assert answered.unanswered <= 4 * 64, "what the packet memory holds"
        wait_for(lambda: path.counters.get("no_slot") == refused)


NOTES_LINK = """
from waveos import net
from waveos.policy import Policy

class Notes(Policy, subsystem=net, name="notes"):
    def request_arrived(self, msg, txns):
        net.steer(txns, request=msg.request, worker=0)

    def link_down(self, msg, txns):
        for i in range(64):
            net.set_entry(txns, index=i, worker=msg.worker + 1)

    def link_up(self, msg, txns):
        for i in range(64):
            net.set_entry(txns, index=i, worker=msg.worker + 2)
"""


def test_a_wire_that_is_cut_is_told_of_and_requests_go_on_when_it_is_whole_again(world: Any, tmp_path: Path) -> None:
    from pyroute2 import NetNS

    network, client = world
    (tmp_path / "notes.py").write_text(NOTES_LINK)
    with serving(network, str(tmp_path / "notes.py"), "--nap-us", "50") as path, NetNS(network.ipu) as ns:
        index = ns.link_lookup(ifname="host")[0]
        ns.link("set", index=index, state="down")
        try:
            client.run(plan(300, 0.3), patience_s=0.5)
            wait_for(lambda: path.counters.get("cuts") == 1)
        finally:
            ns.link("set", index=index, state="up")
        wait_for(lambda: client.run(plan(300, 0.2), patience_s=1.0).unanswered == 0)
        assert not path.agent_gone
        answered = client.run(plan(300, 0.5), patience_s=PATIENCE_S)
        assert {0, 3} == set(answered.plan["worker"].tolist()), "the policy heard that the host's wire (1) was cut and is whole"


def test_a_second_agent_is_told_that_the_ports_are_taken(world: Any) -> None:
    from waveos import net
    from waveos.errors import LinkError
    from waveos.link import open_link

    network, _ = world
    with serving(network, "rss", "--nap-us", "50") as path, pytest.raises(LinkError, match="another agent"):
        open_link(path.url, side="agent", subsystem=net)
