"""Mutual TLS of the administration: the files that it wants, looked at before they are needed, and read again when they are replaced."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError, MissingError


@dataclass(frozen=True)
class Tls:
    """PEM files: a side's certificate and its key, and the CA whose certificates the other side may show; what an error calls each."""

    cert: Path
    key: Path
    clients: Path
    called: tuple[str, str, str] = ("--cert", "--key", "--clients")

    def check(self) -> None:
        """Raises ConfigError for a file that is missing, malformed, or whose certificate is not valid now, and for a key that is another's."""
        x509, serialization = _cryptography()
        now = datetime.datetime.now(datetime.UTC)
        as_cert, as_key, as_clients = self.called
        for option, path in ((as_cert, self.cert), (as_clients, self.clients)):
            for found in self._certificates(x509, option, path):
                if found.not_valid_after_utc < now:
                    raise ConfigError(f"{option} {path}: expired on {found.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; have a new one signed")
                if found.not_valid_before_utc > now:
                    raise ConfigError(
                        f"{option} {path}: valid from {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on, and now is {now:%Y-%m-%d %H:%M}; is the clock right?"
                    )
        try:
            key = serialization.load_pem_private_key(_read(as_key, self.key), password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{as_key} {self.key}: no private key in PEM without a password ({str(error).split('.')[0]})") from None
        if key.public_key() != self._certificates(x509, as_cert, self.cert)[0].public_key():
            raise ConfigError(f"{as_key} {self.key} is not the key of {as_cert} {self.cert}")
        if self.key.stat().st_mode & 0o077:
            raise ConfigError(f"{as_key} {self.key} can be read by others than its owner: chmod 600 it")

    def _certificates(self, x509: Any, option: str, path: Path) -> Any:
        try:
            return x509.load_pem_x509_certificates(_read(option, path))
        except ValueError as error:
            raise ConfigError(f"{option} {path}: no certificate in PEM ({str(error).split('.')[0]})") from None

    def credentials(self, grpc: Any) -> Any:
        """For a server. A connection that begins after the files were replaced has the new ones; if those are no good, the old."""
        seen = self._stamp()

        def fetch() -> Any:
            nonlocal seen
            stamp = self._stamp()
            if stamp == seen:
                return None
            seen = stamp
            try:
                self.check()
            except ConfigError:
                return None
            return self._configuration(grpc)

        return grpc.dynamic_ssl_server_credentials(self._configuration(grpc), fetch, require_client_authentication=True)

    def _configuration(self, grpc: Any) -> Any:
        key, cert, clients = self.read()
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=clients)

    def read(self) -> tuple[bytes, bytes, bytes]:
        """The key, the certificate and the CA as they stand in the files. Raises ConfigError."""
        as_cert, as_key, as_clients = self.called
        return _read(as_key, self.key), _read(as_cert, self.cert), _read(as_clients, self.clients)

    def _stamp(self) -> tuple[int, ...]:
        try:
            return tuple(path.stat().st_mtime_ns for path in (self.cert, self.key, self.clients))
        except OSError:
            return ()


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror} (read as user {os.geteuid()})") from None


def _cryptography() -> tuple[Any, Any]:
    try:
        return import_module("cryptography.x509"), import_module("cryptography.hazmat.primitives.serialization")
    except ImportError:
        raise MissingError("TLS needs the package cryptography, which is not installed: pip install 'waveos[host]'") from None
