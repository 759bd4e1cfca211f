"""What clients ask for: synthetic workloads made from published means, and traces in the formats of Mooncake and Azure."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from waveos.errors import ConfigError
from waveos.ipu_emulator.serving.cost import Fitted
from waveos.names import nearest

_FILE = Path(__file__).parents[1] / "data" / "serving" / "workloads.toml"
SPAN = 2_048
"""Tokens of a block of a synthetic prompt: what is shared ends where a block ends."""
MOONCAKE_BLOCK = 512
MOST_TOKENS = SPAN << 12
"""Of a prompt, and of an output, in a trace: 12 bits of a block's id are its place."""
END = 1 << 62
"""Ids and times (ns) in a trace are below it: they are 64-bit numbers."""
S = 1_000_000_000
_AZURE_TIME = re.compile(r"(.{19})(?:\.([0-9]{1,9}))?(Z|[+-][0-9]{2}:[0-9]{2})?")


@dataclass(slots=True)
class Ask:
    """One request of a client."""

    at_ns: int
    prompt: int
    outputs: int
    blocks: list[int]
    sizes: list[int]


@dataclass
class Workload:
    """Requests in the order of their arrival; `warm` are blocks (id, parent, tokens) that host memory holds at the start."""

    name: str
    asks: list[Ask]
    warm: list[tuple[int, int, int]] = field(default_factory=list)


class Shape(BaseModel):
    """Published means of one workload."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: float
    outputs: float
    contexts: int
    queries: int
    warm: bool = False


@lru_cache(maxsize=1)
def load_shapes() -> dict[str, Shape]:
    """The synthetic workloads that ship with Wave."""
    raw = tomllib.loads(_FILE.read_text())
    return {name: Shape.model_validate(table) for name, table in raw.items() if isinstance(table, dict)}


def make_workload(name: str, rate_per_s: float, fitted: Fitted, *, queries: int = 0, seed: int = 1) -> Workload:
    """Poisson arrivals over the contexts in random order, each context as often as any other. Lengths are log-normal."""
    shapes = load_shapes()
    if name not in shapes:
        raise ConfigError(f"no workload {name!r}{nearest(name, shapes)}; there are: {', '.join(shapes)}")
    shape, rng = shapes[name], np.random.default_rng(seed)
    n = queries or shape.queries
    arrivals = np.cumsum(rng.exponential(1.0 / rate_per_s, n))
    outputs = np.maximum(1, rng.poisson(shape.outputs, n)) if shape.outputs < 50 else np.maximum(1, rng.exponential(shape.outputs, n)).astype(int)
    question_mean = fitted.question_tokens * np.exp(0.5 * fitted.question_sigma**2)
    if shape.contexts:
        questions = np.maximum(1, rng.lognormal(np.log(fitted.question_tokens), fitted.question_sigma, n)).astype(int)
        lengths = _lengths(rng, shape.contexts, max(1.0, shape.prompt - question_mean), fitted.context_sigma)
        chosen = np.arange(n) % shape.contexts
        rng.shuffle(chosen)
        contexts = [_split(length) for length in lengths.tolist()]
    else:
        questions = _lengths(rng, n, shape.prompt, 1.0)
        chosen, contexts = np.zeros(n, int), [[]]
    asks = []
    for number, (at, question, output, context) in enumerate(
        zip(arrivals.tolist(), questions.tolist(), outputs.tolist(), chosen.tolist(), strict=True)
    ):
        shared, own = contexts[context], _split(question)
        blocks = [_shared(context, at_block) for at_block in range(len(shared))]
        blocks += [1 << 50 | (number + 1) << 12 | at_block for at_block in range(len(own))]
        asks.append(Ask(round(at * S), sum(shared) + question, output, blocks, shared + own))
    warm = []
    if shape.warm:
        for context, sizes in enumerate(contexts):
            warm += [(_shared(context, at), _shared(context, at - 1) if at else 0, size) for at, size in enumerate(sizes)]
    return Workload(name, asks, warm)


def _shared(context: int, block: int) -> int:
    return (context + 1) << 16 | block + 1


def _lengths(rng: np.random.Generator, n: int, mean: float, sigma: float) -> np.ndarray:
    """Log-normal lengths whose sample mean is the given one."""
    drawn = rng.lognormal(0.0, sigma, n)
    return np.maximum(1, drawn / drawn.mean() * mean).astype(int)


def _split(tokens: int) -> list[int]:
    return [SPAN] * (tokens // SPAN) + ([tokens % SPAN] if tokens % SPAN else [])


def bundled_trace() -> Path:
    """The beginning of Mooncake's conversation trace; data/traces/traces.toml has its origin and licence."""
    return Path(__file__).parents[1] / "data" / "traces" / "mooncake-conversation-1000.jsonl"


