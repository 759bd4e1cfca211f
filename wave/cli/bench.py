"""`wave bench NAME`: one benchmark, one object, one verdict. The benchmarks are the modules of `waveos.bench` that have `run` and `OPTIONS`.

Such a module has `run(**options) -> dict` with the keys `name`, `metrics` (flat numbers), `machine`, `timing` ("measured" or "modelled") and, if it
has something to judge by, `verdict` (one line); where Ctrl-C ended it and it kept what it had, `interrupted`: True. `OPTIONS` maps each option to its
default, or to (default, what it is).
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli import INTERRUPTED
from waveos.cli.terminal import Json, print_json, print_table, show_number, talk
from waveos.errors import ConfigError, MissingError
from waveos.names import nearest

commands = typer.Typer()


@commands.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The benchmark; without a name the list of them.", show_default=False)] = "",
    as_json: Json = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random in it.", show_default=False)] = None,
) -> int | None:
    """Measure one part against its peers. Further options of a benchmark: --OPTION VALUE, listed by `wave bench`."""
    if not name:
        _list(as_json)
        return None
    module = load_bench(name)
    options = _parse(name, context.args, _defaults(module))
    if seed is not None:
        if "seed" not in _defaults(module):
            raise ConfigError(f"bench {name!r} takes no seed: nothing in it is random")
        options["seed"] = seed
    if not as_json:
        talk(f"{name}: {_first_line(module)} ...")
    try:
        result = module.run(**options)
    except ModuleNotFoundError as error:
        raise _missing(name, error) from error
    if as_json:
        print_json(result)
    else:
        _print(result)
    return INTERRUPTED if result.get("interrupted") else None


def bench_names() -> list[str]:
    """Names of the benchmarks that are installed, sorted; none of them is imported."""
    folders = import_module("waveos.bench").__path__
    return sorted({path.stem for folder in folders for path in Path(folder).glob("*.py") if _is_bench(path)})


def load_bench(name: str) -> Any:
    """The module of one benchmark. Raises ConfigError with the nearest name, MissingError if a peer it needs is not installed."""
    known = bench_names()
    if name not in known:
        raise ConfigError(f"no benchmark {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    try:
        return import_module(f"waveos.bench.{name}")
    except ModuleNotFoundError as error:
        raise _missing(name, error) from error


def _missing(name: str, error: ModuleNotFoundError) -> Exception:
    """What to tell of a package that is not there; a module of Wave's own that is not there is a bug and stays one."""
    if (error.name or "").startswith("waveos"):
        return error
    return MissingError(f"bench {name!r} needs the Python package {error.name!r}: pip install 'waveos[bench,host]'")


def _is_bench(path: Path) -> bool:
    """Whether the file declares `run` and `OPTIONS` at its top."""
    declared = set()
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.FunctionDef):
            declared.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            declared.update(target.id for target in (node.targets if isinstance(node, ast.Assign) else [node.target]) if isinstance(target, ast.Name))
    return {"run", "OPTIONS"} <= declared


def _defaults(module: Any) -> dict[str, Any]:
    return {key: value[0] if isinstance(value, tuple) and len(value) == 2 else value for key, value in module.OPTIONS.items()}


def _parse(name: str, arguments: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """`--key value` and `--key=value` as options of the benchmark, each of its default's type."""
    options: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag, found, text = rest.pop(0).partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or key not in defaults:
            known = [f"--{each.replace('_', '-')}" for each in defaults]
            raise ConfigError(
                f"bench {name!r} has no option {flag}{nearest('--' + flag.removeprefix('--'), known)}; it has: {', '.join(known) or 'none'}"
            )
        if isinstance(defaults[key], bool) and not found and not (rest and rest[0].lower() in ("true", "false")):
            options[key] = True
            continue
        if not found:
            if not rest:
                raise ConfigError(f"{flag} of bench {name!r} wants a value")
            text = rest.pop(0)
        options[key] = _value(flag, text, defaults[key])
    return options


def _value(flag: str, text: str, default: Any) -> Any:
    """`text` as the default's type; a default of None takes a number if it reads as one."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"{flag} {text}: wants true or false")
        return text.lower() in ("true", "1")
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        if default is None:
            return text
        raise ConfigError(f"{flag} {text}: wants a number") from None
    if isinstance(default, int) and number != int(number):
        raise ConfigError(f"{flag} {text}: wants a whole number")
    return int(number) if isinstance(default, int) or (default is None and number == int(number)) else number


def _list(as_json: bool) -> None:
    """All benchmarks, each with its options and their defaults."""
    rows: list[dict[str, Any]] = []
    for name in bench_names():
        try:
            module = load_bench(name)
        except MissingError as error:
            rows.append({"name": name, "about": str(error), "options": {}})
            continue
        about = {key: value[1] if isinstance(value, tuple) and len(value) == 2 else "" for key, value in module.OPTIONS.items()}
        options = {key: {"default": value, "about": about[key]} for key, value in _defaults(module).items()}
        rows.append({"name": name, "about": _first_line(module), "options": options})
    if as_json:
        print_json(rows)
        return
    lines: list[tuple[str, str]] = []
    for row in rows:
        lines.append((row["name"], row["about"]))
        lines += [(f"  --{key.replace('_', '-')} {option['default']}", f"  {option['about']}") for key, option in row["options"].items()]
    print_table(("benchmark, and its options with their defaults", "what it measures"), lines)


def _print(result: dict[str, Any]) -> None:
    machine = result["machine"]
    print_table(
        ("metric", result["name"]),
        [(key, show_number(value)) for key, value in result["metrics"].items()],
        title=f"{result['name']}: timing {result['timing']}; {machine.get('cpu', 'CPU unknown')}, {machine.get('cores', '?')} cores",
        numbers=(result["name"],),
    )
    print(result.get("verdict") or f"{len(result['metrics'])} figures, {result['timing']} on this machine; nothing in them is judged")


def _first_line(module: Any) -> str:
    return str(module.__doc__ or module.__name__).strip().split("\n")[0].rstrip(".")
