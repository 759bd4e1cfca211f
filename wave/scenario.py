"""Scenario: one TOML file that describes an experiment in any world: who serves whom, over which link, under which load, by which policies.

`load_scenario("rocksdb")` reads a shipped scenario, `load_scenario("my.toml")` a file; `settings` override keys by dotted name.
Units are in the names of keys (`_ns`, `_us`, `_ms`, `_per_s`). A key or value that cannot be is a ConfigError that says what was
read, where, and what to write instead. `Scenario.origin` tells where each value came from.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from waveos.errors import ConfigError
from waveos.explain import explain_errors, lookup_origin
from waveos.names import nearest

MITIGATIONS = ("wb", "wc_wt", "prestage", "prefetch")
"""The four mitigations of a slow link, in the order in which the Wave paper adds them."""

_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, le=1)]


class Part(BaseModel):
    """A table of the scenario. Unknown keys are errors, numbers are numbers (no "5" for 5), and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Service(Part):
    """How long a request computes. One of the forms below; `fixed_us` may also stand beside another form and is added to it."""

    samples: str | None = Field(default=None, description='measured service times: "file.csv", "file.npz:name" or "rocksdb:get"')
    fixed_us: Annotated[float, Field(ge=0)] | None = Field(default=None, description="a number of microseconds, 0 or more")
    exponential_us: _Positive | None = Field(default=None, description="mean, a number of microseconds above 0")
    erlang_us: _Positive | None = Field(default=None, description="mean, a number of microseconds above 0")
    stages: Annotated[int, Field(ge=1)] | None = Field(default=None, description="stages of the Erlang distribution, a whole number from 1")
    hyperexponential_us: list[_Positive] | None = Field(default=None, description="a list of means, in microseconds, each above 0")
    shares: list[_Share] | None = Field(default=None, description="how often each of the means is drawn; they add up to 1")
    lognormal_us: _Positive | None = Field(default=None, description="mean, a number of microseconds above 0")
    sigma: _Positive | None = Field(default=None, description="standard deviation of the logarithm, a number above 0")

    @model_validator(mode="after")
    def _one_form(self) -> Service:
        forms = [
            name for name in ("samples", "exponential_us", "erlang_us", "hyperexponential_us", "lognormal_us") if getattr(self, name) is not None
        ]
        if len(forms) > 1:
            raise ValueError(f"{' and '.join(forms)} exclude each other: give one")
        if not forms and not self.fixed_us:
            raise ValueError(
                "no service time is given: write one of fixed_us (above 0), exponential_us, erlang_us, hyperexponential_us, lognormal_us, samples"
            )
        for owner, partner in (("erlang_us", "stages"), ("hyperexponential_us", "shares"), ("lognormal_us", "sigma")):
            if (getattr(self, owner) is None) != (getattr(self, partner) is None):
                raise ValueError(f"{owner} and {partner} go together: give both or neither")
        if self.hyperexponential_us is not None and self.shares is not None:
            if len(self.shares) != len(self.hyperexponential_us):
                raise ValueError(
                    f"{len(self.hyperexponential_us)} means in hyperexponential_us but {len(self.shares)} shares: one share for each mean"
                )
            _adds_up("shares", self.shares)
        return self

    @property
    def form(self) -> str:
        """The random part: "samples", "exponential", "erlang", "hyperexponential", "lognormal", or "fixed" where nothing is random."""
        for name in ("samples", "exponential_us", "erlang_us", "hyperexponential_us", "lognormal_us"):
            if getattr(self, name) is not None:
                return name.removesuffix("_us")
        return "fixed"


class RequestClass(Part):
    """One kind of request."""

    name: str = Field(min_length=1, description="a name")
    share: _Share = Field(default=1.0, description="its part of all requests, above 0 and at most 1")
    service: Service = Field(description="a service time, as {fixed_us = 10}")
    slo_us: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="what it should be done by after arrival, a number of microseconds; 0 means none"
    )
    qos: Annotated[int, Field(ge=0, le=255)] = Field(default=0, description="quality-of-service class, a whole number 0..255; the higher goes first")


class Trace(Part):
    """Arrivals from a file instead of a random process."""

    trace: str = Field(description="a CSV file with the columns time_ns, class, service_ns")


