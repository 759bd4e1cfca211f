"""Write docs/policy-api.md, docs/scenarios.md and parts of docs/observe.md from docstrings, enums, record layouts and tables: `make docs`.

A test compares the committed pages with what this makes of the code, so neither can change without the other.
"""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from waveos import errors, policy, scenario, sched, testing
from waveos.ipu_emulator import profile
from waveos.memory import scenario as memory_scenario
from waveos.net import scenario as net_scenario
from waveos.outcome import Outcome
from waveos.policy import state
from waveos.sched import laws
from waveos.sched.records import HANDLERS, MESSAGE, Decision, Message
from waveos.vm import scenario as vm_scenario
from waveos.watch import statistics

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MADE = "<!-- Made by docs/generate.py from the code: change it there, then run `make docs`. -->"

FIELDS = {
    "type": "the message's type",
    "seq": "the thread's sequence number: how often its state has changed; the runtime stamps it on decisions",
    "time_ns": "host time of the event, ns; for `cpu_idle` and `timer_expired` the agent's clock",
    "tid": "the thread, as the enclave's own number from 0; -1 where the message names none",
    "cpu": "the CPU, from 0 to `self.cpus - 1`; -1 where the message names none",
    "request_class": "kind of request, as the application or an RPC stack states it",
    "qos": "quality-of-service class; the higher goes first",
    "outcome": "of `txn_failed`: an [outcome](#outcomes)",
    "front": "of a thread: 1 where it was placed before and that failed, so put it first; of `cpu_idle`: 1 where the CPU still runs a thread and asks ahead",
    "cpu_seq": "the CPU's own sequence number",
    "deadline_ns": "host time by which the request wants to be done; 0: none",
    "work_ns": "the application's estimate of what is left to do, ns; 0: unknown",
    "ran_ns": "CPU time of this activation so far, ns",
}
"""What a policy may read from `msg`. The header's other fields (`mark`, `version`, `subsystem`) are the transport's."""
KEYWORDS = {
    "subsystem": "the subsystem whose messages it handles: `sched`",
    "name": "what it is called in scenarios and tables",
    "compiled": "`False`: it runs as plain Python",
    "work_conserving": "`False`: it may leave a CPU idle while a thread waits, and no law calls that an error",
    "forgets": "`True`: it takes a thread that has left (the host ran it, it sleeps, it ended) out of its queues itself, in `thread_running`, "
    "`thread_blocked`, `thread_dead` and `thread_new`; wanted where a thread may stand in one queue now and in another later",
}
"""Keywords of a policy's class statement."""


def pages() -> dict[Path, str]:
    """Every generated page, by its path."""
    return {DOCS / "policy-api.md": policy_page(), DOCS / "scenarios.md": scenario_page(), DOCS / "observe.md": observe_page()}


# ── the policy API ───────────────────────────────────────────────────────────────────────────────────────────────────


def policy_page() -> str:
    """The policy API: what an author imports, is told and may say."""
    return "\n".join(
        [
            "# Policy API",
            MADE,
            "",
            "What the author of a scheduling policy imports, is told, and may order. To learn it by doing, take the [tutorial](tutorial.md).",
            "",
            "```python",
            "from waveos import sched",
            "from waveos.policy import Policy, Param, ring, push, pop, size",
            "```",
            "",
            *_class_section(),
            *_message_section(),
            "## Orders",
            "",
            "A handler's third argument, `txns`, collects what it orders; the runtime stamps and sends it when the handler returns.",
            f"One call of a handler may give {sched.orders.ORDERS_AT_ONCE} orders.",
            "",
            *_functions(sched, ["run", "preempt", "demote", "set_timer"], "sched."),
            *_state_section(),
            *_laws_section(),
            *_outcome_section(),
            *_testing_section(),
            *_error_section(),
        ]
    )


