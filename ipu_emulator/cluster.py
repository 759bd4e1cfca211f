"""A pool of simulations on a Ray cluster: an actor for each of its cores, and in each of them the same pool of one child as on one machine.

So a policy that does not return is stopped by the same watchdog, and what goes wrong in a child is the same one line. Ray moves the actors of a node
that is lost to others and gives them their job again. Every node has this version of Wave installed (`pip install 'waveos[ray]'`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from waveos import __version__
from waveos.errors import LinkError, MissingError, WaveError
from waveos.ipu_emulator.pool import Pool
from waveos.ipu_emulator.sweep import code_hash

LOCAL = "ray://local"
"""A cluster of this machine alone, which lives as long as the pool."""
CLIENT_PORT = 10_001
_REACH_S = 5.0
_CONNECTS = 3  # a busy head takes more than one try to start a client's server
_ANSWER_S = 0.2  # between looks for Ctrl-C
_JOB_RETRIES = 3
_START_S = 120.0


class Core:
    """What an actor runs: a pool of one child on one core of one node."""

    def __init__(self, factory: str) -> None:
        self._pool = Pool(1, factory=factory)

    def about(self) -> tuple[str, str]:
        """The version and the code's hash of the Wave that is installed on this node."""
        return __version__, code_hash()

    def run(self, number: int, setup: Any) -> tuple[int, bool, Any]:
        """(number, True, result), or (number, False, the error)."""
        try:
            self._pool.submit(setup)
            [(_, result)] = self._pool.finished()
        except WaveError as error:
            return number, False, type(error)(*error.args)
        return number, True, result


class RayPool:
    """As `waveos.ipu_emulator.pool.Pool`, on the cluster at `address`: `ray://HOST:PORT` (10001 by default), or `ray://local`.

    Raises MissingError without ray, LinkError if there is no cluster or its nodes have another Wave; later what a job raises.
    """

    def __init__(self, address: str, *, factory: str) -> None:
        self._ray = _connect(address)
        self._numbers = itertools.count()
        try:
            cores = max(1, int(self._ray.cluster_resources().get("CPU", 0)))
            actor = self._ray.remote(Core).options(num_cpus=1, max_restarts=-1, max_task_retries=_JOB_RETRIES)
            self._actors = [actor.remote(factory) for _ in range(cores)]
            self._check_versions(address)
            from ray.util import ActorPool

            self._jobs = ActorPool(self._actors)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        """Cores of the cluster."""
        return len(self._actors)

    def submit(self, setup: Any) -> int:
        """Add a job; `setup` has to pickle."""
        number = next(self._numbers)
        self._jobs.submit(lambda actor, job: actor.run.remote(*job), (number, setup))
        return number

    def finished(self) -> Iterator[tuple[int, Any]]:
        """Jobs as they end, until none is left."""
        while self._jobs.has_next():
            try:
                number, fine, answer = self._jobs.get_next_unordered(timeout=_ANSWER_S)
            except TimeoutError:
                continue
            except (self._ray.exceptions.RayError, ConnectionError) as error:
                raise LinkError(f"the Ray cluster lost a job: {_first_line(error)}; run the command again, finished points are kept") from None
            if not fine:
                raise answer
            yield number, answer

    def close(self) -> None:
        """End all actors, also in the middle of a job, and leave the cluster."""
        with contextlib.suppress(Exception):  # a cluster that is gone needs no end
            for actor in getattr(self, "_actors", []):
                self._ray.kill(actor)
        with contextlib.suppress(Exception):
            self._ray.shutdown()

    def _check_versions(self, address: str) -> None:
        mine = (__version__, code_hash())
        try:
            theirs = set(self._ray.get([actor.about.remote() for actor in self._actors], timeout=_START_S))
        except self._ray.exceptions.GetTimeoutError:
            raise LinkError(
                f"{address}: the cluster's cores did not start within {_START_S:.0f} s; is it busy with other work? (ray status)"
            ) from None
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise LinkError(f"{address}: its nodes cannot run Wave ({_first_line(error)}); install waveos {__version__} with [ray] on each") from None
        if other := theirs - {mine}:
            versions = ", ".join(sorted(version for version, _ in other))
            raise LinkError(f"{address}: nodes have another Wave ({versions}, or other sources) than this {__version__}; install the same on each")


def _connect(address: str) -> Any:
    """Ray, connected. Raises MissingError, LinkError."""
    parts = urlsplit(address)
    if parts.scheme != "ray" or not parts.hostname:
        raise LinkError(f"--on {address}: wants ray://HOST:PORT, the cluster's client port, as ray://10.0.0.7:{CLIENT_PORT}; or {LOCAL}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingError("--on ray://... needs the Python package ray: pip install 'waveos[ray]'") from None
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == LOCAL:
        ray.init(address="local", include_dashboard=False, **quiet)
        return ray
    try:
        host, port = parts.hostname, parts.port or CLIENT_PORT
        with socket.create_connection((host, port), timeout=_REACH_S):
            pass
    except (OSError, ValueError) as error:
        raise LinkError(
            f"--on {address}: cannot be reached ({_first_line(error)}); is the head running (ray start --head --ray-client-server-port={CLIENT_PORT})?"
        ) from None
    for left in reversed(range(_CONNECTS)):
        try:
            ray.init(address=f"ray://{host}:{port}", **quiet)
            return ray
        except (ConnectionError, RuntimeError, ImportError) as error:
            if not left or isinstance(error, ImportError):
                raise LinkError(f"--on {address}: no Ray cluster answers there: {_first_line(error)}") from None
    raise AssertionError


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".:")
