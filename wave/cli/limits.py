"""`wave limits`: how fast a model can decode at best on given hardware, as a table and as plots."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.terminal import Json, print_json, print_table, show_number
from waveos.errors import ConfigError

commands = typer.Typer()

_CHIPS, _CONTEXTS = "8,32,128", "4096,131072"
_BANDWIDTHS = [2.0**exponent for exponent in range(-2, 7)]
"""Of the plot, as multiples of the GPU's own."""
_SYNCS_US = (0.1, 0.2, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0)


@commands.command("limits")
def limits(
    gpu: Annotated[str, typer.Option(help="Hardware: a name, or a TOML file.")] = "xpu-hbm3",
    model: Annotated[str, typer.Option(help="Model: a name, or a TOML file.")] = "llama-3.1-405b",
    chips: Annotated[str, typer.Option(help="Chips that share the model, comma-separated.")] = _CHIPS,
    context: Annotated[str, typer.Option(help="Tokens of context, comma-separated.")] = _CONTEXTS,
    batch: Annotated[int, typer.Option(min=1, help="Users at once.")] = 1,
    sync_us: Annotated[float | None, typer.Option(min=0, help="Latency of one collective, us; by default 0.2 up to 8 chips, 1.5 beyond.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw tokens/s against bandwidth and against synchronisation into this file (.svg, .png, .pdf).")
    ] = None,
    as_json: Json = False,
) -> None:
    """The limit study of decode: tokens a second, for one user and in all, and what bounds them."""
    if plot is not None and plot.suffix in ("", "."):
        raise ConfigError(f"--plot {plot}: a file name that ends in .svg, .png or .pdf is wanted")
    study = import_module("waveos.ipu_emulator.gpu")
    hardware, shape = study.load_gpu(gpu), study.load_model(model)
    sync_s = None if sync_us is None else sync_us * 1e-6
    sizes, lengths = _numbers("--chips", chips), _numbers("--context", context)
    rows = [_row(study.decode_step(hardware, shape, n, tokens, batch, sync_s), n, tokens, batch) for n in sizes for tokens in lengths]
    if plot is not None:
        _draw(plot, study, hardware, shape, sizes, lengths[0], batch)
    if as_json:
        print_json({"gpu": hardware.name, "model": shape.name, "batch": batch, "timing": "modelled", "rows": rows})
        return
    columns = ("chips", "context", "tokens/s a user", "tokens/s in all", "memory ms", "compute ms", "sync ms", "bound by", "needs GiB", "has GiB")
    print_table(
        columns,
        [[_cell(value) for value in row.values() if not isinstance(value, bool)] for row in rows],
        title=f"{shape.name} on {hardware.name}, batch {batch}: at best (limit model; hardware {'verified' if hardware.verified else 'assumed'})",
        numbers=tuple(column for column in columns if column != "bound by"),
    )
    if plot is not None:
        print(f"drawn: {plot}")


def _cell(value: Any) -> str:
    return "does not fit" if value is None else value if isinstance(value, str) else show_number(round(value, 3))


def _row(step: Any, chips: int, context: int, batch: int) -> dict[str, Any]:
    """What does not fit has no rate."""
    return {
        "chips": chips,
        "context": context,
        "tokens_per_s_user": 1 / step.total_s if step.fits else None,
        "tokens_per_s_all": batch / step.total_s if step.fits else None,
        "memory_ms": 1e3 * step.memory_s,
        "compute_ms": 1e3 * step.compute_s,
        "sync_ms": 1e3 * step.exposed_s,
        "bound": step.bound,
        "needed_gib": step.needed_bytes / 2**30,
        "capacity_gib": step.capacity_bytes / 2**30,
        "fits": step.fits,
    }


def _numbers(flag: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} {text!r}: whole numbers, comma-separated, are wanted") from None
    if min(found) < 1:
        raise ConfigError(f"{flag} {text!r}: at least 1 is wanted")
    return found


def _draw(path: Path, study: Any, gpu: Any, model: Any, sizes: list[int], context: int, batch: int) -> None:
    """Two panels: tokens/s a user against memory bandwidth, and against the latency of one collective."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for chips in sizes:
        faster = [gpu.model_copy(update={"memory_bytes_per_s": gpu.memory_bytes_per_s * factor}) for factor in _BANDWIDTHS]
        left.plot(
            [each.memory_bytes_per_s / 1e12 for each in faster],
            [1 / study.decode_step(each, model, chips, context, batch).total_s for each in faster],
            marker="o",
            label=f"{chips} chips",
        )
        right.plot(
            _SYNCS_US,
            [1 / study.decode_step(gpu, model, chips, context, batch, sync * 1e-6).total_s for sync in _SYNCS_US],
            marker="o",
            label=f"{chips} chips",
        )
    left.axvline(gpu.memory_bytes_per_s / 1e12, color="0.6", linestyle=":")
    left.set_xlabel(f"memory bandwidth of one chip, TB/s (dotted: {gpu.name})")
    right.set_xlabel("latency of one collective, µs")
    left.set_ylabel("tokens/s a user")
    figure.suptitle(f"{model.name}, {context:,} tokens of context, batch {batch}: at best; capacity is not checked in the plot")
    for panel in (left, right):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.grid(visible=True, alpha=0.3)
        panel.legend()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError(f"--plot {path}: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror or error}") from error