def _class_section() -> Iterator[str]:
    declared = inspect.signature(policy.Policy.__init_subclass__).parameters.values()
    keywords = [each for each in declared if each.kind is inspect.Parameter.KEYWORD_ONLY]
    yield from ["## The class", "", _doc(policy.Policy), ""]
    rows = [(f"`{each.name}`", "must be given" if each.default is each.empty else f"`{each.default}`", KEYWORDS[each.name]) for each in keywords]
    yield from _table(("keyword", "default", "meaning"), rows)
    yield from ["`Param`: " + _doc(policy.Param), ""]
    yield from [
        "A policy that is not installed is named by its file: `--policy ./mine.py`, or `./mine.py:Class` where the file has several. An installed one is",
        "found through the entry-point group `waveos.policies`; `wave new policy NAME` makes a package that declares one. `wave policies list` and",
        "`wave policies show NAME` tell what there is.",
        "",
        "Compiled handlers are compiled by [numba](https://numba.readthedocs.io): integers, floats, loops and conditions over declared state, no lists,",
        "dicts, strings or attributes made on the way. A function that a handler calls is marked `@jitable`. `WAVE_JIT=0` runs the same file as plain Python,",
        "for `print`, `breakpoint()` and coverage; `WAVE_DEBUG=1` shows the traceback behind an error's line.",
        "",
    ]
    yield from _functions(policy, ["load_policy", "policy_names", "jitable"])


def _message_section() -> Iterator[str]:
    yield from [
        "## Messages",
        "",
        "A method with one of these names handles that message: `def thread_runnable(self, msg, txns)`. What a policy does not handle, it is not told.",
        "",
    ]
    yield from _table(("handler", "when"), [(f"`{name}`", Message(code).meaning) for name, code in HANDLERS.items()])
    yield from ["Three more types travel in the same queue and are the runtime's own:", ""]
    yield from _table(("type", "meaning"), [(f"`{each.name}`", each.meaning) for each in Message if each.name.lower() not in HANDLERS])
    hidden = {"mark", "version", "subsystem"}
    names = [name for name in MESSAGE.names or () if name not in hidden]
    assert set(names) == set(FIELDS), f"message fields without a description, or the reverse: {set(names) ^ set(FIELDS)}"
    yield from ["### Fields of `msg`", "", "Every message is one record of 64 bytes; a field that a message has no use for is 0, or -1.", ""]
    layout = MESSAGE.fields or {}
    yield from _table(("field", "type", "meaning"), [(f"`msg.{name}`", f"`{layout[name][0].name}`", FIELDS[name]) for name in names])


def _state_section() -> Iterator[str]:
    declarations = ["ring", "rings", "heap", "heaps", "array", "per_cpu", "per_thread"]
    operations = ["size", "push", "pop", "discard", "heap_push", "heap_pop", "heap_key"]
    named = {*declarations, *operations}
    wanted = set(state.__all__) - {"jitable"}
    assert named == wanted, f"state that is not described, or is no more: {named ^ wanted}"
    yield from ["## State", "", "Declared in the class body: fixed size, typed, one block of memory, zero at first. Handlers keep nothing else.", ""]
    yield from _functions(state, declarations)
    yield from ["### Operations", "", "A full or empty queue is an error that stops the run and names the queue, never an overwrite.", ""]
    yield from _functions(state, operations)


def _laws_section() -> Iterator[str]:
    text = inspect.cleandoc(laws.__doc__ or "")
    about, found, bullets = text.partition("The laws:\n")
    assert found, "laws.py no longer lists its laws after `The laws:`"
    yield from ["## Laws", "", about.strip(), "", bullets.strip(), "", f"(`DEPTH` is {laws.DEPTH}.)", ""]
    yield from ["What travels to the host are decisions: " + ", ".join(f"`{each.name}`" for each in Decision) + ".", ""]


def _outcome_section() -> Iterator[str]:
    yield from ["## Outcomes", "", "The host answers every decision with exactly one.", ""]
    yield from _table(("outcome", "number", "meaning"), [(f"`{each.name.lower()}`", str(each.value), each.meaning) for each in Outcome])


