"""`wave policies list|show` and `wave new policy`: what there is, what it wants to know, and how to begin one's own."""

from __future__ import annotations

import keyword
import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from waveos.cli.terminal import Json, print_json, print_table, talk
from waveos.errors import ConfigError, WaveError

commands = typer.Typer()
policies = typer.Typer(name="policies", help="The policies that are installed, and what each one wants to know.", no_args_is_help=True)
new = typer.Typer(name="new", help="Begin something of your own.", no_args_is_help=True)
commands.add_typer(policies)
commands.add_typer(new)

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_TEMPLATES = Path(__file__).parent / "templates" / "policy"


@policies.command("list")
def list_policies(as_json: Json = False) -> None:
    """Every installed policy: its parameters and what it does."""
    from waveos.policy import load_policy, policy_names

    rows = []
    for name in policy_names():
        try:
            rows.append(_describe(load_policy(name)))
        except WaveError as error:
            rows.append({"name": name, "error": str(error)})
    if as_json:
        print_json(rows)
        return
    print_table(
        ("policy", "subsystem", "parameters", "what it does"),
        [
            (row["name"], row["subsystem"], _show_params(row["params"]), row["about"]) if "error" not in row else (row["name"], "?", "", row["error"])
            for row in rows
        ],
    )


@policies.command("show")
def show_policy(
    name: Annotated[str, typer.Argument(help="An installed policy's name, path/to/file.py, or path/to/file.py:Class.")],
    as_json: Json = False,
) -> None:
    """One policy: what it handles, keeps and can be told."""
    from waveos.policy import load_policy

    policy = _describe(load_policy(name))
    if as_json:
        print_json(policy)
        return
    print(f"{policy['name']}: {policy['about']}")
    if policy["details"]:
        print(f"\n{policy['details']}")
    print_table(
        ("", ""),
        [
            ("subsystem", policy["subsystem"]),
            ("handles", ", ".join(policy["handles"])),
            ("state", ", ".join(f"{field} ({size:,} B)" for field, size in policy["state_bytes"].items()) or "none"),
            ("parameters", _show_params(policy["params"]) or "none"),
            ("runs", "compiled; WAVE_JIT=0: as plain Python" if policy["compiled"] else "as plain Python"),
            ("work-conserving", "yes" if policy["work_conserving"] else "no: it may leave a CPU idle while a thread waits"),
            ("file", policy["file"]),
        ],
    )


@new.command("policy")
def new_policy(
    name: Annotated[str, typer.Argument(help="The policy's name: lower case, digits and _.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where to make the folder of that name.")] = Path(),
    as_json: Json = False,
) -> None:
    """A package with a policy that works and a test that passes: the place to start from."""
    _check_name(name)
    target = folder / name
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists and is left as it is; choose another name, or another folder with --dir")
    files = _render(name)
    _write_folder(target, files)
    if as_json:
        print_json({"name": name, "folder": str(target), "files": sorted(files)})
        return
    print(target)
    talk(f"next: (cd {target} && python -m pytest); then, to know it by name: pip install --no-build-isolation -e {target}")


def _describe(policy: Any) -> dict[str, Any]:
    import inspect

    about, _, details = inspect.cleandoc(policy.__doc__ or "").partition("\n")
    return {
        "name": policy.name,
        "about": about,
        "details": details.strip(),
        "subsystem": policy.subsystem.__name__.rpartition(".")[2],
        "params": dict(policy.params),
        "handles": list(policy.handlers),
        "state_bytes": {field: dtype.itemsize for field, dtype in policy.fields.items()},
        "compiled": bool(policy.compiled),
        "work_conserving": bool(policy.work_conserving),
        "file": str(Path(inspect.getsourcefile(policy) or "?").resolve()),
    }


def _show_params(params: dict[str, float | None]) -> str:
    return ", ".join(f"{key} (must be given)" if value is None else f"{key}={value:g}" for key, value in params.items())


def _check_name(name: str) -> None:
    """Raise ConfigError unless `name` can be a policy, a module and a folder that nothing else is called."""
    from waveos.policy import policy_names

    if not _NAME.fullmatch(name) or len(name) > 50:
        raise ConfigError(f"{name!r} cannot name a policy: lower-case letters, digits and single _ between them, a letter first, at most 50 in all")
    if keyword.iskeyword(name) or name in sys.stdlib_module_names or name in ("waveos", "tests"):
        raise ConfigError(f"{name!r} is a word or module of Python's, or of Wave's; choose another name, such as my_{name}")
    if name in policy_names():
        raise ConfigError(f"a policy {name!r} is already installed; choose another name, such as my_{name}")
    if find_spec(name) is not None:
        raise ConfigError(
            f"a module {name!r} is installed already, and the policy's would be another of that name; choose another, such as my_{name}"
        )


def _render(name: str) -> dict[str, str]:
    """The package's files, by path in its folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    class_name = "".join(part.capitalize() for part in name.split("_"))
    templates = Environment(loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    values = {"name": name, "class_name": class_name, "distribution": f"wave-policy-{name.replace('_', '-')}"}
    paths = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"{name}.py": "policy.py.j2",
        f"tests/test_{name}.py": "test_policy.py.j2",
    }
    return {path: templates.get_template(template).render(values) for path, template in paths.items()}


def _write_folder(target: Path, files: dict[str, str]) -> None:
    """The folder whole, or not at all: written beside its place, then renamed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"cannot write in {target.parent}: {error.strerror}") from error
    try:
        for path, text in files.items():
            (draft / path).parent.mkdir(exist_ok=True)
            (draft / path).write_text(text)
        draft.chmod(0o755)
        draft.rename(target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
