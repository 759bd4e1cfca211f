"""How commands give results: tables or JSON on stdout, files whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from waveos.cli.terminal import print_json, print_table, stdout, talk
from waveos.errors import ConfigError
from waveos.names import split_policy_file


def give_results(results: Mapping[str, Any], out: Path | None, report: Path | None, as_json: bool, *, stopped: int | None = None) -> None:
    """Results to stdout, and to the files that were asked for."""
    keep_results(results, out, stopped=stopped)
    page = "html" if results.get("subsystem", "sched") == "sched" else results["subsystem"]
    if as_json:
        print_json(results)
    elif results["configs"]:
        if page == "html":
            stdout().print(import_module("waveos.report.table").comparison_table(results))
        else:
            columns, rows = import_module(f"waveos.report.{page}").table(results)
            print_table(columns, rows, title=f"{results['name']}: timing {results['timing']}", numbers=columns[1:])
        for note in results["notes"]:
            talk(f"note: {note}")
    if report is not None and stopped is None:
        write_report(results, report)
        talk(f"report: {report}")


def write_report(results: Mapping[str, Any], path: Path) -> None:
    """One self-contained HTML page, as the results' subsystem draws it."""
    page = results.get("kind") or ("html" if results.get("subsystem", "sched") == "sched" else results["subsystem"])
    import_module("waveos.output").write_file(path, import_module(f"waveos.report.{page}").render_report(results))


def keep_results(results: Mapping[str, Any], out: Path | None, *, stopped: int | None) -> None:
    """Write the results file; after Ctrl-C also where none was asked for, so that nothing measured is lost."""
    if out is None and stopped is not None and results.get("configs"):
        out = Path(f"{results['name']}-stopped.json")
    if out is not None:
        import_module("waveos.output").write_file(out, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False, default=_as_number) + "\n")
        talk(f"{'stopped; what was measured is kept in' if stopped else 'results:'} {out}")


def _as_number(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def files_of(scenario: Any, name: str) -> list[Path]:
    """Files that a run of the scenario, which was asked for by `name`, is made of: its own and those of its policies."""
    named = [parts[0] for each in scenario.policies.names if (parts := split_policy_file(each)) is not None]
    return [path for path in (Path(name), *map(Path, named), *(scenario.base / each for each in named)) if path.is_file()]


def check_outputs(*paths: Path | None, kept: Sequence[Path] = ()) -> None:
    """Refuse an output that cannot be written, or that would be written over another or over one of `kept`, before anything long is run."""
    given = [path.resolve() for path in paths if path is not None and (path.is_file() or not path.exists())]
    for number, target in enumerate(given):
        if target in given[:number]:
            raise ConfigError(f"{target} is named for two outputs, and the second would be written over the first: name two files")
        if target in [each.resolve() for each in kept]:
            raise ConfigError(f"cannot write {target}: this run is made of it; name another file")
    for path in paths:
        if path is not None and path.is_dir():
            raise ConfigError(f"cannot write {path}: it is a folder; name a file")
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {path.resolve().parent}; make it first")


def read_results(path: Path) -> Any:
    """What a results file holds, of a command or of a sweep. Raises ConfigError for one that is none, or cut off."""
    if path.suffix == ".parquet":
        rows, about = import_module("waveos.parquet").read_parquet(path)
        return {**about, "rows": rows}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; wants a results file as `wave compare SCENARIO --out {path}` writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no results file ({error}); is it cut off? `wave compare SCENARIO --out {path}` writes one") from None
