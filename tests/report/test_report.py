"""The report and the table say what the results say, whatever part of them is there."""

from __future__ import annotations

import copy
import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from waveos.errors import ConfigError
from waveos.report.html import render_report, write_report
from waveos.report.quantities import show_rate, show_share, show_time
from waveos.report.reading import read_results
from waveos.report.table import comparison_table

_spec = importlib.util.spec_from_file_location("synthetic_results", Path(__file__).with_name("synthetic.py"))
assert _spec and _spec.loader
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)


@pytest.fixture
def results() -> dict[str, Any]:
    made: dict[str, Any] = synthetic.make_results()
    return made


@pytest.fixture
def small() -> dict[str, Any]:
    """The same with fewer points, where nothing depends on them."""
    made: dict[str, Any] = synthetic.make_results(seeds=1, loads=2)
    return made | {"configs": [made["configs"][number] for number in (0, 4, 6)]}


@pytest.fixture
def one_run() -> dict[str, Any]:
    """The least that a run says."""
    point = {"load_per_s": 50_000.0, "throughput_per_s": 50_000.0, "seed": 9, "classes": {"GET": {"p50_us": 4.0, "p99_us": 21.0, "p999_us": 77.0}}}
    return {"name": "one run", "timing": "modelled", "configs": [{"id": "edf/offload", "points": [point]}]}


