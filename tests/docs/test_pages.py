"""The pages agree with the code and with each other: generated ones are current, links lead somewhere, commands exist."""

import importlib.util
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from pydantic import BaseModel
from typer.main import get_command

from waveos import policy, scenario, sched, testing
from waveos.cli.app import app
from waveos.ipu_emulator.profile import HostProfile, LinkProfile
from waveos.ipu_emulator.sched.machine import COSTS
from waveos.scenario import load_scenario

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def generator():
    spec = importlib.util.spec_from_file_location("wave_docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_code_says():
    for path, text in generator().pages().items():
        assert path.read_text() == text.rstrip() + "\n", f"{path.name} is out of date: run `make docs`"


def test_the_functions_of_the_policy_api_have_the_names_by_which_they_are_imported():
    named = re.findall(r"^\*\*`(testing\.|sched\.)?(\w+)\(", generator().policy_page(), re.MULTILINE)
    places = {"": policy, "testing.": testing, "sched.": sched}
    assert len(named) > 15
    assert [name for place, name in named if not hasattr(places[place], name)] == []


def test_every_key_of_a_scenario_is_on_the_page():
    page = (DOCS / "scenarios.md").read_text()
    tables = [
        each for each in vars(scenario).values() if isinstance(each, type) and issubclass(each, BaseModel) and each.__module__ == scenario.__name__
    ]
    keys = {key for table in tables for key in table.model_fields}
    assert len(keys) > 30
    assert {key for key in keys if f"`{key}`" not in page} == set()


def test_every_cost_is_on_the_page_of_the_model():
    page = (DOCS / "model.md").read_text()
    keys = {name for name in HostProfile.model_fields if name.endswith(("_ns", "_us"))}
    for table in LinkProfile.model_fields.values():
        if isinstance(table.annotation, type) and issubclass(table.annotation, BaseModel):
            keys |= {name for name in table.annotation.model_fields if name.endswith(("_ns", "_us"))}
    keys |= {"message_ns"} & set(COSTS.names)
    assert {key for key in keys if f"`{key}`" not in page and f".{key}`" not in page} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, heading = unquote(target).partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_on_a_page_exist_and_have_the_options_that_are_shown(page):
    lines = re.findall(r"^(?:\$ )?(?:WAVE_JIT=0 )?wave ([^#\n]*)", page.read_text(), re.MULTILINE)
    lines += re.findall(r"`wave ([a-z][^`]*)`", page.read_text())
    root = get_command(app)
    for line in lines:
        command, told = root, line.split()
        while told and hasattr(command, "commands") and told[0] in command.commands:
            command = command.commands[told.pop(0)]
        assert command is not root, f"{page.name}: wave {line}"
        if command.name in ("bench", "demo"):  # these parse their own
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {each for each in told if each.startswith("--")} <= known | {"--help"}, f"{page.name}: wave {line}"


def test_the_readme_shows_the_fifo_policy_as_it_is():
    assert f"```python\n{(ROOT / 'agents' / 'sched' / 'fifo.py').read_text()}```" in (ROOT / "README.md").read_text()


def test_the_readme_names_every_reference_policy():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "agents" / "sched").glob("[a-z]*.py"):
        assert f"`{path.stem}`" in text or f"sched/{path.name}" in text, path.name


def test_the_picture_is_small_and_says_how_its_times_were_made():
    picture = DOCS / "latency.svg"
    assert picture.stat().st_size < 150_000
    assert "timing: modelled; link profile: assumed" in picture.read_text()


def test_the_examples_of_settings_are_settings():
    scenario = load_scenario("ghost-rocksdb", ["link.costs.wire.one_way_ns=500", "workload.classes.GET.slo_us=300", "policies.names=fifo,./mine.py"])
    assert scenario.link.costs == {"wire": {"one_way_ns": 500}}
    assert scenario.workload.classes[0].slo_us == 300
    assert scenario.policies.names == ["fifo", "./mine.py"]