def _testing_section() -> Iterator[str]:
    yield from ["## Tests", "", "`waveos.testing` has what the project's own policies and links are tested with.", ""]
    yield from _functions(testing, ["check_policy", "check_link", "record_stream", "interpreted"], "testing.")


def _error_section() -> Iterator[str]:
    yield from ["## Errors", "", "```text", inspect.cleandoc(errors.__doc__ or ""), "```", ""]
    kinds = sorted(errors.WaveError.__subclasses__(), key=lambda kind: kind.exit_code)
    rows = [(f"`{kind.__name__}`", str(kind.exit_code), _doc(kind)) for kind in kinds]
    yield from _table(("error", "exit code of `wave`", "meaning"), rows)


# ── scenarios ────────────────────────────────────────────────────────────────────────────────────────────────────────

TABLES: list[tuple[str, type[BaseModel]]] = [
    ("Top of the file", scenario.Scenario),
    ("`[host]`", scenario.Host),
    ("`[link]`", scenario.LinkPart),
    ("`[agent]`", scenario.Agent),
    ("`[workload]`", scenario.Workload),
    ("`arrivals = {...}`", scenario.Trace),
    ("`[[workload.classes]]`", scenario.RequestClass),
    ("`service = {...}`", scenario.Service),
    ("`[policies]`", scenario.Policies),
    ("`[run]`", scenario.Run),
    ("`[objective]`, for each class", scenario.Goal),
]

SUBSYSTEMS: dict[str, list[tuple[str, type[BaseModel]]]] = {
    "memory": [
        ("top of the file", memory_scenario.MemoryScenario),
        ("`[memory]`", memory_scenario.Memory),
        ("`[access]`", memory_scenario.Accesses),
        ("`[run]`", memory_scenario.MemoryRun),
    ],
    "net": [
        ("top of the file", net_scenario.NetScenario),
        ("`[service]`", net_scenario.Service),
        ("`[run]`", net_scenario.NetRun),
    ],
    "vm": [
        ("top of the file", vm_scenario.VmScenario),
        ("`[vm]`", vm_scenario.Machines),
        ("`[run]`", vm_scenario.MachineRun),
    ],
}
"""What scenarios of other subsystems have of their own, or in another form."""

NOTES: dict[type[BaseModel], str] = {
    scenario.Scenario: "The whole experiment. Relative file names start from the scenario's folder.",
    scenario.Service: scenario.Service.__doc__
    + " Measured times are a CSV file with a column `service_ns`, an array of ns in an .npz file, or `rocksdb:get` and `rocksdb:range`, "
    "which are measured on this machine when they are first wanted (package `rocksdict`).",
}
"""What a reader of the page needs to know beyond the docstring, or in its place."""


def scenario_page() -> str:
    """Every key of a scenario file, the shipped scenarios, and the profiles of links and hosts."""
    described = {model for _, model in TABLES}
    parts = [
        each for each in [*scenario.Part.__subclasses__(), scenario.Scenario] if each.__module__ == scenario.__name__ and each is not scenario.File
    ]
    missing = [model.__name__ for model in parts if model not in described]
    assert not missing, f"tables of the scenario that no section describes: {missing}"
    return "\n".join(
        [
            "# Scenarios",
            MADE,
            "",
            "A scenario is one TOML file that describes an experiment: who serves whom, over which link, under which load, by which policies. Units are in the",
            "names of keys. An unknown key, or a value that cannot be, is an error that says what to write instead.",
            "",
            "```sh",
            "wave config list                                    # the scenarios that can be named",
            "wave config show rocksdb --origin                   # every value, and where it comes from",
            "wave compare my.toml --set host.workers=4           # a file, with one key overridden",
            'wave compare my.toml --set workload.classes.GET.slo_us=300 --set "policies.names=fifo,./mine.py"',
            "```",
            "",
            *_shipped(),
            *(line for title, model in TABLES for line in _keys(title, model)),
            *(line for name, tables in SUBSYSTEMS.items() for title, model in tables for line in _keys(f"Scenarios of {name}: {title}", model)),
            *_profiles(),
        ]
    )


