"""Who may speak over a network: this machine's own CURVE key, and the peers it knows, each a small file.

    KEYS/own.toml           public and secret, readable by its owner alone
    KEYS/peers/NAME.toml    public, and what was decided about it: expires, revoked

KEYS is `$WAVE_KEYS`, or /etc/wave/keys for root, or ~/.config/waveos/keys. Keys are 32 bytes, written as 64 hexadecimal digits. A running daemon sees
a change of the peers within LOOK_S. Expiry is a date, so it follows the clock of this machine; nothing else here does.
"""

from __future__ import annotations

import datetime
import os
import re
import time
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from waveos.errors import ConfigError, LinkError, MissingError
from waveos.names import nearest

LOOK_S = 0.25
"""Between two looks for changed files."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"public", "secret", "created", "expires", "revoked"}


@dataclass(frozen=True)
class Key:
    """One key; `secret` is this machine's own only. Times are seconds since 1970, None: never."""

    name: str
    public: str
    secret: str = ""
    created: float = 0.0
    expires: float | None = None
    revoked: float | None = None
    trouble: str = ""  # of a file that cannot be read, and then there is no more than its name

    @property
    def state(self) -> str:
        """ "valid", "expired", "revoked" or "malformed", now."""
        if self.trouble:
            return "malformed"
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and time.time() >= self.expires else "valid"


def keys_folder() -> Path:
    """Where keys are kept for this user."""
    if named := os.environ.get("WAVE_KEYS"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/etc/wave/keys")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "waveos" / "keys"


class Keys:
    """The keys in one folder."""

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder) if folder else keys_folder()
        self._known: dict[str, Key] = {}
        self._looked_s = self._seen_ns = -1.0

    # What a link asks

    def own(self) -> Key:
        """This machine's own key. Raises LinkError if there is none, or it is expired or malformed."""
        key = self.read_own()
        if key.state != "valid":
            raise LinkError(f"this machine's own key has {_since(key)}: make a new one with `wave keys new --replace`, and add it at its peers")
        return key

    def read_own(self) -> Key:
        """Likewise, though it may have expired: to be shown, not used."""
        path = self.folder / "own.toml"
        if not path.exists():
            raise LinkError(f"this machine has no key in {self.folder}: make one with `wave keys new`")
        key = _read(path, "own")
        if not key.secret:
            raise LinkError(f"{path} has no secret: make a new one with `wave keys new --replace`")
        return key

    def peer(self, name: str = "") -> Key:
        """The valid peer of that name, or the only one there is. Raises LinkError."""
        valid = {key.name: key for key in self.peers() if key.state == "valid"}
        if name:
            if name in valid:
                return valid[name]
            known = next((key for key in self.peers() if key.name == name), None)
            if known and known.trouble:
                raise LinkError(known.trouble)
            why = f"has {_since(known)}" if known else f"is not known{nearest(name, valid)}"
            raise LinkError(f"the peer {name!r} {why}: get its key with `wave keys list` there, and `wave keys add {name} KEY` here")
        if not valid:
            raise LinkError(f"no peer is known in {self.folder}: get the agent's key with `wave keys list` there, and `wave keys add NAME KEY` here")
        if len(valid) > 1:
            raise LinkError(f"{len(valid)} peers are known ({', '.join(sorted(valid))}): say which is meant, as in zmq+tcp://NAME@HOST:PORT")
        return next(iter(valid.values()))

    def known(self, public: str) -> Key | None:
        """The peer with that key, as the files say now or LOOK_S ago; its `state` says whether it may speak."""
        now_s = time.monotonic()
        if self._looked_s < 0 or now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            self._look()
        return self._known.get(public)

    def _look(self) -> None:
        """Read the files again if one may have changed: a rename shows in the folder's time, but two within its grain are one."""
        try:
            changed_ns = (self.folder / "peers").stat().st_mtime_ns
        except OSError:
            self._known, self._seen_ns = {}, -1
            return
        if changed_ns == self._seen_ns and time.time_ns() - changed_ns > 2e9:
            return
        found: dict[str, Key] = {}
        for key in self.peers():
            if key.trouble:
                continue  # `wave keys list` says what is wrong with it; meanwhile nobody has that key
            if key.public not in found or found[key.public].state == "valid":  # one key under two names: it is valid where both are
                found[key.public] = key
        self._known, self._seen_ns = found, changed_ns

    # What the command does

    def new(self, days: float | None = None, *, replace: bool = False) -> Key:
        """Make this machine's own key. Raises ConfigError if it has one, unless that is to be replaced."""
        path = self.folder / "own.toml"
        if path.exists() and not replace:
            raise ConfigError(f"{path} is there already: its peers know it. --replace makes a new one, which is then to be added at each of them")
        try:
            import zmq
            from zmq.utils import z85
        except ImportError as error:
            raise MissingError("keys are made by pyzmq, which is not installed: pip install 'waveos[agent]' or 'waveos[host]'") from error
        public, secret = (z85.decode(key).hex() for key in zmq.curve_keypair())
        key = Key("own", public, secret, time.time(), _end(days))
        _write(path, key)
        return key

    def add(self, name: str, public: str, days: float | None = None) -> Key:
        """Let the machine with that key be a peer. Raises ConfigError for what is no name or key, or a name that is taken."""
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name of a peer: letters, digits, '.', '_' and '-', at most 64, the first a letter or digit")
        public = public.strip().lower()
        if not KEY.fullmatch(public):
            raise ConfigError(f"{public!r} is no key: 64 hexadecimal digits, as `wave keys list` shows them on the machine that has it")
        for other in self.peers():
            if other.state == "valid" and other.name == name and other.public != public:
                raise ConfigError(f"{name!r} is the name of another key: `wave keys revoke {name}` first, or give this one another name")
            if other.public == public and other.name != name and other.state == "valid":
                raise ConfigError(f"that key is known as {other.name!r} already")
        key = Key(name, public, "", time.time(), _end(days))
        _write(self.folder / "peers" / f"{name}.toml", key)
        return key

    def revoke(self, name: str) -> Key:
        """Let the peer speak no more; running daemons drop what it sends within a second. Raises ConfigError if there is none."""
        files = {path.stem: path for path in self._files()}
        if name not in files:
            raise ConfigError(f"no peer {name!r}{nearest(name, files)}; known: {', '.join(files) or 'none'}")
        key = _read(files[name], name)
        if key.revoked is None:
            key = replace(key, revoked=time.time())
            _write(files[name], key)
        return key

    def peers(self) -> list[Key]:
        """All peers by name, also those who may not speak, and those whose file cannot be read: `trouble` says why."""
        found = []
        for path in self._files():
            try:
                found.append(_read(path, path.stem))
            except LinkError as error:
                found.append(Key(path.stem, "", trouble=str(error)))
        return found

    def _files(self) -> list[Path]:
        return sorted((self.folder / "peers").glob("*.toml"))


