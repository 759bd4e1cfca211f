"""Rows survive the way through a Parquet file; a file that is not whole is refused."""

import pytest

pytest.importorskip("pyarrow", reason="sweeps need pyarrow (pip install 'waveos[sweep]')")

from waveos.errors import ConfigError
from waveos.parquet import read_parquet, write_parquet

ROWS = [{"a": 1, "b": "x", "c": 0.5, "d": True}, {"a": 2, "b": None, "c": 1, "e": [1, 2]}]


def test_rows_and_what_they_are_about_come_back(tmp_path):
    write_parquet(tmp_path / "r.parquet", ROWS, {"name": "µ", "grid": {"a": [1, 2]}})
    rows, about = read_parquet(tmp_path / "r.parquet")
    assert about == {"name": "µ", "grid": {"a": [1, 2]}}
    assert rows == [{"a": 1, "b": "x", "c": 0.5, "d": True, "e": None}, {"a": 2, "b": None, "c": 1.0, "d": None, "e": "[1, 2]"}]


def test_other_programs_read_it(tmp_path):
    import pyarrow.parquet

    write_parquet(tmp_path / "r.parquet", ROWS, {})
    table = pyarrow.parquet.read_table(tmp_path / "r.parquet")
    assert [str(kind) for kind in table.schema.types] == ["int64", "string", "double", "bool", "string"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_one_line(tmp_path, share):
    path = tmp_path / "r.parquet"
    write_parquet(path, ROWS, {})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ConfigError, match=r"is no whole Parquet file.*is it cut off") as refused:
        read_parquet(path)
    assert "\n" not in str(refused.value)


def test_another_programs_parquet_file_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "r.parquet")
    with pytest.raises(ConfigError, match="none of Wave's"):
        read_parquet(tmp_path / "r.parquet")


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        read_parquet(tmp_path / "gone.parquet")
