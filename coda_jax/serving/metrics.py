"""What a server counts and times, as Prometheus reads it."""

from coda_jax.optional import needs

with needs("serve"):
    import prometheus_client
    from prometheus_client import Counter, Gauge, Histogram

_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Metrics:
    """Those of one server.

    Attributes:
        requests: to /predict, by the status of their response.
        request_seconds: until the whole response is made.
        answered, failed, withdrawn: rows with an answer, without one, and that a client left.
        waiting: rows that wait, or for which places are kept.
        waited: seconds in which a row waited for its batch.
        batch_rows, batch_seconds: of the model.
    """

    def __init__(self):
        self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)

        def made(kind, name, text, **options):
            return kind(f"coda_{name}", text, registry=self._registry, **options)

        self.requests = made(
            Counter, "requests", "requests to /predict, by status", labelnames=["status"]
        )
        self.request_seconds = made(
            Histogram, "request_seconds", "until a response is made", buckets=_SECONDS
        )
        self.answered = made(Counter, "rows_answered", "rows with an answer")
        self.failed = made(Counter, "rows_failed", "rows for which the model failed")
        self.withdrawn = made(Counter, "rows_withdrawn", "rows that a client did not wait for")
        self.waiting = made(Gauge, "rows_waiting", "rows in the queue")
        self.waited = made(
            Histogram, "row_wait_seconds", "of a row, for its batch", buckets=_SECONDS
        )
        self.batch_rows = made(Histogram, "batch_rows", "rows of a batch", buckets=_ROWS)
        self.batch_seconds = made(
            Histogram, "batch_seconds", "of the model for a batch", buckets=_SECONDS
        )

    def text(self) -> bytes:
        """All of them in Prometheus's format."""
        return prometheus_client.generate_latest(self._registry)