def _read(path: Path, name: str) -> Key:
    mend = "remove it, or add the key anew" if path.parent.name == "peers" else "make a new one with `wave keys new --replace`"
    try:
        fields = tomllib.loads(path.read_text())
    except PermissionError:
        raise LinkError(f"the key file {path} is not for this user: give it to the user that the daemon runs as") from None
    except (OSError, ValueError) as error:
        raise LinkError(f"the key file {path} cannot be read ({error}); {mend}") from None
    times = [fields.get(each) for each in ("created", "expires", "revoked")]
    if (
        not fields.keys() <= _FIELDS
        or not all(isinstance(fields.get(each, "0" * 64), str) and KEY.fullmatch(fields.get(each, "0" * 64)) for each in ("public", "secret"))
        or "public" not in fields
        or not all(each is None or isinstance(each, datetime.datetime) for each in times)
    ):
        raise LinkError(f"the key file {path} is malformed: it is to say public = 64 hexadecimal digits, and dates; {mend}")
    created, expires, revoked = (each.timestamp() if isinstance(each, datetime.datetime) else None for each in times)
    return Key(name, fields["public"], fields.get("secret", ""), created or 0.0, expires, revoked)


def _write(path: Path, key: Key) -> None:
    """Whole or not at all, never readable by others where it holds a secret, and whatever the umask is."""
    folder, keys = path.parent, path.parent if key.secret else path.parent.parent
    if not folder.exists():
        folder.mkdir(parents=True, mode=0o700 if key.secret else 0o755)
        if folder != keys:
            made = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            os.fchmod(made, 0o755)
            _give(made, keys)
            os.close(made)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [f'public = "{key.public}"', *([f'secret = "{key.secret}"'] if key.secret else [])]
    lines += [
        f"{name} = {datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec='seconds')}"
        for name, at in (("created", key.created), ("expires", key.expires), ("revoked", key.revoked))
        if at is not None
    ]
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # where root writes into another's folder, never through that one's link
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fchmod(file.fileno(), 0o600 if key.secret else 0o644)
            _give(file.fileno(), keys)
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _give(made: int, keys: Path) -> None:
    """To the owner of the folder of keys: where root writes those of a service that runs as another user, that one is to read them."""
    owner = keys.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(made, owner.st_uid, owner.st_gid)


def _end(days: float | None) -> float | None:
    if days is None:
        return None
    if not 0 < days <= 36_500:
        raise ConfigError(f"--days {days}: more than 0, at most 36,500")
    return time.time() + days * 86_400


def _since(key: Key) -> str:
    at = key.revoked if key.revoked is not None else key.expires
    return (
        f"{'been revoked' if key.revoked is not None else 'expired'} on {datetime.datetime.fromtimestamp(at or 0, datetime.UTC):%Y-%m-%d %H:%M} UTC"
    )
