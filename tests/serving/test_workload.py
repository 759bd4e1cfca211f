"""Traces and synthetic workloads: published means are met, and a broken trace names its line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from waveos.errors import ConfigError
from waveos.ipu_emulator.serving.cost import load_constants
from waveos.ipu_emulator.serving.workload import bundled_trace, load_shapes, make_workload, read_azure, read_mooncake

FITTED = load_constants().fitted
GOOD = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}


@pytest.mark.parametrize("name", sorted(load_shapes()))
def test_synthetic_workloads_have_the_published_means(name):
    shape, workload = load_shapes()[name], make_workload(name, 5.0, FITTED)
    assert len(workload.asks) == shape.queries
    assert np.mean([ask.prompt for ask in workload.asks]) == pytest.approx(shape.prompt, rel=0.03)
    assert np.mean([ask.outputs for ask in workload.asks]) == pytest.approx(shape.outputs, rel=0.05)
    assert len({ask.blocks[0] for ask in workload.asks}) == (shape.contexts or shape.queries)
    assert all(sum(ask.sizes) == ask.prompt for ask in workload.asks)


def test_equal_seeds_give_equal_workloads_and_others_do_not():
    assert make_workload("loogle", 5.0, FITTED, queries=50, seed=2).asks == make_workload("loogle", 5.0, FITTED, queries=50, seed=2).asks
    assert make_workload("loogle", 5.0, FITTED, queries=50, seed=2).asks != make_workload("loogle", 5.0, FITTED, queries=50, seed=3).asks


def test_the_trace_that_ships_is_in_order_and_shares_prefixes():
    workload = read_mooncake(bundled_trace())
    assert len(workload.asks) == 1_000
    assert len({ask.blocks[0] for ask in workload.asks}) == 1
    assert 0 not in {block for ask in workload.asks for block in ask.blocks}


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([GOOD, "{"], "2: not a request of a Mooncake trace"),
        ([GOOD, {**GOOD, "timestamp": -5}], "2: time goes back"),
        ([{**GOOD, "timestamp": 9}, GOOD], "2: time goes back"),
        ([{**GOOD, "hash_ids": [0]}], "1: 600 tokens of input, 5 of output and 1 blocks; 2 blocks of 512 are wanted"),
        ([{**GOOD, "input_length": 0}], "1: 0 tokens of input"),
        ([{"timestamp": 1}], "1: not a request of a Mooncake trace"),
        ([GOOD, '{"timestamp": 1e999}'], "2: not a request of a Mooncake trace"),
        (["[" * 100_000], "1: not a request of a Mooncake trace"),
        ([{**GOOD, "hash_ids": [0, -1]}], "1: one of the hash_ids is not within 0 to"),
        ([{**GOOD, "hash_ids": [0, 2**62 - 1]}], "1: one of the hash_ids is not within 0 to"),
        ([{**GOOD, "timestamp": 1e300}], "1: a time that 64 bits do not hold in ns"),
        ([{**GOOD, "output_length": 10**12}], "1: 600 tokens of input and 1000000000000 of output; 8388608 at most"),
    ],
)
def test_a_broken_mooncake_trace_names_its_line(tmp_path, lines, line):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines))
    with pytest.raises(ConfigError, match=line):
        read_mooncake(path)


def test_an_azure_trace_is_read_with_its_fractions_of_a_second(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n")
    asks = read_azure(path).asks
    assert [(ask.at_ns, ask.prompt, ask.outputs) for ask in asks] == [(0, 4808, 10), (52_000_000, 3180, 8)]


def test_an_azure_trace_of_2024_is_read_with_its_offsets(tmp_path):
    path = tmp_path / "azure.csv"
    lines = ["2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-10 02:00:00.009931+02:00,2,5", "2024-05-10 00:00:01Z,2,5"]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    assert [ask.at_ns for ask in read_azure(path).asks] == [0, 1_000, 990_070_000]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a,b\n1,2\n", "the first line is 'a,b'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,4,5\n", "2: not a request of an Azure trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.0,9,5\n2023-11-16 18:17:03.0,4,5\n", "3: time goes back"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.-5,9,5\n", "2: not a request of an Azure trace"),
        (f"TIMESTAMP,ContextTokens,GeneratedTokens\n{'x' * 140_000},9,5\n", "2: not a request of an Azure trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04,1000000000000,5\n", "2: 1000000000000 tokens of input and 5 of output"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1000-01-01 00:00:00,9,5\n3000-01-01 00:00:00,9,5\n", "3: a time that 64 bits do not hold"),
    ],
)
def test_a_broken_azure_trace_names_its_line(tmp_path, text, line):
    path = tmp_path / "azure.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=line):
        read_azure(path)


def test_a_trace_that_is_not_there_or_not_text_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_mooncake(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        read_mooncake(tmp_path / "binary.jsonl")