class Workload(Part):
    """Open-loop arrivals and what they ask for. Loads are absolute or a share of what the workers could serve at no cost at all."""

    arrivals: Literal["poisson"] | Trace = Field(default="poisson", description='"poisson" or {trace = "file.csv"}')
    loads_per_s: list[_Positive] = Field(default=[], description="a list of offered loads, in requests per second, each above 0")
    loads_share: list[_Positive] = Field(default=[], description="a list of offered loads, as shares of workers / mean service time, each above 0")
    classes: list[RequestClass] = Field(min_length=1, max_length=32, description="one [[workload.classes]] table for each kind of request")

    @model_validator(mode="after")
    def _consistent(self) -> Workload:
        if self.loads_per_s and self.loads_share:
            raise ValueError("loads_per_s and loads_share exclude each other: give one (and set the other to [])")
        if not self.loads_per_s and not self.loads_share and self.arrivals == "poisson":
            raise ValueError("no load is given: write loads_per_s = [20000, 40000] or loads_share = [0.2, 0.5, 0.8]")
        names = [each.name for each in self.classes]
        if len(set(names)) != len(names):
            raise ValueError(f"two classes have the same name; the names are {', '.join(names)}")
        _adds_up("the classes' shares", [each.share for each in self.classes])
        return self


class Host(Part):
    """The machine that acts: its cores' costs (a profile) and how much of it serves."""

    profile: str = Field(default="server", description="a host profile's name or TOML file")
    workers: Annotated[int, Field(ge=1, le=1023)] = Field(default=8, description="CPUs that serve requests, a whole number 1..1023")
    threads: Annotated[int, Field(ge=1, le=65_536)] = Field(default=4096, description="threads of the application, a whole number 1..65536")
    costs: dict[str, int] = Field(default={}, description="costs that replace the profile's, as costs.switch_ns = 800")


class LinkPart(Part):
    """What joins host and IPU."""

    profile: str = Field(default="mount-evans", description="a link profile's name or TOML file")
    on_host: str = Field(default="on-host", description="the profile that an agent on a host core is compared with, a name or TOML file")
    mitigations: list[Literal["wb", "wc_wt", "prestage", "prefetch"]] = Field(
        default=["wb", "wc_wt", "prestage", "prefetch"], description="a list out of " + ", ".join(f'"{name}"' for name in MITIGATIONS)
    )
    costs: dict[str, dict[str, int]] = Field(default={}, description="costs that replace the profile's, as costs.wire.one_way_ns = 500")


class Agent(Part):
    """The process that runs the policy. A cost is for a core of the host's speed; `speed` says how much slower an IPU core is."""

    message_ns: Literal["measured"] | Annotated[float, Field(ge=0)] = Field(
        default="measured", description='"measured" on this machine, or nanoseconds a message, 0 or more'
    )
    speed: Literal["profile"] | _Positive = Field(
        default="profile", description="\"profile\", or the IPU core's speed as a share of a host core's, above 0"
    )


def _a_number(value: Any) -> Any:
    """What begins as a number has a unit of its own, which `waveos.explain` converts."""
    if not isinstance(value, int | float) and not str(value)[:1].isdigit():
        raise ValueError(f"{value!r} is no number; a policy's parameter is one, as 30 or 0.5")
    return value


Parameter = Annotated[bool | int | float, BeforeValidator(_a_number)]


class Policies(Part):
    """Which policies run, and their parameters. Those of a policy from a file stand under its own name, or under the file as it is given."""

    names: list[str] = Field(default=["fifo", "shinjuku", "shinjuku_mq"], min_length=1, description='a list of policies, as ["fifo", "my_policy.py"]')
    ablation: str = Field(default="", description="the policy that is run with fewer mitigations; the last of names by default")
    params: dict[str, dict[str, Parameter]] = Field(
        default={},
        description="a table of parameters, which are numbers, for each policy, by its own name or by its file: "
        """`--set policies.params.mine.quantum_us=5` or `--set 'policies.params."./mine.py".quantum_us=5'`""",
    )


class Run(Part):
    """How long, how often, and from which seed."""

    seed: Annotated[int, Field(ge=0)] = Field(default=1, description="a whole number, 0 or more")
    duration_ms: _Positive = Field(default=1000.0, description="virtual milliseconds that count, a number above 0")
    warmup_ms: Annotated[float, Field(ge=0)] = Field(default=100.0, description="virtual milliseconds before counting, 0 or more")
    replications: Annotated[int, Field(ge=1, le=100)] = Field(default=3, description="seeds a saturation is measured with, a whole number 1..100")
    resolution_share: Annotated[float, Field(gt=0, le=0.5)] = Field(default=0.01, description="how fine saturation is searched, as a share of it")


