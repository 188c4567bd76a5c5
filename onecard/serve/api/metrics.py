"""GET /metrics in Prometheus' text form: requests, tokens and times since the server began.

https://prometheus.io/docs/practices/naming. Labels have few values: paths that are served, statuses, names of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE_LATEST", "ServerMetrics"]

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class AnswersByPath(Collector):
    """How answers were computed, as the engine counts them."""

    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        found = CounterMetricFamily("onecard_answers", "Answers begun: in the batch, or in turn.", labels=("how",))
        for how, count in self._counts().items():
            found.add_metric((how,), count)
        yield found


class ServerMetrics:
    """Counts of one server; a process may hold several."""

    def __init__(
        self, gauges: Mapping[str, tuple[str, Callable[[], float]]], paths: Callable[[], Mapping[str, int]]
    ) -> None:
        """`gauges`: name -> what it says, and a function that tells its present value. `paths`: answers by path."""
        self._registry = CollectorRegistry()
        self._registry.register(AnswersByPath(paths))
        for name, (words, value) in gauges.items():
            Gauge(f"onecard_{name}", words, registry=self._registry).set_function(value)
        self._requests = self._counter("requests", "Requests that were answered or refused.", "path", "status", "key")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, cached ones included.", "key")
        self._new_tokens = self._counter("generation_tokens", "Tokens of answers.", "key")
        self._seconds = Histogram(
            "onecard_request_duration_seconds", "From a request's headers to the end of its answer.", ("path",),
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._first = Histogram(
            "onecard_time_to_first_token_seconds", "From a request's headers to the first token of its answer.",
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"onecard_{name}", words, labels, registry=self._registry)

    def saw(self, path: str, status: int, key: str, seconds: float, first_token_seconds: float | None) -> None:
        """A request has ended; `status` 0: its client left before."""
        self._requests.labels(path, str(status or "left"), key).inc()
        self._seconds.labels(path).observe(seconds)
        if first_token_seconds is not None:
            self._first.observe(first_token_seconds)

    def saw_tokens(self, key: str, n_prompt: int, n_new: int) -> None:
        """The tokens of a request."""
        self._prompt_tokens.labels(key).inc(n_prompt)
        self._new_tokens.labels(key).inc(n_new)

    def text(self) -> bytes:
        """What is sent to Prometheus."""
        return generate_latest(self._registry)
