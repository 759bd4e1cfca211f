"""The endpoint that Prometheus reads: HTTP on loopback, or on a UNIX socket for a proxy; on other addresses only where it is told so."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import socketserver
from http.server import HTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler

from waveos.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PATIENCE_S = 5.0
"""A scraper that sends no request, or does not read its answer, for so long is shown out."""


class _Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True

    def handle_error(self, _request: Any, _address: Any) -> None:
        """A scraper that went away in mid-answer is no news."""


class _Inet6(_Server):
    address_family = socket.AF_INET6


class _Unix(_Server):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        """As any stream server's; there is no name of a host to look up."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address), 0

    def get_request(self) -> tuple[socket.socket, Any]:
        """With an address that the handler can show."""
        line, _ = self.socket.accept()
        return line, ("local", 0)


class Exporter:
    """Serves one registry at one place: `HOST:PORT`, `[V6]:PORT` or `unix:PATH`. Port 0 is any free one."""

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        """Raises ConfigError if that is no place, or taken."""
        handler: Any = MetricsHandler.factory(registry)
        handler.timeout = PATIENCE_S
        self._path: Path | None = None
        self.open_to_all = False
        if listen.startswith("unix:"):
            self._path = Path(listen.removeprefix("unix:"))
            self._server = self._bind(_Unix, os.fspath(self._path), handler, listen)
            os.chmod(self._path, 0o660)
            self.url = listen
            return
        host, colon, port = listen.rpartition(":")
        host = host.strip("[]")
        if not colon or not host or not port.isdecimal() or int(port) > 65_535:
            raise ConfigError(f"--listen {listen}: write HOST:PORT, as 127.0.0.1:19283, or unix:PATH")
        self._server = self._bind(_Inet6 if ":" in host else _Server, (host, int(port)), handler, listen)
        self.open_to_all = host not in LOOPBACK
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/metrics"

    def _bind(self, kind: type[_Server], address: Any, handler: Any, listen: str) -> _Server:
        try:
            if self._path is not None and _is_stale(self._path):
                self._path.unlink()
            return kind(address, handler)
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None)
            if number == errno.EADDRINUSE:
                raise ConfigError(f"--listen {listen}: taken by another process; stop that one, or name another place") from None
            raise ConfigError(
                f"--listen {listen}: {getattr(error, 'strerror', None) or error}; name an address of this machine, or unix:PATH"
            ) from None

    def serve(self) -> None:
        """Until `stop`, or a signal's exception."""
        self._server.serve_forever()

    def stop(self) -> None:
        """From another thread."""
        self._server.shutdown()

    def close(self) -> None:
        """Give the place back."""
        self._server.server_close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    """A socket where nobody listens: its owner was killed, or the power went."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX) as line, contextlib.suppress(OSError):
        line.connect(os.fspath(path))
        return False
    return True