def read_mooncake(path: Path, limit: int = 0) -> Workload:
    """A trace in Mooncake's JSONL format: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` of blocks of 512 tokens. Raises ConfigError."""
    asks: list[Ask] = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            at, prompt, outputs, ids = (
                int(row["timestamp"]),
                int(row["input_length"]),
                int(row["output_length"]),
                [int(each) + 1 for each in row["hash_ids"]],
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{path}:{number}: not a request of a Mooncake trace ({type(error).__name__}: {error})") from None
        _check_tokens(path, number, prompt, outputs)
        blocks = -(-prompt // MOONCAKE_BLOCK)
        if blocks != len(ids):
            raise ConfigError(
                f"{path}:{number}: {prompt} tokens of input, {outputs} of output and {len(ids)} blocks; {blocks} blocks of {MOONCAKE_BLOCK} are wanted"
            )
        if not all(0 < each < END for each in ids):
            raise ConfigError(f"{path}:{number}: one of the hash_ids is not within 0 to 2^62 - 2")
        sizes = [MOONCAKE_BLOCK] * blocks
        sizes[-1] = prompt - MOONCAKE_BLOCK * (blocks - 1)
        _check_order(path, number, asks, at * 1_000_000)
        asks.append(Ask(at * 1_000_000, prompt, max(1, outputs), ids, sizes))
        if limit and len(asks) == limit:
            break
    return Workload(path.stem, asks)


def read_azure(path: Path, limit: int = 0) -> Workload:
    """A trace in the format of AzurePublicDataset's LLM traces: `TIMESTAMP,ContextTokens,GeneratedTokens`; nothing is shared. Raises ConfigError.

    A timestamp is as 2023-11-16 18:17:03.9799600, in UTC, or with an offset, as 2024-05-10 00:00:00.009930+00:00.
    """
    asks: list[Ask] = []
    begin = 0
    for number, line in _lines(path):
        if number == 1:
            if line.strip() != "TIMESTAMP,ContextTokens,GeneratedTokens":
                raise ConfigError(f"{path}: the first line is {line.strip()!r}; TIMESTAMP,ContextTokens,GeneratedTokens is wanted")
            continue
        try:
            when, prompt_text, outputs_text = next(csv.reader([line]))
            if (time := _AZURE_TIME.fullmatch(when)) is None:
                raise ValueError(f"{when!r:.60} is not a time")
            seconds, fraction, offset = time.groups(default="")
            at = round(datetime.fromisoformat(seconds + (offset or "Z")).timestamp()) * S + int(fraction.ljust(9, "0"))
            prompt, outputs = int(prompt_text), int(outputs_text)
        except (ValueError, OverflowError, csv.Error) as error:
            raise ConfigError(f"{path}:{number}: not a request of an Azure trace ({error})") from None
        _check_tokens(path, number, prompt, outputs)
        begin = begin if asks else at
        _check_order(path, number, asks, at - begin)
        sizes = _split(prompt)
        blocks = [1 << 50 | number << 12 | at_block for at_block in range(len(sizes))]
        asks.append(Ask(at - begin, prompt, max(1, outputs), blocks, sizes))
        if limit and len(asks) == limit:
            break
    return Workload(path.stem, asks)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text ({error.reason})") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _check_tokens(path: Path, number: int, prompt: int, outputs: int) -> None:
    if not (1 <= prompt <= MOST_TOKENS and 0 <= outputs <= MOST_TOKENS):
        raise ConfigError(
            f"{path}:{number}: {prompt} tokens of input and {outputs} of output; {MOST_TOKENS} at most of each, and one of input at least"
        )


def _check_order(path: Path, number: int, asks: list[Ask], at_ns: int) -> None:
    if at_ns < 0 or (asks and at_ns < asks[-1].at_ns):
        raise ConfigError(f"{path}:{number}: time goes back; a trace is in the order of its arrivals")
    if at_ns >= END:
        raise ConfigError(f"{path}:{number}: a time that 64 bits do not hold in ns")
