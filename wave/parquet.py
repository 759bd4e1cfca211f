"""Rows of plain values as a Parquet file, with what they are about in its metadata. Written whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError, MissingError
from waveos.output import write_file

ABOUT = b"wave"
"""The metadata key under which a file of Wave's says what it holds, as JSON."""


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write `rows` (numbers, strings, truth values, None; a list goes as JSON text). A column that one row lacks is null there.

    Raises MissingError without pyarrow, ConfigError if the file cannot be written.
    """
    arrow, parquet = _arrow()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = arrow.table({key: _column(arrow, [row.get(key) for row in rows]) for key in columns})
    buffer = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({ABOUT: json.dumps(about, ensure_ascii=False).encode()}), buffer)
    write_file(path, buffer.getvalue())


def read_parquet(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, what they are about). Raises MissingError, and ConfigError for a file that is not there, cut off, or not Wave's."""
    arrow, parquet = _arrow()
    try:
        with path.open("rb") as file:
            table = parquet.read_table(file, use_threads=False, pre_buffer=False)  # a thread that begins as the command ends would abort it
    except OSError as error:
        if error.strerror:
            raise ConfigError(f"cannot read {path}: {error.strerror}; wants a results file of `wave sweep`") from None
        raise ConfigError(f"{path} is no whole Parquet file ({_first_line(error)}); is it cut off?") from None
    except arrow.ArrowException as error:
        raise ConfigError(f"{path} is no whole Parquet file ({_first_line(error)}); is it cut off?") from None
    try:
        about = json.loads((table.schema.metadata or {})[ABOUT])
    except (KeyError, ValueError):
        raise ConfigError(f"{path} is a Parquet file, but none of Wave's: `wave sweep` writes those") from None
    return table.to_pylist(), about


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MissingError("sweeps keep their results as Parquet and need the Python package pyarrow: pip install 'waveos[sweep]'") from None
    return pyarrow, pyarrow.parquet


def _column(arrow: Any, values: Sequence[Any]) -> Any:
    """An array of one type; whole numbers beside others become floats, and what has no common type becomes text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        values = [None if value is None else float(value) for value in values]
    elif len(kinds) > 1 or kinds & {list, dict}:
        values = [value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
    return arrow.array(values)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