def _shipped() -> Iterator[str]:
    found = [tomllib.loads(path.read_text()) for path in sorted((ROOT / "scenarios").glob("*.toml"))]
    yield from ["## Shipped", ""]
    yield from _table(("scenario", "what it is"), [(f"`{each['name']}`", each["about"]) for each in found])


def _keys(title: str, model: type[BaseModel]) -> Iterator[str]:
    yield from [f"## {title}", "", NOTES.get(model, _doc(model)), ""]
    rows = [(f"`{name}`", field.description or "", _default(field)) for name, field in model.model_fields.items()]
    yield from _table(("key", "wants", "default"), rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value: Any = field.default
    if value is PydanticUndefined or value is None or value == "" or (isinstance(value, (dict, list)) and not value):
        return ""
    text = str(value).replace("'", '"')
    return f"`{text}`" if not isinstance(value, str) else f'`"{text}"`'


def _profiles() -> Iterator[str]:
    yield from [
        "## Profiles",
        "",
        _doc(profile),
        "",
        'A profile is named (`profile = "mount-evans"`) or is the path of a file of one\'s own. Single costs are overridden in the scenario, as',
        "`--set link.costs.wire.one_way_ns=500`. Where `verified` is false, every table made with it says `link profile: assumed`. What each cost is charged",
        "for stands in [the model](model.md#costs-and-who-pays-them).",
        "",
    ]
    rows = []
    for folder, load in (("links", profile.load_link), ("hosts", profile.load_host)):
        rows += [(f"`{name}`", folder[:-1], "yes" if load(name).verified else "no", load(name).source) for name in profile.profile_names(folder)]
    yield from _table(("profile", "of a", "verified", "source"), rows)
    for path in ("links/mount-evans.toml", "hosts/server.toml"):
        text = (ROOT / "ipu_emulator" / "data" / path).read_text().rstrip()
        yield from [f"`ipu_emulator/data/{path}`:", "", "```toml", text, "```", ""]


# ── what is to be seen ───────────────────────────────────────────────────────────────────────────────────────────────


def observe_page() -> str:
    """The page as it is, with its made parts made anew: the statistics of the daemons, and the screen that the test of `wave top` compares with."""
    screen = (ROOT / "tests" / "watch" / "top.txt").read_text().rstrip()
    parts = {"top": ["```", screen, "```"], "metrics": list(_statistics())}
    page = (DOCS / "observe.md").read_text()
    for name, lines in parts.items():
        made = f"<!-- made: {name} -->\n\n" + "\n".join(lines).strip() + "\n\n<!-- end -->"
        page, found = re.subn(f"<!-- made: {name} -->.*?<!-- end -->", lambda _, made=made: made, page, count=1, flags=re.DOTALL)
        assert found, f"docs/observe.md has no part {name!r}"
    return page


def _statistics() -> Iterator[str]:
    for kind in statistics.Kind:
        rows = [
            (f"`{each.exposed}`", ", ".join(f"`{label}`" for label in statistics.labels_of(each)), each.meaning)
            for each in statistics.everything()
            if each.kind is kind
        ]
        yield from [f"**{kind.name.capitalize()}s**: {kind.meaning}.", "", *_table(("name", "labels", "meaning"), rows)]


# ── Markdown ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _doc(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def _functions(module: ModuleType, names: Iterable[str], prefix: str = "") -> Iterator[str]:
    """Signature without types, and docstring, under the names by which the module offers them."""
    for name in names:
        function = getattr(module, name)
        yield from [f"**`{prefix}{name}{_signature(function)}`**", "", _doc(function), ""]


def _signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(inspect.unwrap(function))
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row) + " |"
    yield ""


def main() -> None:
    """Write the pages that changed; say which."""
    for path, text in pages().items():
        text = text.rstrip() + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"docs: {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
