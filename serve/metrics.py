"""What is counted, per base and adapter, in Prometheus' form. Labels hold only names that the server itself knows."""

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.leaving import ClientGone
from serve.lifecycle import Lifecycle

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NO_ADAPTER = ""


class _Known:
    """A metric whose children are found by one look-up: the library checks and copies their labels each time. None is ever cleared."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._children: dict[tuple[str, ...], Any] = {}

    def labels(self, *values: str) -> Any:
        found = self._children.get(values)
        if found is None:
            found = self._children[values] = self._metric.labels(*values)
        return found


@dataclass
class Outcome:
    """How one request ended: by what it raised, or else as it says."""

    status: str = "ok"


class Meters:
    """One server's counters. Gauges are read from the lifecycle when asked for, so that idle adapters stay visible."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._registry = CollectorRegistry()
        target = ("base", "adapter")

        def known(kind: type[Counter | Gauge | Histogram], name: str, said: str, labels: tuple[str, ...], **more: Any) -> _Known:
            return _Known(kind(f"embedft_{name}", said, labels, registry=self._registry, **more))

        how = "Requests by how they ended; cancelled: whoever asked had gone"
        self.requests = known(Counter, "requests", how, (*target, "route", "status"))
        self.tokens = known(Counter, "tokens", "Tokens by kind: prompt or completion", (*target, "kind"))
        took = "Whole requests, the wait for an engine included"
        self.seconds = known(Histogram, "request_seconds", took, (*target, "route"), buckets=_SECONDS)
        self.first = known(Histogram, "first_token_seconds", "From a request's coming to its first event", target, buckets=_SECONDS)
        self.queued = known(Histogram, "queue_seconds", "Until an engine had a place", target, buckets=(0.001, *_SECONDS))
        self.refused = known(Counter, "refusals", "Requests answered with an error, by its code", ("code",))
        self._running = known(Gauge, "running_requests", "Requests being answered", target)
        self._resident = Gauge(
            "embedft_adapter_resident", "1: serving, 0: draining", ("base", "adapter", "generation"), registry=self._registry
        )
        self._error = Gauge("embedft_probe_error", "Relative error of the effect at the last probing", target, registry=self._registry)
        self._loaded = Gauge("embedft_adapter_loaded", "1 where it holds a slot of its engine", target, registry=self._registry)
        self._evictions = Gauge("embedft_adapter_evictions", "Times it made room for another", ("adapter",), registry=self._registry)
        self._loads = Gauge("embedft_adapter_loads", "Loads by outcome", ("adapter", "outcome"), registry=self._registry)
        self._ready = Gauge("embedft_engine_ready", "1 where the engine answers", ("base",), registry=self._registry)
        self._restarts = Gauge("embedft_engine_restarts", "Restarts since the server began", ("base",), registry=self._registry)
        self._retries = Gauge("embedft_engine_retries", "Requests asked again after the engine died", ("base",), registry=self._registry)
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        self._lora = Gauge("vllm:lora_requests_info", "Adapters in use, as vLLM tells it to routers", labels, registry=self._registry)

    @contextmanager
    def measured(self, base: str, adapter: str | None, route: str, outcome: Outcome, *, began: float) -> Generator[None]:
        """Count one request, its time since `began`, and how it ended, which `outcome` says also where it raised."""
        target = (base, adapter or NO_ADAPTER)
        self._running.labels(*target).inc()
        try:
            yield
        except BaseException as error:
            outcome.status = "cancelled" if isinstance(error, asyncio.CancelledError | ClientGone) else "error"
            raise
        finally:
            self._running.labels(*target).dec()
            self.requests.labels(*target, route, outcome.status).inc()
            self.seconds.labels(*target, route).observe(time.perf_counter() - began)

    def count_tokens(self, base: str, adapter: str | None, usage: object) -> None:
        """Add an answer's `usage`."""
        if isinstance(usage, dict):
            for kind in ("prompt", "completion"):
                amount = usage.get(f"{kind}_tokens")
                if isinstance(amount, int) and amount > 0:
                    self.tokens.labels(base, adapter or NO_ADAPTER, kind).inc(amount)

    def render(self) -> bytes:
        self._refresh()
        return generate_latest(self._registry)

    def _refresh(self) -> None:
        for gauge in (self._resident, self._loaded, self._error, self._lora):
            gauge.clear()
        for resident in [*self._lifecycle.draining(), *self._lifecycle.earlier(), *self._lifecycle.live.values()]:
            target = (resident.engine.name, resident.id if resident.earlier else resident.name)
            self._resident.labels(resident.engine.name, resident.name, resident.generation[:12]).set(0 if resident.retired else 1)
            self._loaded.labels(*target).set(resident.loaded)
            if resident.report:
                self._error.labels(*target).set(resident.report.error)
        for (name, outcome), count in list(self._lifecycle.loading.loads.items()):
            self._loads.labels(name, outcome).set(count)
        for name, count in list(self._lifecycle.loading.evictions.items()):
            self._evictions.labels(name).set(count)
        for engine in self._lifecycle.engines.values():
            self._ready.labels(engine.name).set(engine.supervisor.state == "ready")
            self._restarts.labels(engine.name).set(engine.supervisor.restarts)
            self._retries.labels(engine.name).set(engine.retries)
            names = ",".join(sorted(name for name, resident in list(self._lifecycle.live.items()) if resident.engine is engine))
            self._lora.labels(str(engine.config.max_loras), names, "").set(time.time())
