"""`wave serve`: an OpenAI-compatible endpoint whose engine is told by an agent what to do."""

from __future__ import annotations

import socket
import sys
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.agentd import parameter
from waveos.errors import ConfigError, MissingError

commands = typer.Typer()


class Engine(StrEnum):
    """What computes."""

    reference = "reference"
    emulated = "emulated"


class Pace(StrEnum):
    """How fast emulated time goes."""

    real = "real"
    fast = "fast"


@commands.command("serve")
def serve(
    engine: Annotated[
        Engine, typer.Option(help="reference: a small real transformer on this machine's CPUs; emulated: GPUs in virtual time.")
    ] = Engine.reference,
    policy: Annotated[str, typer.Option(help="The policy that decides.")] = "strata",
    param: Annotated[list[str] | None, typer.Option(metavar="KEY=NUMBER", help="A parameter of it.", show_default=False)] = None,
    agent: Annotated[
        str | None, typer.Option(metavar="URL", help="Link to an agent that runs elsewhere; none: decide in this process.  [default: start agentd]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0: any.")] = 8000,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share the model.")] = 8,
    device_tokens: Annotated[int, typer.Option(help="reference: tokens of KV on the device.")] = 6_144,
    host_tokens: Annotated[int, typer.Option(help="reference: tokens of KV in host memory.")] = 16_384,
    storage: Annotated[Path | None, typer.Option(help="reference: folder for KV in files, which outlives the server.", show_default=False)] = None,
    gpu: Annotated[str, typer.Option(help="emulated: hardware.")] = "h100",
    model: Annotated[str, typer.Option(help="emulated: model.")] = "llama-3.1-8b",
    system: Annotated[str, typer.Option(help="emulated: data plane, as that system has it.")] = "strata",
    instances: Annotated[int, typer.Option(min=1, help="emulated: copies of the model.")] = 1,
    pace: Annotated[Pace, typer.Option(help="emulated: time keeps pace with the clock, or runs as fast as it can.")] = Pace.real,
) -> None:
    """Serve the OpenAI API (/v1/chat/completions, /v1/completions, /v1/models), /metrics and /health, until Ctrl-C."""
    try:
        uvicorn = import_module("uvicorn")
        endpoint = import_module("waveos.serving.endpoint")
    except ImportError as error:
        raise MissingError(f"wave serve needs {error.name}, an HTTP server's part: pip install 'waveos[serving]'") from error
    service = import_module("waveos.serving.service")
    params = dict(parameter(text) for text in param or [])
    listening = _listen(host, port)
    running: Any = None
    decides = import_module("waveos.serving.driver").open_agent(policy, params, agent)
    try:
        if engine is Engine.reference:
            running = import_module("waveos.host.serving.reference").Reference(ranks, device_tokens, host_tokens, storage)
            name = "wave-reference"
        else:
            emulator = import_module("waveos.ipu_emulator.serving.simulate")
            live = import_module("waveos.ipu_emulator.serving.live")
            running = live.Emulated(emulator.load_system(system), gpu, model, ranks, instances, pace.value)
            name = model
    except BaseException:
        decides.close()
        listening.close()
        raise
    serving = service.Service(running, decides)
    app = endpoint.Endpoint(serving, name).app()
    serving.start()
    listening.listen()  # who reads the line may connect at once, and is answered when uvicorn is there
    address, at = listening.getsockname()[:2]
    print(f"serving {name} ({engine.value}, policy {policy}) at http://{address}:{at}/v1", file=sys.stderr, flush=True)
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run(sockets=[listening])
    finally:
        serving.close()
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose another port, or 0 for any") from error
    return made
