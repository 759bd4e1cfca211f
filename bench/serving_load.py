"""A load generator for an OpenAI-compatible endpoint: open loop, shared contexts, streamed answers; by default against a `wave serve` of its own.

Arrivals are Poisson; each request asks about one of a few contexts, so that a prefix cache has something to do. What the client sees is measured: time to the
first token, time between tokens, tokens a second, and what failed.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError, MissingError, WaveError

OPTIONS = {
    "url": ("", "base URL with /v1 of a server; by default one is started"),
    "engine": ("reference", "of the server that is started: reference or emulated"),
    "policy": ("strata", "its policy"),
    "ranks": (2, "its ranks"),
    "requests": (60, "requests"),
    "rate": (4.0, "requests a second, offered"),
    "contexts": (4, "contexts that they share"),
    "context_tokens": (1_200, "length of each, in characters"),
    "outputs": (16, "tokens of each answer"),
    "seed": (1, "seed of arrivals and texts"),
}


def run(
    url: str = "",
    engine: str = "reference",
    policy: str = "strata",
    ranks: int = 2,
    requests: int = 60,
    rate: float = 4.0,
    contexts: int = 4,
    context_tokens: int = 1_200,
    outputs: int = 16,
    seed: int = 1,
) -> dict[str, Any]:
    """Offer the load; what the clients saw."""
    if min(requests, contexts, context_tokens, outputs) < 1 or rate <= 0:
        raise ConfigError(f"requests {requests}, contexts {contexts}, context_tokens {context_tokens}, outputs {outputs}, rate {rate}: all above 0")
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise MissingError("bench serving_load needs openai, the client that it drives: pip install openai") from error
    server = None
    if not url:
        server, url = start_server("--engine", engine, "--policy", policy, "--ranks", str(ranks))
    try:
        rng = np.random.default_rng(seed)
        texts = ["".join(map(chr, rng.integers(97, 123, context_tokens))) for _ in range(contexts)]
        gaps = rng.exponential(1.0 / rate, requests)
        seen = asyncio.run(_load(url, texts, np.cumsum(gaps), outputs))
    finally:
        if server is not None:
            stop_server(server)
    return _result(seen, rate)


def start_server(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`wave serve` on a free port, and its base URL. Raises WaveError with what it said if it does not come up."""
    command = [sys.executable, "-P", "-c", "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))", "serve", "--port", "0", *arguments]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = server.stderr.readline()
    found = re.search(r"http://\S+/v1", line)
    if found is None:
        server.kill()
        raise WaveError(f"wave serve did not start: {line.strip() or 'it said nothing'}")
    return server, found.group(0)


def stop_server(server: subprocess.Popen[str]) -> None:
    """Ctrl-C, and by force if that does not help."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if server.stderr is not None:
        server.stderr.close()


async def _load(url: str, texts: list[str], at: Any, outputs: int) -> list[dict[str, Any]]:
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120.0) as client:
        try:
            model = (await client.models.list()).data[0].id
        except openai.OpenAIError as error:
            raise WaveError(f"{url}: {error}: is a server there, and is this its base URL, with /v1?") from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # what the client makes of an answer that is no list
            raise WaveError(f"{url}: it lists no model: is this the base URL of an OpenAI-compatible endpoint, with /v1?") from error
        begin = time.monotonic()

        async def one(number: int) -> dict[str, Any]:
            await asyncio.sleep(max(0.0, begin + at[number] - time.monotonic()))
            asked, times, usage = time.monotonic(), [], None
            try:
                stream = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": f"{texts[number % len(texts)]} question {number}"}],
                    max_tokens=outputs,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async for chunk in stream:
                    if chunk.choices and chunk.choices[0].delta.content:
                        times.append(time.monotonic())
                    usage = chunk.usage or usage
            except openai.OpenAIError as error:
                return {"error": type(error).__name__}
            return {"asked": asked, "times": times, "usage": usage}

        return list(await asyncio.gather(*(one(number) for number in range(len(at)))))


def _result(seen: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    good = [each for each in seen if each.get("times")]
    if not good:
        raise WaveError(f"all {len(seen)} requests failed: {seen[0].get('error', 'no token came')}")
    first = np.array([each["times"][0] - each["asked"] for each in good])
    gaps = np.concatenate([np.diff(each["times"]) for each in good])
    lasted = max(each["times"][-1] for each in good) - min(each["asked"] for each in good)
    tokens = sum(each["usage"].completion_tokens for each in good if each["usage"])
    prompt = sum(each["usage"].prompt_tokens for each in good if each["usage"])
    cached = sum(each["usage"].prompt_tokens_details.cached_tokens or 0 for each in good if each["usage"] and each["usage"].prompt_tokens_details)
    metrics = {
        "requests": len(good),
        "failed": len(seen) - len(good),
        "offered_per_s": rate,
        "ttft_mean_ms": 1e3 * float(first.mean()),
        "ttft_p99_ms": 1e3 * float(np.quantile(first, 0.99)),
        "between_tokens_mean_ms": 1e3 * float(gaps.mean()) if len(gaps) else 0.0,
        "tokens_per_s": tokens / lasted,
        "cached_share": cached / max(1, prompt),
    }
    metrics = {name: round(value, 3) for name, value in metrics.items()}
    failed = f"{metrics['failed']:.0f} failed" if metrics["failed"] else "none failed"
    return {"name": "serving_load", "metrics": metrics, "machine": describe_machine(), "timing": "measured", "verdict": failed}