class Goal(Part):
    """What a class's latency must not exceed for a load to count as served."""

    mean_us: _Positive | None = Field(default=None, description="a number of microseconds above 0")
    p50_us: _Positive | None = Field(default=None, description="a number of microseconds above 0")
    p99_us: _Positive | None = Field(default=None, description="a number of microseconds above 0")
    p999_us: _Positive | None = Field(default=None, description="a number of microseconds above 0")
    p50_x_mean: _Positive | None = Field(default=None, description="a multiple of the class's mean service time, above 0")
    p99_x_mean: _Positive | None = Field(default=None, description="a multiple of the class's mean service time, above 0")
    p999_x_mean: _Positive | None = Field(default=None, description="a multiple of the class's mean service time, above 0")


class File(Part):
    """What scenarios of all subsystems have. `base` is the folder that relative file names start from."""

    name: str = Field(default="", description="a name for reports; the file's by default")
    about: str = Field(default="", description="one sentence on what it is for")
    _origin: dict[str, str] = PrivateAttr(default_factory=dict)
    _base: Path = PrivateAttr(default=Path())

    @property
    def base(self) -> Path:
        """The folder from which the scenario's relative file names start."""
        return self._base

    @property
    def origin(self) -> dict[str, str]:
        """Where each value came from, by dotted key: "default", the file, or the flag that set it."""
        return {key: lookup_origin(self._origin, key) for key, _ in flatten(self.model_dump())}


class Scenario(File):
    """The whole experiment."""

    subsystem: Literal["sched"] = Field(default="sched", description='the subsystem it is about; these keys are those of "sched"')
    host: Host = Field(default_factory=Host, description="a [host] table")
    link: LinkPart = Field(default_factory=LinkPart, description="a [link] table")
    agent: Agent = Field(default_factory=Agent, description="an [agent] table")
    workload: Workload = Field(description="a [workload] table with loads and classes")
    policies: Policies = Field(default_factory=Policies, description="a [policies] table")
    run: Run = Field(default_factory=Run, description="a [run] table")
    objective: dict[str, Goal] = Field(default={}, description="a table of goals for each class")

    @model_validator(mode="after")
    def _objective_names_classes(self) -> Scenario:
        names = [each.name for each in self.workload.classes]
        for name in self.objective:
            if name not in names:
                raise ValueError(f"objective.{name}: no such class{nearest(name, names)}")
        return self


SUBSYSTEMS = ("sched", "memory", "net", "vm")
"""Those that have scenarios. One of another than "sched" has the keys of `SCHEMA` in `waveos.<subsystem>.scenario`."""


def schema_of(raw: Mapping[str, Any], source: str) -> type[File]:
    """The class that describes this scenario. Raises ConfigError for a subsystem that there is not."""
    subsystem = raw.get("subsystem", "sched")
    if subsystem == "sched":
        return Scenario
    if subsystem == "serving":
        raise ConfigError(f"{source}: serving has no scenarios; see `wave serve`, `wave bench strata`; those that have: {', '.join(SUBSYSTEMS)}")
    if subsystem not in SUBSYSTEMS:
        raise ConfigError(f"{source}: subsystem = {subsystem!r}{nearest(str(subsystem), SUBSYSTEMS)}: no such; there are {', '.join(SUBSYSTEMS)}")
    schema: type[File] = import_module(f"waveos.{subsystem}.scenario").SCHEMA
    return schema


def load_scenario(name: str, settings: Iterable[str | tuple[str, Any, str]] = ()) -> Any:
    """The scenario of a shipped `name` or of a TOML file, with `settings` over it: a `Scenario`, or what another subsystem has for it.

    A setting is `"key=value"` as after `--set` (the key dotted, a step that holds a dot in quotes as in TOML, classes by name or number, the value as in
    TOML, quotes optional) or `(key, value, origin)` from another flag. Raises ConfigError for whatever cannot be, with file, line, key and remedy.
    """
    path = find_scenario(name)
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"scenario {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"scenario {path} is not valid TOML: {error}") from None
    origin = dict.fromkeys((key for key, _ in flatten(raw)), str(path))
    for setting in settings:
        key, value, flag = _parse_setting(setting) if isinstance(setting, str) else setting
        dotted = ".".join(steps_of(key))
        for old in [old for old in origin if old.startswith(dotted + ".")]:
            del origin[old]
        origin.update(dict.fromkeys((inner for inner, _ in flatten(value, dotted)), flag))
        _assign(raw, key, value, flag)
    scenario = check_scenario(raw, source=str(path), text=text, origin=origin)
    scenario._base = path.parent
    scenario._origin = origin
    return scenario if scenario.name else scenario.model_copy(update={"name": path.stem})


