"""The inference servers there are, and which of them serves a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx

from service.errors import ApiError
from service.generate.backend import InferenceBackend
from service.generate.vllm import VllmBackend
from service.settings import Settings


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

    async def bases(self) -> list[str] | None:
        """The names that can be asked for, of those servers that say; None: all that the catalog
        knows."""
        found: list[str] = []
        for server in self.servers:
            try:
                bases = await server.bases()
            except ApiError:
                continue
            if bases is None:
                return None
            found += bases
        return found

    async def serving(self, model: str) -> InferenceBackend:
        """The server of a base model, or of a whole model that was trained. Raises `ApiError`: 409
        where none serves it, 503 where one that might cannot be asked."""
        served: list[str] = []
        trouble: ApiError | None = None
        for server in self.servers:
            try:
                bases = await server.bases()
            except ApiError as error:
                trouble = error
                continue
            if bases is None or model in bases:
                return server
            served += bases
        if trouble is not None:
            raise trouble
        raise ApiError(
            409,
            "model_not_served",
            f"no vLLM server serves {model} (served: {', '.join(served)}): start one with "
            f"--served-model-name {model} and add its address to BRIDGE_INFERENCE_URL",
            param="model",
            given=model,
            allowed=served,
        )

    async def healthy(self) -> bool:
        """Do all of them answer?"""
        return all(await asyncio.gather(*(server.healthy() for server in self.servers)))

    async def close(self) -> None:
        """Closes the connections that the running event loop keeps open."""
        for server in self.servers:
            await server.close()
