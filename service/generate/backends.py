"""The inference servers there are, and which of them serves a model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from service.errors import ApiError
from service.generate.backend import InferenceBackend
from service.generate.vllm import VllmBackend
from service.settings import Settings


@dataclass(frozen=True)
class Bases:
    """What is served."""

    names: list[str] | None
    """None: every base model that the catalog knows."""
    trouble: ApiError | None = None
    """Why one of the servers does not say what it serves."""


class Backends:
    """One local process for every base model, or a vLLM server for each."""

    def __init__(self, servers: Sequence[InferenceBackend]) -> None:
        self.servers = list(servers)

    @classmethod
    def of(cls, settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> Backends:
        """Those that the settings name. `transport` stands in for the network to them."""
        if settings.inference_backend == "local":
            return cls([InferenceBackend(settings.inference_url, transport)])
        key = settings.inference_api_key.get_secret_value()
        most = settings.inference_max_adapters
        return cls([VllmBackend(url, transport, key, most) for url in settings.inference_urls])

    async def bases(self) -> Bases:
        """The base models that can be asked for."""
        found: list[str] = []
        trouble: ApiError | None = None
        for server in self.servers:
            try:
                bases = await server.bases()
            except ApiError as error:
                trouble = error
                continue
            if bases is None:
                return Bases(None)
            found += bases
        return Bases(found, trouble)

    async def serving(self, model: str) -> InferenceBackend:
        """The server of a base model, or of a whole model that was trained. Raises `ApiError`: 409
        where none serves it, 503 where one that might cannot be asked."""
        for server in self.servers:
            with contextlib.suppress(ApiError):
                bases = await server.bases()
                if bases is None or model in bases:
                    return server
        served = await self.bases()
        if served.trouble is not None:
            raise served.trouble
        names = served.names or []
        raise ApiError(
            409,
            "model_not_served",
            f"no vLLM server serves {model} (served: {', '.join(names)}): start one with "
            f"--served-model-name {model} and add its address to BRIDGE_INFERENCE_URL",
            param="model",
            given=model,
            allowed=names,
        )

    async def healthy(self) -> bool:
        """Do all of them answer?"""
        return all(await asyncio.gather(*(server.healthy() for server in self.servers)))

    async def close(self) -> None:
        """Closes the connections that the running event loop keeps open."""
        for server in self.servers:
            await server.close()