def check_scenario(raw: Mapping[str, Any], *, source: str = "scenario", text: str = "", origin: Mapping[str, str] | None = None) -> Any:
    """The scenario that the dictionary describes. Raises ConfigError; `source`, `text` and `origin` help it say where."""
    schema = schema_of(raw, source)
    try:
        return schema.model_validate(raw)
    except ValidationError as errors:
        raise ConfigError(explain_errors(errors, schema, raw, source=source, text=text, origin=origin or {})) from None


def scenario_folders() -> list[Path]:
    """Where scenarios are looked for by name: `scenarios/` here, then those that came with Wave."""
    shipped = find_spec("waveos.scenarios")
    folders = [Path("scenarios"), *(Path(each) for each in (shipped.submodule_search_locations or [] if shipped else []))]
    return [*folders, Path(__file__).resolve().parent.parent / "scenarios"]


def scenario_names() -> list[str]:
    """Names that `load_scenario` knows."""
    return sorted({path.stem for folder in scenario_folders() for path in folder.glob("*.toml")})


def find_scenario(name: str) -> Path:
    """The file of a scenario's name or path. Raises ConfigError if there is none."""
    if name.endswith(".toml") or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"there is no scenario file {name!r}; names of shipped ones: {', '.join(scenario_names())}")
    for folder in scenario_folders():
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = scenario_names()
    raise ConfigError(f"there is no scenario {name!r}{nearest(name, known)}; known: {', '.join(known)}; or give a path to a .toml file")


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables as (dotted key, value). Tables in a list go by their `name`, or number; a list of plain values is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, inner in enumerate(value):
            yield from flatten(inner, f"{prefix}.{inner.get('name', number) if isinstance(inner, Mapping) else number}")
    else:
        yield prefix, value


# ── how settings are applied ─────────────────────────────────────────────────────────────────────────────────────────


def parse_value(text: str) -> Any:
    """A value as in TOML; what is not TOML is a list at commas, else a string, so that `fifo,shinjuku` needs no quotes."""
    for form in (f"value = {text}", f"value = [{text}]" if "," in text else ""):
        try:
            return tomllib.loads(form)["value"]
        except (tomllib.TOMLDecodeError, KeyError):
            continue
    return [parse_value(each.strip()) for each in text.split(",")] if "," in text and not text.startswith(("{", "[")) else text


_QUOTED = r"\"[^\"]+\"|'[^']+'"
_STEP = re.compile(rf"({_QUOTED})|([^.\"']+)")
_KEY = re.compile(rf"((?:{_QUOTED}|[^=\"'])+)=")


def _parse_setting(setting: str) -> tuple[str, Any, str]:
    key, found, value = _split_setting(setting)
    if not found or not key.strip():
        raise ConfigError(f"--set {setting}: wants key=value, as --set run.seed=7")
    return key.strip(), parse_value(value.strip()), "--set"


def _split_setting(setting: str) -> tuple[str, str, str]:
    """As `partition("=")`, at the first one that stands in no quoted step of the key."""
    match = _KEY.match(setting)
    return setting.partition("=") if match is None else (match[1], "=", setting[match.end() :])


def steps_of(key: str) -> list[str]:
    """The steps of a dotted key: those in quotes, as in TOML, may hold dots."""
    if '"' not in key and "'" not in key:
        return key.split(".")
    found = _STEP.findall(key)
    if ".".join(quoted or plain for quoted, plain in found) != key:
        raise ConfigError(
            f'{key}: a key is steps with dots between them; one that holds a dot stands in quotes, as policies.params."my.py".quantum_us'
        )
    return [quoted[1:-1] if quoted else plain for quoted, plain in found]


def _assign(raw: dict[str, Any], key: str, value: Any, flag: str) -> None:
    steps = steps_of(key)
    place: Any = raw
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(place, list):
            number = next((index for index, each in enumerate(place) if isinstance(each, Mapping) and each.get("name") == step), None)
            if number is None and step.isdigit() and int(step) < len(place):
                number = int(step)
            if number is None:
                names = [str(each.get("name", index)) for index, each in enumerate(place) if isinstance(each, Mapping)]
                raise ConfigError(f"{flag} {key}: no `{step}` in {'.'.join(steps[:depth])}{nearest(step, names)}; there are {', '.join(names)}")
            if last:
                place[number] = value
            place = place[number]
        elif isinstance(place, dict):
            if last:
                place[step] = value
            place = place.setdefault(step, {})
        else:
            raise ConfigError(f"{flag} {key}: {'.'.join(steps[:depth])} is a value, not a table")


def _adds_up(what: str, shares: Sequence[float]) -> None:
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"{what} add up to {sum(shares):.6g}; they must add up to 1")
