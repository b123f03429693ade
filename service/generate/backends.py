"""The inference servers there are, and which of them serves a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

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
    def of(cls, settings: Settings) -> Backends:
        """Those that the settings name."""
        if settings.inference_backend == "local":
            return cls([InferenceBackend(settings.inference_url)])
        key = settings.inference_api_key.get_secret_value()
        how = (key, settings.inference_max_adapters, settings.inference_dtype)
        return cls([VllmBackend(url, *how) for url in settings.inference_urls])

    async def bases(self) -> Bases:
        """The base models that can be asked for."""
        found: list[str] = []
        trouble: ApiError | None = None
        for _, bases in await self._each():
            if bases is None:
                return Bases(None)
            if isinstance(bases, ApiError):
                trouble = bases
            else:
                found += bases
        return Bases(found, trouble)

    async def _each(self) -> list[tuple[InferenceBackend, list[str] | ApiError | None]]:
        """Every server with its bases, or why it does not say. All are asked at once: one that
        hangs keeps nobody from another."""

        async def of(server: InferenceBackend) -> list[str] | ApiError | None:
            try:
                return await server.bases()
            except ApiError as error:
                return error

        found: list[list[str] | ApiError | None]
        if len(self.servers) == 1:  # as mostly, and every request asks: a task each would be dear
            found = [await of(self.servers[0])]
        else:
            found = await asyncio.gather(*map(of, self.servers))
        return list(zip(self.servers, found, strict=True))

    async def serving(self, model: str) -> InferenceBackend:
        """The server of a base model, or of a whole model that was trained. Raises `ApiError`: 409
        where none serves it, 503 where one that might cannot be asked."""
        for server, bases in await self._each():
            if bases is None or (not isinstance(bases, ApiError) and model in bases):
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
