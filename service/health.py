"""Is it alive, can it work, and how is it doing: /healthz, /readyz and Prometheus' /metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import cast

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Counter, GaugeMetricFamily, Histogram, Metric
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.context import SettingsDep
from service.errors import responses, trouble
from service.generate.backends import Backends
from service.store import STATUSES, Store, StoreUnavailable
from service.store.migrate import is_current

log = logging.getLogger(__name__)

router = APIRouter(tags=["health"])


@router.get("/", include_in_schema=False)
def home() -> RedirectResponse:
    """What a browser that is only given the address is shown."""
    return RedirectResponse("/docs")


@router.get("/healthz", operation_id="health", summary="Alive")
def healthz() -> dict[str, str]:
    """Answers as long as the process runs. Restart it when this does not answer."""
    return {"status": "ok"}


@router.get(
    "/readyz",
    operation_id="readiness",
    summary="Ready",
    responses={503: {"description": "The database cannot be used; `checks` says why."}},
)
async def readyz(request: Request, settings: SettingsDep) -> JSONResponse:
    """Can it take jobs? The database must answer and have this version's tables; without inference
    only /generate fails, so that check is told and not demanded."""
    checks = {"database": "ok", "inference": "ok"}
    try:
        if not await run_in_threadpool(is_current, settings.database_url):
            checks["database"] = (
                "its tables are not those of this version; run `python -m service migrate`"
            )
    except StoreUnavailable as error:
        log.warning("not ready: %s", error.message)
        checks["database"] = error.message if settings.on_loopback else trouble(error)
    if not await cast(Backends, request.app.state.inference).healthy():
        checks["inference"] = "unreachable"
    ready = checks["database"] == "ok"
    body = {"status": "ready" if ready else "not ready", "checks": checks}
    return JSONResponse(body, 200 if ready else 503)


@router.get(
    "/metrics",
    operation_id="prometheus_metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses=responses(),
)
def metrics(request: Request) -> Response:
    """Figures of the service, in Prometheus' text format."""
    telemetry = cast(Telemetry, request.app.state.telemetry)
    return Response(generate_latest(telemetry.registry), media_type=CONTENT_TYPE_LATEST)


class Telemetry:
    """The figures of one application."""

    def __init__(self, store: Store) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "bridge_http_requests_total",
            "Requests answered",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "bridge_http_request_seconds",
            "Time to the first byte of an answer",
            ["method", "route"],
            registry=self.registry,
        )
        self.registry.register(_Jobs(store))


class _Jobs(Collector):
    """Jobs by status, counted when Prometheus asks: the database is the truth."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        counts = self._store.count_jobs()
        family = GaugeMetricFamily("bridge_jobs", "Jobs by status", labels=["status"])
        for status in STATUSES:
            family.add_metric([status], counts.get(status, 0))
        yield family

    def describe(self) -> Iterable[Metric]:
        return []  # or registering would already ask the database


class TelemetryMiddleware:
    """Counts and times requests by their route's template, never by their path: ids would make a
    series each."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self.app = app
        self.telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status, first_byte = 500, began

        async def watched(message: Message) -> None:
            nonlocal status, first_byte
            if message["type"] == "http.response.start":
                status, first_byte = message["status"], time.perf_counter()
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = str(getattr(scope.get("route"), "path", "none"))
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.telemetry.requests.labels(method, route, str(status)).inc()
            if first_byte > began:
                self.telemetry.seconds.labels(method, route).observe(first_byte - began)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def install(app: FastAPI, store: Store) -> None:
    """Puts the routes and the counting in place."""
    app.state.telemetry = Telemetry(store)
    app.add_middleware(TelemetryMiddleware, telemetry=app.state.telemetry)
    app.include_router(router)
