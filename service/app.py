"""The REST API, put together. Imports no torch, and never will: what trains and what generates are
processes of their own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel

from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.methods import METHODS
from bridge_engine.spec.train import TrainSpec
from bridge_http.bodiless import HeadAsGet
from service import errors, health
from service.adapters import aliases
from service.adapters import routes as adapters
from service.adapters.aliases import AliasRequest
from service.datasets import routes as datasets
from service.datasets.upload import sweep
from service.evaluations import routes as evaluations
from service.evaluations.routes import Regrade
from service.generate import openai
from service.generate import routes as generate
from service.generate.asking import AT_ONCE
from service.generate.backends import Backends
from service.generate.controller import Controller
from service.generate.openai_schemas import ChatRequest, CompletionRequest
from service.generate.schemas import GenerateRequest
from service.generate.serving import Serving
from service.graders import routes as graders
from service.graders.bench import GradingBench
from service.graders.schemas import GradersRun
from service.jobs import control
from service.jobs import routes as jobs
from service.jobs.control import JobChanges
from service.jobs.feed import Feeds
from service.jobs.fork import ForkRequest
from service.openai_errors import PREFIX, OpenAIError
from service.origin import OriginMiddleware
from service.parameters import known_parameters
from service.projects import routes as projects
from service.projects.routes import NewProject, ProjectChanges
from service.settings import Settings, get_settings
from service.store import Store

DESCRIPTION = """\
Teaches base models to reason: post a job, watch it learn, ask what it learned.

A **job** trains one model by one method ({methods}) and is
queued until a worker is free. Its figures, samples and checkpoints can be read while it runs.
Each checkpoint leaves an **adapter** under the immutable name `JOB@STEP`, which answers on
**/generate**.

Errors are RFC 9457 problems: `code` for programs, `detail` for people, `errors` with every field
at fault, and the `request_id` to look for in the log.
""".format(methods=", ".join(f"`{name}`" for name in METHODS))


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application over the database the settings name, which must be migrated."""
    settings = settings or get_settings()
    # The catalog looks for uploads where the environment says: it knows no settings of the service.
    os.environ["BRIDGE_UPLOADS_DIR"] = str(settings.datasets_dir)
    store = Store.from_settings(settings)
    inference = Backends.of(settings)
    serving = Serving(store, settings, inference)
    controller = Controller(store, serving)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweep(settings.datasets_dir)
        reconciling = asyncio.create_task(controller.run())
        yield
        app.state.stopping.set()
        reconciling.cancel()
        await inference.close()
        app.state.grading.close()
        store.close()

    app = FastAPIOffline(
        title="Bridge",
        version=_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_tags=_TAGS,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.settings, app.state.store, app.state.inference = settings, store, inference
    app.state.serving, app.state.controller = serving, controller
    app.state.generations = threading.BoundedSemaphore(AT_ONCE)
    app.state.grading = GradingBench()
    app.state.stopping = threading.Event()
    app.state.feeds = Feeds(store, app.state.stopping)
    app.add_middleware(HeadAsGet)
    app.add_middleware(OriginMiddleware, settings=settings)
    # First, as routes are tried in turn; and without dependencies, which they would not heed.
    for router in (openai.asking, generate.router):
        app.include_router(router)
    health.install(app, store)  # around it: refusals are counted too
    for feature in (
        *(jobs, control, evaluations, projects, datasets, graders),
        *(aliases, adapters, openai),
    ):
        app.include_router(feature.router, dependencies=[Depends(known_parameters)])
    errors.install(app)  # last, so that it is the outermost layer
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's own way
    return app


_TAGS = [
    {"name": "jobs", "description": "Submit, look at, follow, pause, cancel, retry, fork."},
    {"name": "evaluations", "description": "Scores, and what they are made of."},
    {"name": "projects", "description": "Whose jobs, and how many of them may run."},
    {"name": "datasets", "description": "Problems of your own."},
    {"name": "graders", "description": "How answers are judged."},
    {"name": "adapters", "description": "What training leaves behind."},
    {"name": "generate", "description": "Ask a model."},
    {"name": "openai", "description": "Ask a model as OpenAI's clients do."},
    {"name": "health", "description": "For whoever operates the service."},
]


_READ_BY_ROUTES: tuple[type[BaseModel], ...] = (
    *(TrainSpec, EvaluationSpec, ForkRequest, Regrade, JobChanges, NewProject, ProjectChanges),
    *(GenerateRequest, GradersRun),
    *(AliasRequest, ChatRequest, CompletionRequest, OpenAIError),
)
"""Bodies that FastAPI does not see."""


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the bodies that the routes read themselves."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
    )
    schemas = document["components"]["schemas"]
    for model in _READ_BY_ROUTES:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _one_error(operation["responses"], openai=path.startswith(PREFIX))
    app.openapi_schema = document
    return document


def _one_error(answers: dict[str, Any], *, openai: bool) -> None:
    """Errors have one media type, whatever FastAPI adds on its own account."""
    name = "OpenAIError" if openai else "Problem"
    media_type = "application/json" if openai else errors.MEDIA_TYPE
    for status, answer in answers.items():
        if status.isdecimal() and int(status) >= 400 and "content" in answer:
            schema = {"$ref": f"#/components/schemas/{name}"}
            answer["content"] = {media_type: {"schema": schema}}


def _version() -> str:
    try:
        return version("bridge-train")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
