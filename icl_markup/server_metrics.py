"""The server's metrics, in a registry of their own, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from icl_markup.prefixes import PrefixCache

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServerMetrics:
    """Requests by path and status, their seconds, texts, batches, the queue, and the cache of shared prefixes.

    Args:
        waiting: returns the number of texts in the queue.
        labels: returns the number of labels.
        prefixes: the model's cache; only causal backbones use it.
    """

    def __init__(self, waiting: Callable[[], int], labels: Callable[[], int], prefixes: PrefixCache):
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "icl_markup_requests", "Requests, by path and status.", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "icl_markup_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._texts = Counter("icl_markup_texts", "Texts that were classified.", registry=self.registry)
        self._batches = Histogram("icl_markup_batch_texts", "Texts a batch.", buckets=_TEXTS, registry=self.registry)
        Gauge("icl_markup_queue_texts", "Texts in the queue.", registry=self.registry).set_function(waiting)
        Gauge("icl_markup_labels", "Labels of the classifier.", registry=self.registry).set_function(labels)
        self.registry.register(_Prefixes(prefixes))

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request; `path` must be one of few, such as a route's."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, texts: int) -> None:
        """Count a batch."""
        self._batches.observe(texts)

    def classified(self, texts: int) -> None:
        """Count texts that were answered."""
        self._texts.inc(texts)

    def page(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)


class _Prefixes(Collector):
    """Reads the cache where the metrics are asked for: it counts by itself."""

    def __init__(self, prefixes: PrefixCache):
        self._prefixes = prefixes

    def collect(self) -> Iterator[Metric]:
        counts = self._prefixes.counts
        asked = CounterMetricFamily(
            "icl_markup_prefixes",
            "Shared prefixes of prompts: there whole (hit), or computed (miss).",
            labels=["found"],
        )
        asked.add_metric(["hit"], counts.hits)
        asked.add_metric(["miss"], counts.misses)
        tokens = CounterMetricFamily(
            "icl_markup_prefix_tokens", "Tokens of shared prefixes, computed or reused.", labels=["how"]
        )
        tokens.add_metric(["computed"], counts.computed)
        tokens.add_metric(["reused"], counts.reused)
        yield asked
        yield tokens
        yield GaugeMetricFamily(
            "icl_markup_prefix_bytes", "Bytes of kept keys and values of prefixes.", self._prefixes.bytes
        )
