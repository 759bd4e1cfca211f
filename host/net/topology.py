"""Client, IPU and host as three network namespaces of this machine; the IPU is a bump in the wire between the other two.

    NAME-client            NAME-ipu                 NAME-host
    eth0 10.87.0.1 ------- client --bridge-- host ------- eth0 10.87.0.2

The bridge is the kernel's own path: what no AF_XDP socket takes crosses the IPU as through a switch. Nothing outside the namespaces is touched, and
the namespaces are all there is to undo: each is in the journal before it is made.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError, MissingError
from waveos.host.restore import Entry, Journal, kind, path_of
from waveos.host.restore import names as journal_names
from waveos.host.restore import restore as restore_journals
from waveos.names import nearest

FOLDER = Path("/run/netns")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}")
ROOMS = ("client", "ipu", "host")
CLIENT_ADDRESS, HOST_ADDRESS, PREFIX = "10.87.0.1", "10.87.0.2", 24
CLONE_NEWNET = 0x4000_0000
SIOCETHTOOL, ETHTOOL_STXCSUM, ETHTOOL_SGRO = 0x8946, 0x17, 0x2C
_JOURNAL = "net-"
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Side:
    """One end of the wire: where it is, and how packets name it."""

    namespace: str
    interface: str
    address: str
    mac: bytes


@dataclass(frozen=True)
class Network:
    """A network that is up."""

    name: str
    client: Side
    host: Side

    @property
    def ipu(self) -> str:
        """The namespace between them; its interfaces are `client` and `host`, each named for the side it leads to."""
        return f"{self.name}-ipu"


def up(name: str, *, queues: int = 1) -> Network:
    """Make the three namespaces and the wires, to stay when this process ends. Raises ConfigError if the name is taken or cannot be one, MissingError
    without the right or pyroute2.
    """
    return _make(name, queues)[0]


def _make(name: str, queues: int, direct: bool = False) -> tuple[Network, Journal]:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a network: letters, digits, '.', '_' and '-', at most 41, the first a letter or digit")
    NetNS = _pyroute2().NetNS
    taken = [f"{name}-{room}" for room in ROOMS if (FOLDER / f"{name}-{room}").exists()]
    if taken:
        raise ConfigError(f"network {name!r}: there is already a namespace {taken[0]!r}; `wave net down {name}` removes it, or take another name")
    if os.geteuid():
        raise MissingError("network namespaces are made by root; run `wave net` as root")
    journal = Journal(_journal(name))
    try:
        for room in ROOMS:
            if room != "ipu" or not direct:
                journal.note("network namespace", __name__, what=f"{name}-{room}")
                NetNS(f"{name}-{room}").close()
        if direct:
            with NetNS(f"{name}-client") as ns:
                ns.link("add", ifname="eth0", kind="veth", peer={"ifname": "eth0", "net_ns_fd": f"{name}-host"})
        else:
            _join_through_ipu(NetNS, name, queues)
        client = _end(NetNS, f"{name}-client", CLIENT_ADDRESS)
        host = _end(NetNS, f"{name}-host", HOST_ADDRESS)
        _introduce(NetNS, client, host)
        _introduce(NetNS, host, client)
    except BaseException:
        journal.close()
        raise
    return Network(name, client, host), journal


def down(name: str) -> list[str]:
    """Remove the network of that name, whatever state it is in; a line for each thing removed. Raises ConfigError if something could not be,
    or the process that made it still runs.
    """
    if not path_of(_journal(name)).exists():
        raise ConfigError(f"network {name!r} is not up{nearest(name, names())}; up: {', '.join(names()) or 'none'}")
    done, failed = restore_journals([_journal(name)])
    if failed:
        raise ConfigError("; ".join(failed))
    return done


def find(name: str) -> Network:
    """The network of that name. Raises ConfigError if it is not up."""
    NetNS = _pyroute2().NetNS
    missing = [f"{name}-{room}" for room in ROOMS if not (FOLDER / f"{name}-{room}").exists()]
    if missing:
        raise ConfigError(f"network {name!r} is not up (there is no namespace {missing[0]!r}); `wave net up {name}` makes it")
    return Network(name, _side(NetNS, f"{name}-client", CLIENT_ADDRESS), _side(NetNS, f"{name}-host", HOST_ADDRESS))


def names() -> list[str]:
    """The networks that are up, whole or in part."""
    return [name.removeprefix(_JOURNAL) for name in journal_names() if name.startswith(_JOURNAL)]


@contextlib.contextmanager
def network(name: str, *, queues: int = 1, direct: bool = False) -> Iterator[Network]:
    """A network for the time of a `with`; after a crash `wave net down` or `wave restore` removes it. `direct`: without the IPU in between."""
    made, journal = _make(name, queues, direct)
    try:
        yield made
    finally:
        journal.close()


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """The calling thread in another network namespace; sockets opened there stay there."""
    with open("/proc/thread-self/ns/net") as home, open(FOLDER / namespace) as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(home.fileno())


def enter(fd: int) -> None:
    """Move the calling thread to the network namespace behind a descriptor."""
    if _libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def set_offloads(interface: str) -> None:
    """TX checksums in software, for AF_XDP sees packets as they are; GRO on, so that veth takes packets by NAPI, in batches. Not where it is not known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command, value in ((ETHTOOL_STXCSUM, 0), (ETHTOOL_SGRO, 1)):
            block = bytearray(struct.pack("=II", command, value))
            address = ctypes.addressof(ctypes.c_char.from_buffer(block))
            try:
                fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("16sP16x", interface.encode(), address))
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise


