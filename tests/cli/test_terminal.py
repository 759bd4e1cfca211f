"""Figures and JSON as they are printed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from waveos.cli.terminal import print_json, print_table, show_number


def test_json_takes_numpy_values_and_has_no_number_that_json_lacks(capsys):
    print_json({"a": np.int64(3), "b": np.array([1.5, np.nan]), "c": float("inf"), 4: (True, None)})
    assert json.loads(capsys.readouterr().out) == {"a": 3, "b": [1.5, None], "c": None, "4": [True, None]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (12_345_678, "12,345,678"),
        (12_345.678, "12,346"),
        (0.012345, "0.01235"),
        (2.0, "2"),
        (True, "True"),
        ("x", "x"),
        (float("inf"), "inf"),
    ],
)
def test_a_figure_has_thousands_apart_and_four_digits(value, text):
    assert show_number(value) == text


def test_a_table_in_a_pipe_keeps_long_cells_whole_and_has_no_trailing_blanks(capsys):
    print_table(("name", "figure"), [("x" * 300, "1"), ("[red]", "22")], numbers=("figure",))
    lines = capsys.readouterr().out.splitlines()
    assert any("x" * 300 in line for line in lines)
    assert any("[red]" in line and line.endswith("22") for line in lines)
    assert all(line == line.rstrip() for line in lines)