class Balance(HTMLParser):
    """Collects visible text, links and whether tags close as they opened."""

    EMPTY = frozenset({"meta", "br", "link", "img", "input", "hr", "line", "path", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def terminal(results: dict[str, Any], width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    with console.file:
        console.print(comparison_table(results))
        return console.export_text()


def test_the_page_is_whole_html_and_fetches_nothing(results: dict[str, Any]) -> None:
    page = render_report(results)
    parsed = Balance(page)
    assert parsed.open == []
    assert all(source.startswith("#") for source in parsed.sources)
    assert not re.search(r"url\((?!#)|@import|<script|<iframe|<object", page)
    assert re.sub(r'xmlns(:\w+)?="[^"]*"', "", page).count("http") == 0


def test_every_figure_is_well_formed_svg_with_the_page_s_colours_and_fonts(results: dict[str, Any]) -> None:
    figures = [svg for svg in re.findall(r"<svg.*?</svg>", render_report(results), re.DOTALL) if "aria-label" in svg]
    assert len(figures) == 5
    for svg in figures:
        ElementTree.fromstring(svg)
        assert "font-family" not in svg and not re.search(r"#0a0[bc]", svg)
        assert "var(--ink)" in svg and "var(--policy-1)" in svg
        ids = re.findall(r' id="([^"]+)"', svg)
        assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg)) <= set(ids)


def test_a_page_is_readable_in_light_and_dark(small: dict[str, Any]) -> None:
    page = render_report(small)
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert used <= set(re.findall(r"(--[\w-]+):", light)) == set(re.findall(r"(--[\w-]+):", dark))


def test_ids_of_different_figures_never_meet(results: dict[str, Any]) -> None:
    ids = re.findall(r' id="([^"]+)"', render_report(results))
    assert len(ids) == len(set(ids))


def test_equal_results_give_an_equal_page(small: dict[str, Any]) -> None:
    assert render_report(small) == render_report(copy.deepcopy(small))


def test_the_page_says_how_the_times_were_made_and_that_the_link_is_assumed(small: dict[str, Any]) -> None:
    text = Balance(render_report(small)).text
    assert "timing: modelled" in text and "link profile: assumed (mount-evans)" in text and "seed: 1" in text
    assert "GET p99 ≤ 200 µs and RANGE p99 ≤ 10.3 ms" in text
    assert "orders of magnitude from public PCIe measurements" in text and small["notes"][0] in text
    small["link"]["verified"] = True
    assert "assumed" not in Balance(render_report(small)).text


def test_the_table_on_the_page_and_the_one_on_the_terminal_say_the_same_configurations(results: dict[str, Any]) -> None:
    page, text = Balance(render_report(results)).text, terminal(results)
    assert text.count("offload ") == 3
    for number in ("630.0", "558.0", "695.5", "739.0"):
        assert number in page and number in text
    assert "+1.1 to +5.8" in page and "−12.0 to −7.0" in page
    assert "+3.4 %" in page and "+3.4 %" in text and "−9.2 %" in page and "−9.2 %" in text


def test_the_terminal_table_fits_120_columns_and_cuts_nothing(results: dict[str, Any]) -> None:
    text = terminal(results, width=121)
    assert "…" not in text
    assert "timing: modelled; link profile: assumed (mount-evans)" in text
    assert "objective" not in text or "GET p99 ≤ 200 µs" in text


def test_a_run_of_one_configuration_makes_a_report(one_run: dict[str, Any]) -> None:
    text = Balance(render_report(one_run)).text
    assert "one run" in text and "edf" in text and "offload" in text and "21.0 µs" in text and "link profile: none" in text
    assert "Saturation throughput" not in text and "mitigation" not in text
    assert "4.00/21.0/77.0" in terminal(one_run)


PARTS = ["scenario", "timing", "link", "machine", "wave_version", "ablation", "notes", "service", "name"]


@pytest.mark.parametrize("part", PARTS)
def test_any_other_part_may_be_absent(small: dict[str, Any], part: str) -> None:
    del small[part]
    assert Balance(render_report(small)).open == []
    assert "shinjuku" in terminal(small)


def test_all_other_parts_may_be_null(small: dict[str, Any]) -> None:
    small |= dict.fromkeys(PARTS)
    assert Balance(render_report(small)).open == []
    assert "shinjuku" in terminal(small)


def test_unknown_numbers_are_dashes(one_run: dict[str, Any]) -> None:
    one_run["configs"][0]["points"][0]["classes"]["GET"] = {"p50_us": None, "p99_us": float("nan")}
    assert "–/–/–" in terminal(one_run)
    assert Balance(render_report(one_run)).open == []


def test_names_are_text_and_never_markup(one_run: dict[str, Any]) -> None:
    one_run["name"] = "<b>[bold]x[/bold]</b>"
    one_run["configs"][0] |= {"policy": "a<script>b", "world": "offload"}
    assert "<script>" not in render_report(one_run) and "a&lt;script&gt;b" in render_report(one_run)
    assert "<b>[bold]x[/bold]</b>" in terminal(one_run)


def test_results_are_compared_at_the_highest_load_that_most_sustain(results: dict[str, Any]) -> None:
    reading = read_results(results)
    assert reading.load_per_s == 540_000.0  # at 630,000 the on-host FIFO and more are beyond saturation
    assert [row.saturated for row in reading.rows()].count(True) <= 2
    assert read_results(results | {"table_load_per_s": 90_000.0}).load_per_s == 90_000.0


def test_seeds_of_one_load_are_one_point_with_their_median_and_range(results: dict[str, Any]) -> None:
    configuration = read_results(results).configurations[0]
    assert len(configuration.points) == 10
    spread = configuration.points[-1].value("classes", "GET", "p99_us")
    assert spread and spread.low <= spread.middle <= spread.high
    assert [len(point.seeds) for point in configuration.points] == [3] * 10


def test_the_objective_in_multiples_of_the_mean_needs_the_mean(results: dict[str, Any]) -> None:
    assert read_results(results).objective_us == {"GET": {"p99_us": 200.0}, "RANGE": {"p99_us": 10_300.0}}
    del results["service"]
    assert read_results(results).objective_us == {"GET": {"p99_us": 200.0}}


def test_the_answer_says_less_for_a_cost_and_more_for_a_gain(results: dict[str, Any]) -> None:
    (sentence,) = [each for each in read_results(results).answers() if each.startswith("shinjuku,")]
    assert "3.4 % less than with the agent on a host core" in sentence and "9.2 % more than on the same machine" in sentence


@pytest.mark.parametrize("broken", [{}, [], {"configs": None}, {"configs": ["shinjuku"]}])
def test_what_are_no_results_are_refused(broken: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="configs"):
        write_report(broken, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_the_report_is_written_whole(results: dict[str, Any], tmp_path: Path) -> None:
    write_report(results, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report(results)
    assert (tmp_path / "report.html").stat().st_size < 500_000


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (None, "–"),
        (0, "0 ns"),
        (0.0034, "3.40 ns"),
        (0.85, "850 ns"),
        (0.9999, "1.00 µs"),
        (12.34, "12.3 µs"),
        (999.7, "1.00 ms"),
        (1_040, "1.04 ms"),
        (2.5e6, "2.50 s"),
    ],
)
def test_times_have_the_unit_that_suits(us: float | None, text: str) -> None:
    assert show_time(us) == text


def test_rates_and_shares_are_written_as_people_do() -> None:
    assert [show_rate(rate) for rate in (None, 12.0, 4_200, 412_345, 1_234_567)] == ["–", "12.0 /s", "4.20 k/s", "412.3 k/s", "1,235 k/s"]
    assert [show_share(share) for share in (None, 0.0, 0.001, 0.0123, -0.2)] == ["–", "0.0 %", "0.10 %", "1.2 %", "−20.0 %"]
    assert [show_share(share, sign=True) for share in (0.034, 0.0, -0.092)] == ["+3.4 %", "0.0 %", "−9.2 %"]


def test_notes_stand_in_the_report_and_a_key_with_dots_in_quotes(small: dict[str, Any]) -> None:
    small["notes"] = ["2 of 2 RANGE requests had not finished"]
    small["scenario"]["policies"] = {"params": {"./my.py": {"quantum_us": 5}}}
    page = render_report(small)
    assert "2 of 2 RANGE requests had not finished" in page
    assert "[policies.params.&#34;./my.py&#34;]" in page
