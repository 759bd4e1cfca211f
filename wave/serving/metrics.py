"""What `GET /metrics` tells: vLLM's names where they mean the same, `wave_` for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from waveos.serving.records import Tier
from waveos.serving.service import Ask, Service

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)


class Metrics:
    """Histograms that are filled as things happen, and gauges that are read when asked."""

    def __init__(self, service: Service, model: str) -> None:
        self.registry = CollectorRegistry()
        label = {"labelnames": ("model_name",), "registry": self.registry}

        def histogram(name: str, about: str) -> Any:
            return Histogram(name, about, buckets=_SECONDS, **label).labels(model)  # type: ignore[arg-type]

        def counter(name: str, about: str) -> Any:
            return Counter(name, about, **label).labels(model)  # type: ignore[arg-type]

        self._first = histogram("vllm:time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._next = histogram("vllm:inter_token_latency_seconds", "Between a token and the one before.")
        self._end = histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its last token.")
        self._prompt = counter("vllm:prompt_tokens", "Tokens of prompts whose first answer has come.")
        self._generated = counter("vllm:generation_tokens", "Tokens generated.")
        self._queries = counter("vllm:prefix_cache_queries", "Tokens that were looked up in the cache.")
        self._hits = counter("vllm:prefix_cache_hits", "Tokens that were found there, in any tier.")
        self._ended = Counter("vllm:request_success", "Requests done.", ("model_name", "finished_reason"), registry=self.registry)
        self._model = model
        self.registry.register(_State(service, model))
        service.watch = self.note

    def note(self, what: str, ask: Ask, seconds: float) -> None:
        """Something happened to a request."""
        if what in ("first", "next"):
            self._generated.inc()
            (self._first if what == "first" else self._next).observe(seconds)
        if what == "first":
            self._prompt.inc(len(ask.tokens))
            self._queries.inc(len(ask.tokens))
            self._hits.inc(ask.request.hit if ask.request else 0)
        elif what in ("done", "stop", "gone"):
            self._ended.labels(self._model, {"done": "length", "stop": "stop", "gone": "abort"}[what]).inc()
            if what != "gone":
                self._end.observe(seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _State(Collector):
    """What is read at the time of asking. The service's thread may be at work: each figure is one read."""

    def __init__(self, service: Service, model: str) -> None:
        self._service, self._model = service, model

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        mechanism = self._service.engine.mechanism
        requests, instances = list(mechanism.requests.values()), list(mechanism.instances.values())
        waiting = sum(each.state == "waiting" for each in requests)
        device = int(Tier.DEVICE)
        used = 1.0 - sum(max(0, each.free[device]) for each in instances) / sum(each.capacity[device] for each in instances)
        for name, about, value in (
            ("vllm:num_requests_running", "Requests whose prompt is computed or being computed.", len(requests) - waiting),
            ("vllm:num_requests_waiting", "Requests that wait, or of whose prompt a part is computed.", waiting),
            ("vllm:kv_cache_usage_perc", "Share of the device's KV pool that is in use, 0 to 1, cache included.", used),
        ):
            family = GaugeMetricFamily(name, about, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        ranks = GaugeMetricFamily("wave_ranks", "Ranks in use.", labels=["instance"])
        tokens = GaugeMetricFamily("wave_kv_tokens", "Tokens of KV pools.", labels=["instance", "tier", "state"])
        for each in instances:
            ranks.add_metric([str(each.number)], each.ranks if each.alive else 0)
            for tier in Tier:
                free, all_ = each.free[int(tier)], each.capacity[int(tier)]
                tokens.add_metric([str(each.number), tier.name.lower(), "free"], free)
                tokens.add_metric([str(each.number), tier.name.lower(), "used"], all_ - free)
        yield ranks
        yield tokens
        outcomes = CounterMetricFamily("wave_decisions", "Transactions of the agent, by what became of them.", labels=["outcome"])
        for outcome, count in list(mechanism.outcomes.items()):
            if count:
                outcomes.add_metric([outcome.name.lower()], count)
        yield outcomes
        records = CounterMetricFamily("wave_link_records", "Records of 64 bytes between host and agent.", labels=["direction"])
        records.add_metric(["to_agent"], mechanism.said)
        records.add_metric(["to_host"], mechanism.heard)
        yield records
        restarts = CounterMetricFamily("wave_agent_restarts", "How often the agent was started again.")
        restarts.add_metric([], max(0, self._service.agent.restarts))
        yield restarts
