"""A small decoder-only transformer with random weights, in float64: what the reference engine runs.

Its purpose is to make wrong KV visible as wrong tokens, so attention is peaked: a token's successor hangs on few tokens of its context. Work is cut into
*units*: one for each KV head with its query heads, and as many shards of the feed-forward layer. Every unit gives a term of a sum, and the terms are added
in the order of their units, so the result does not depend on who has computed which. `Dense` is the whole model in one process, without cache and without
tiers: what the engine's tokens are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.serving.text import VOCABULARY

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SPOKEN = np.array([10, *range(32, 127)])
"""What the model may say: printable text, so that a token is a character."""
_EPSILON = 1e-6
_COLDEST = 1e-6
"""A temperature below it says what this one does: the likeliest."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the default has 3.1 million parameters."""

    layers: int = 3
    hidden: int = 256
    kv_heads: int = 8
    group: int = 2  # query heads of a KV head
    head_dim: int = 16
    ffn: int = 1024
    shards: int = 8  # of the feed-forward layer
    seed: int = 20_251_124

    @property
    def parameters(self) -> int:
        """All of them."""
        return int(sum(np.prod(size) for size in self.arrays().values()))

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Weights by name: the first axes are the layer and the unit."""
        queries, wide = self.group * self.head_dim, self.ffn // self.shards
        return {
            "q": (self.layers, self.kv_heads, self.hidden, queries),
            "k": (self.layers, self.kv_heads, self.hidden, self.head_dim),
            "v": (self.layers, self.kv_heads, self.hidden, self.head_dim),
            "o": (self.layers, self.kv_heads, queries, self.hidden),
            "gate": (self.layers, self.shards, self.hidden, wide),
            "up": (self.layers, self.shards, self.hidden, wide),
            "down": (self.layers, self.shards, wide, self.hidden),
            "embed": (VOCABULARY, self.hidden),
            "head": (self.hidden, VOCABULARY),
        }


HEAD_ARRAYS, SHARD_ARRAYS = ("q", "k", "v", "o"), ("gate", "up", "down")


def make_weights(shape: Shape) -> dict[str, Floats]:
    """Random weights from the shape's seed; equal seeds give equal weights."""
    rng = np.random.default_rng(shape.seed)
    inputs = {"o": shape.kv_heads * shape.group * shape.head_dim, "down": shape.ffn, "embed": 1}
    sharp = {"q": 2.0, "k": 2.0}  # scores of attention have a deviation of 4: few tokens take most of it
    made = {}
    for name, size in shape.arrays().items():
        made[name] = rng.standard_normal(size) * (sharp.get(name, 1.0) / np.sqrt(inputs.get(name, shape.hidden)))
    return made


def normed(x: Floats) -> Floats:
    """RMS norm of each row."""
    scaled: Floats = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + _EPSILON)
    return scaled


def rotated(x: Floats, positions: Ints) -> Floats:
    """[rows, heads, dim] with the rotary embedding of their positions."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    sine, cosine, left, right = np.sin(angle), np.cos(angle), x[..., :half], x[..., half:]
    return np.concatenate([left * cosine - right * sine, left * sine + right * cosine], axis=-1)


def attended(queries: Floats, keys: Floats, values: Floats, first: int) -> Floats:
    """[rows, group, dim]: causal attention of one KV head; the rows are the positions from `first` on, keys and values all up to the last of them."""
    rows, group, dim = queries.shape
    scores = queries.reshape(rows * group, dim) @ keys.T
    scores /= np.sqrt(dim)
    if rows > 1:
        future = np.triu(np.ones((rows, rows), bool), 1)
        scores.reshape(rows, group, -1)[:, :, first:][np.broadcast_to(future[:, None], (rows, group, rows))] = -np.inf
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    made: Floats = (scores @ values).reshape(rows, group, dim)
    return made


def head_inputs(shape: Shape, weights: dict[str, Any], layer: int, head: int, h: Floats, positions: Ints) -> tuple[Floats, Floats, Floats]:
    """(queries, keys, values) of one KV head for the rows of `h`."""
    rows = len(h)
    queries = rotated((h @ weights["q"][layer, head]).reshape(rows, shape.group, shape.head_dim), positions)
    keys = rotated((h @ weights["k"][layer, head]).reshape(rows, 1, shape.head_dim), positions)[:, 0]
    return queries, keys, h @ weights["v"][layer, head]


def shard_term(weights: dict[str, Any], layer: int, shard: int, h: Floats) -> Floats:
    """One shard's term of the feed-forward layer."""
    gate = h @ weights["gate"][layer, shard]
    made: Floats = (gate / (1.0 + np.exp(-gate)) * (h @ weights["up"][layer, shard])) @ weights["down"][layer, shard]
    return made


def logits(weights: dict[str, Any], x: Floats) -> Floats:
    """[rows, len(SPOKEN)]: of what may be said."""
    made: Floats = (normed(x) @ weights["head"])[:, SPOKEN]
    return made


def choose(row: Floats, temperature: float = 0.0, draw: Callable[[], float] | None = None) -> tuple[int, float]:
    """(token, margin): the likeliest, and by how much it leads the second; with a temperature one drawn by chance."""
    second, best = np.partition(row, -2)[-2:]
    at = int(np.argmax(row))
    if temperature > 0.0 and draw is not None:
        share = np.exp((row - best) / max(temperature, _COLDEST))
        at = min(int(np.searchsorted(np.cumsum(share / share.sum()), draw())), len(row) - 1)
    return int(SPOKEN[at]), float(best - second)


class Dense:
    """The whole model in one process, without cache, pages, tiers or ranks."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.weights = shape, make_weights(shape)

    def generate(self, prompt: list[int], count: int, chunk: int = 256) -> tuple[list[int], float]:
        """(tokens, smallest margin): `count` tokens that follow the prompt greedily."""
        shape = self.shape
        keys, values = (np.zeros((shape.layers, shape.kv_heads, len(prompt) + count, shape.head_dim)) for _ in range(2))
        tokens, done, margin, row = list(prompt), 0, np.inf, np.zeros(0)
        while len(tokens) < len(prompt) + count:
            while done < len(tokens):
                end = min(len(tokens), done + chunk)
                row = self._forward(np.array(tokens[done:end]), done, keys, values)
                done = end
            token, lead = choose(row)
            tokens.append(token)
            margin = min(margin, lead)
        return tokens[len(prompt) :], margin

    def _forward(self, tokens: Ints, first: int, keys: Floats, values: Floats) -> Floats:
        """Logits after the last of these tokens."""
        shape, end = self.shape, first + len(tokens)
        positions = np.arange(first, end)
        x = self.weights["embed"][tokens]
        for layer in range(shape.layers):
            h, total = normed(x), np.zeros_like(x)
            for head in range(shape.kv_heads):
                queries, keys[layer, head, first:end], values[layer, head, first:end] = head_inputs(shape, self.weights, layer, head, h, positions)
                seen = attended(queries, keys[layer, head, :end], values[layer, head, :end], first)
                total += seen.reshape(len(x), -1) @ self.weights["o"][layer, head]
            x = x + total
            h, total = normed(x), np.zeros_like(x)
            for shard in range(shape.shards):
                total += shard_term(self.weights, layer, shard, h)
            x = x + total
        return logits(self.weights, x[-1:])[0]
