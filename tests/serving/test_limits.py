"""The limit model: the published figures, the study's findings, and the tables they are made from."""

from __future__ import annotations

import json

import pytest

from waveos.bench import limits as bench
from waveos.cli import run
from waveos.ipu_emulator.gpu import decode_step, gpu_names, load_gpu, load_limits, load_model, model_names


def rate(gpu, model, chips, context, sync_us=1.5, batch=1):
    return 1 / decode_step(load_gpu(gpu), load_model(model), chips, context, batch, sync_us * 1e-6).total_s


def test_the_published_rates_come_out_exact_after_rounding_and_only_they_are_called_fitted():
    result = bench.run()
    fitted = {name: round(result["metrics"][name]) for name, label in result["labels"].items() if label == "fitted"}
    assert fitted == {"utps_405b_tp8_4k": 86, "utps_405b_tp8_128k": 80, "utps_405b_tp128_4k": 776}
    assert set(result["labels"].values()) == {"fitted", "predicted"}
    assert set(result["labels"]) == set(result["metrics"])


@pytest.mark.parametrize(("model", "batch"), [("llama-3.1-405b", 1), ("deepseek-v3", 64)])
def test_no_hbm3_system_reaches_1000_tokens_per_s_at_long_context(model, batch):
    """DeepSeek-V3 with a batch: one user alone reads a twentieth of its experts, which the study's equation does not count in his favour."""
    assert all(rate("xpu-hbm3", model, chips, 131_072, batch=batch) < 1_000 for chips in (8, 32, 128))


def test_better_memory_and_1_us_collectives_reach_2000_but_not_10000():
    best = rate("xpu-3d-dram", "llama-3.1-405b", 128, 4_096, sync_us=1.0)
    assert 2_000 < best < 10_000
    assert rate("xpu-sram", "llama-3.1-405b", 128, 4_096, sync_us=0.2) < 10_000


def test_beyond_four_times_hbm3_collectives_matter_more_than_bandwidth():
    for gpu, sync_matters_more in (("xpu-hbm3", False), ("xpu-hbm4", True)):
        step = decode_step(load_gpu(gpu), load_model("llama-3.1-405b"), 128, 4_096)
        assert (step.exposed_s > step.memory_s) is sync_matters_more


def test_what_does_not_fit_is_said_to():
    step = decode_step(load_gpu("xpu-3d-dram"), load_model("llama-3.1-405b"), 8, 4_096)
    assert not step.fits
    assert decode_step(load_gpu("xpu-3d-dram"), load_model("llama-3.1-405b"), 16, 4_096).fits


def test_a_bigger_batch_reads_more_experts_but_never_more_than_there_are():
    model = load_model("deepseek-v3")
    assert model.active_parameters(1) == pytest.approx(37e9, rel=0.1)
    assert model.active_parameters(1) < model.active_parameters(64) < model.active_parameters(10_000) <= model.parameters


def test_cache_bytes_per_token_are_the_known_ones():
    known = {"llama-3.1-8b": 131_072, "qwen2.5-14b": 196_608, "llama-3.1-70b": 327_680, "llama-3.1-405b": 2 * 258_048, "deepseek-v3": 2 * 61 * 576}
    assert {name: 2 * load_model(name).kv_elements for name in known} == known


def test_every_table_names_its_source():
    for each in [load_gpu(name) for name in gpu_names()] + [load_model(name) for name in model_names()] + [load_limits()]:
        assert len(each.source) > 20


def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    assert run(["limits", "--gpu", "xpu-hbm4", "--chips", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["context"] for row in rows] == [4_096, 131_072]
    assert rows[0]["tokens_per_s_user"] > rows[1]["tokens_per_s_user"]
    assert run(["limits", "--gpu", "xpu-sram", "--chips", "8", "--plot", str(tmp_path / "limits.svg")]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert (tmp_path / "limits.svg").stat().st_size > 1_000


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpu", "h20"], "no GPU 'h20' (did you mean 'h200'?)"),
        (["--model", "llama-3.1-9b"], "no model 'llama-3.1-9b' (did you mean 'llama-3.1-8b'?)"),
        (["--chips", "8,x"], "--chips '8,x': whole numbers, comma-separated, are wanted"),
        (["--chips", "0"], "--chips '0': at least 1 is wanted"),
        (["--plot", "x.foo"], "--plot x.foo: Format 'foo' is not supported"),
        (["--plot", "x"], "--plot x: a file name that ends in .svg, .png or .pdf is wanted"),
        (["--plot", "/proc/none/x.svg"], "--plot /proc/none/x.svg: No such file or directory"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, arguments, line):
    assert run(["limits", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"wave: {line}")
    assert said.count("\n") == 1


def test_a_plot_does_not_replace_a_folder(tmp_path, capsys):
    (tmp_path / "plots.svg").mkdir()
    assert run(["limits", "--plot", str(tmp_path / "plots.svg")]) == 2
    assert capsys.readouterr().err == f"wave: --plot {tmp_path}/plots.svg: Is a directory\n"


def test_a_broken_table_names_its_key(tmp_path, capsys):
    table = tmp_path / "mine.toml"
    table.write_text('name = "mine"\nverified = false\nsource = "made up"\nmemory_bytes_per_s = -1\nmemory_bytes = 1\n[flops]\nbf16 = 1\nfp8 = 1\n')
    assert run(["limits", "--gpu", str(table)]) == 2
    assert "memory_bytes_per_s: input should be greater than 0, got -1" in capsys.readouterr().err