def _join_through_ipu(NetNS: Any, name: str, queues: int) -> None:
    with NetNS(f"{name}-ipu") as ipu:
        for room in ("client", "host"):
            extra = {"num_tx_queues": queues, "num_rx_queues": queues}
            peer = {"ifname": "eth0", "net_ns_fd": f"{name}-{room}", **extra}
            ipu.link("add", ifname=room, kind="veth", peer=peer, **extra)
        ipu.link("add", ifname="bridge", kind="bridge")
        bridge = ipu.link_lookup(ifname="bridge")[0]
        for interface in ("client", "host"):
            ipu.link("set", index=ipu.link_lookup(ifname=interface)[0], master=bridge, state="up")
        ipu.link("set", index=bridge, state="up")
    with inside(f"{name}-ipu"):
        for interface in ("client", "host"):
            set_offloads(interface)


def _end(NetNS: Any, namespace: str, address: str) -> Side:
    with NetNS(namespace) as ns:
        eth0 = ns.link_lookup(ifname="eth0")[0]
        ns.addr("add", index=eth0, address=address, prefixlen=PREFIX)
        ns.link("set", index=ns.link_lookup(ifname="lo")[0], state="up")
        ns.link("set", index=eth0, state="up")
    with inside(namespace):
        set_offloads("eth0")
    return _side(NetNS, namespace, address)


def _side(NetNS: Any, namespace: str, address: str) -> Side:
    with NetNS(namespace) as ns:
        (link,) = ns.get_links(ns.link_lookup(ifname="eth0")[0])
        return Side(namespace, "eth0", address, bytes.fromhex(link.get_attr("IFLA_ADDRESS").replace(":", "")))


def _introduce(NetNS: Any, to: Side, other: Side) -> None:
    """The other's address is known for good: nobody has to ask for it."""
    with NetNS(to.namespace) as ns:
        ns.neigh("add", dst=other.address, lladdr=other.mac.hex(":"), ifindex=ns.link_lookup(ifname=to.interface)[0], state=0x80)


def _pyroute2() -> Any:
    try:
        import pyroute2
    except ImportError:
        raise MissingError("network namespaces are made with pyroute2, which is not installed: pip install 'waveos[host]'") from None
    return pyroute2


def _journal(name: str) -> str:
    return _JOURNAL + name


@kind("network namespace")
def _undo_namespace(entry: Entry, dry_run: bool) -> str | None:
    name = entry["what"]
    if not (FOLDER / name).exists():
        return None
    if not dry_run:
        _pyroute2().netns.remove(name)
    return f"network namespace {name}: removed"
