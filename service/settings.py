"""Everything that can be configured, in one place: environment variables named `BRIDGE_…`.

The embedded form needs none of them. The deployed form sets the database, the queue and the
dispatcher. The engine knows no settings of the service; what it needs it is told by the worker.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from bridge_http.addresses import is_address, is_loopback

DRIVERS = ("sqlite", "postgres", "postgresql", "postgresql+psycopg")
_A_DATABASE = "give sqlite:////ABSOLUTE/PATH or postgresql://USER:PASSWORD@HOST:PORT/NAME"

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """The service's and the worker's settings; read once per process by `get_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="BRIDGE_", use_attribute_docstrings=True, frozen=True, extra="ignore"
    )

    home: Path = Path(".bridge")
    """Folder of everything Bridge writes: the database, run directories, datasets, logs. Workers
    on several machines must see the same one."""
    database_url: str = ""
    """SQLAlchemy URL, `sqlite:///…` or `postgresql://…`; default: HOME/bridge.db."""
    uploads_dir: Path | None = None
    """Where uploaded datasets lie; default: HOME/datasets."""
    artifacts_url: str = ""
    """Where checkpoints and adapters are kept: `file:///mnt/shared/bridge`, `s3://bucket/prefix`
    (keys and endpoint by AWS_*), or any other URL fsspec knows. Empty: in the run directories."""
    artifacts_cache_bytes: Annotated[int, Field(ge=0)] = 20_000_000_000
    """Adapters that the service has fetched from there lie in HOME/cache; those asked for the
    longest ago make room beyond so much."""
    artifacts_patience_seconds: Seconds = 600.0
    """How long a worker tries to reach it before it hands a job back as broken down."""

    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port the API listens on."""
    allowed_hosts: Annotated[list[str], NoDecode] = []
    """Names, separated by commas, under which the API may also be reached, without ports: that of
    a proxy in front of it, say. A web page at one of them may use it too."""
    allow_unauthenticated: bool = False
    """Listen on other addresses than loopback, although whoever reaches the API may use it."""
    max_upload_bytes: Annotated[int, Field(ge=1)] = 2_000_000_000
    """Largest dataset, as it is sent and as it is unpacked."""
    inference_backend: Literal["local", "vllm"] = "local"
    """What answers /generate and /v1: `python -m inference`, or private vLLM servers."""
    inference_url: str = "http://127.0.0.1:8001"
    """Where it answers. A vLLM server serves one base model: name several, with commas between."""
    inference_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    """Port the local inference process listens on."""
    inference_api_key: SecretStr = SecretStr("")
    """What vLLM was started with as --api-key."""
    inference_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """What vLLM was started with as --dtype, where that is not what adapters are trained in: it
    rounds by so much more, and their canaries must not take that for other weights."""
    inference_max_adapters: Annotated[int, Field(ge=1)] = 32
    """Adapters that inference keeps loaded; the least recently used makes room. Of vLLM: no more
    than its --max-cpu-loras."""
    inference_pinned: Annotated[list[str], NoDecode] = []
    """Adapters, with commas between, that are always loaded and never make room: JOB@STEP,
    JOB@best, an alias, …"""

    dispatch: Literal["local", "celery"] = "local"
    """How queued jobs reach a worker: a worker polls the database, or a relay sends messages."""
    redis_url: str = "redis://127.0.0.1:6379/0"
    """Celery's broker, in the deployed form."""

    lease_seconds: Seconds = 30.0
    """A job whose worker has not renewed its lease for this long is given to another one."""
    heartbeat_seconds: Seconds = 5.0
    """Time between renewals."""
    grace_seconds: Seconds = 30.0
    """Time an engine has to save and leave after SIGTERM; then it is killed."""
    stall_seconds: Seconds = 1800.0
    """An engine that has reported nothing for this long is asked for its stacks and ended, and its
    job goes on from the checkpoint. Longer than the longest step; a spec's `runtime.stall_seconds`
    comes before it."""
    silence_seconds: Seconds = 60.0
    """A Celery worker with a free slot that has heard nothing for this long looks into the database
    itself, and takes a job that has waited as long."""
    reconcile_seconds: Seconds = 5.0
    """Time between looks for jobs whose lease ran out."""
    poll_seconds: Seconds = 0.3
    """Time between looks for new events of a run and for queued jobs."""
    resend_seconds: Seconds = 30.0
    """A message that was sent this long ago, and whose job still waits, counts as lost and is sent
    again when more jobs wait than the broker holds messages."""
    max_attempts: Annotated[int, Field(ge=1)] = 5
    """A job that broke down this often in a row without a new checkpoint is given up."""
    retry_seconds: Seconds = 5.0
    """What a job waits before it is tried again after it broke down; twice as long each time in a
    row, up to five minutes."""
    relay_window: Annotated[int, Field(ge=1)] = 4
    """Messages of a queue that may lie at the broker unanswered. More keep more idle workers busy;
    a job of a higher priority that comes later has so many before it."""
    queues: Annotated[list[str], NoDecode] = []
    """What a worker takes, with commas between: `any`, `cpu`, `gpu`, `gpu:2` … `gpu:8`; default:
    all that its GPUs can serve."""
    gpus: Annotated[list[str] | None, NoDecode] = None
    """Ids of the GPUs that a worker may use, as in CUDA_VISIBLE_DEVICES, with commas between, or
    `none`; default: those that nvidia-smi shows."""
    worker_slots: Annotated[int, Field(ge=1)] = 1
    """Jobs a local worker runs at the same time."""
    engine_command: Annotated[list[str], NoDecode] = [sys.executable, "-m", "bridge_engine"]
    """How a worker starts the engine: words as in a shell, or a JSON list."""

    @field_validator("engine_command", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return json.loads(value) if value.lstrip().startswith("[") else shlex.split(value)

    @field_validator("allowed_hosts", "queues", "gpus", "inference_pinned", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return [name for name in (part.strip() for part in value.split(",")) if name]

    @field_validator("queues")
    @classmethod
    def _known_queues(cls, value: list[str]) -> list[str]:
        for name in value:
            if not re.fullmatch(r"any|cpu|gpu(:[2-8])?", name):
                raise ValueError(
                    f"{name!r} is not a queue: any, cpu, gpu, gpu:2 … gpu:8, with commas between"
                )
        return list(dict.fromkeys(value))

    @field_validator("gpus")
    @classmethod
    def _each_once(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError(f"it names a GPU twice: {','.join(value)}")
        return [] if value == ["none"] else value

    @field_validator("allowed_hosts")
    @classmethod
    def _names_alone(cls, value: list[str]) -> list[str]:
        for name in value:
            if "/" in name or "*" in name or (":" in name and not is_address(name)):
                raise ValueError(
                    f"{name!r} is not a host: list names and addresses, without https:// and ports"
                )
        return [name.lower() for name in value]

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        """No message repeats more of the value than its scheme: the rest may hold a password."""
        if not value:
            return value
        scheme, mark, _ = value.partition("://")
        if mark and scheme not in DRIVERS:
            raise ValueError(f"{scheme!r} is not a database Bridge can use: {_A_DATABASE}")
        try:
            url = make_url(value)
        except (ArgumentError, ValueError):  # the latter where the port is no number
            url = None
        if url is None or "@" in (url.host or ""):
            raise ValueError(
                f"this is not the URL of a database: {_A_DATABASE}, with @ : / and % in the "
                "password written as %40 %3A %2F %25"
            )
        if url.drivername == "sqlite" and (url.host or url.database in (None, "", ":memory:")):
            raise ValueError(f"it names no file that every process finds: {_A_DATABASE}")
        return value

    @field_validator("artifacts_url")
    @classmethod
    def _known_store(cls, value: str) -> str:
        scheme, mark, rest = value.partition("://")
        if not value:
            return value
        if not mark or not rest.strip("/"):
            raise ValueError("give a URL such as file:///mnt/shared/bridge or s3://bucket/prefix")
        try:
            fsspec.get_filesystem_class(scheme)
        except ValueError:
            raise ValueError(f"fsspec knows no {scheme!r}; give a file:// or s3:// URL") from None
        except ImportError as error:
            hint = "pip install 'bridge-train[s3]'" if scheme in ("s3", "s3a") else str(error)
            raise ValueError(f"{scheme}:// needs a package that is not installed: {hint}") from None
        return value

    @field_validator("inference_url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        urls = [part.strip().rstrip("/") for part in value.split(",") if part.strip()]
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise ValueError("it must be an address such as http://127.0.0.1:8001")
        if "@" in value:  # in no part of one: a password may have a slash
            raise ValueError(
                "it must hold no user and password (no @), since addresses are logged; set "
                "BRIDGE_INFERENCE_API_KEY to the servers' key"
            )
        return ",".join(dict.fromkeys(urls))

    @model_validator(mode="before")
    @classmethod
    def _empty_means_default(cls, values: Any) -> Any:
        """`BRIDGE_HOME=` in a compose file means "not set", not the root of nowhere."""
        return {k: v for k, v in values.items() if v != ""} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _lease_outlives_heartbeat(self) -> Settings:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                f"BRIDGE_LEASE_SECONDS ({self.lease_seconds:g}) must be at least twice "
                f"BRIDGE_HEARTBEAT_SECONDS ({self.heartbeat_seconds:g}): one late heartbeat must "
                "not cost a worker its job"
            )
        return self

    @model_validator(mode="after")
    def _one_local_process(self) -> Settings:
        if self.inference_backend == "local" and len(self.inference_urls) > 1:
            raise ValueError(
                "BRIDGE_INFERENCE_URL names several servers, and BRIDGE_INFERENCE_BACKEND is "
                "local: one local process serves every base model; several are for vllm"
            )
        return self

    def model_post_init(self, _: Any) -> None:
        """Makes paths absolute, so that a child with another working directory means the same."""
        home = self.home.expanduser().resolve()
        uploads = (self.uploads_dir or home / "datasets").expanduser().resolve()
        url = self.database_url or f"sqlite:///{home / 'bridge.db'}"
        # `frozen` guards against callers, not against the model completing itself.
        self.__dict__.update(home=home, uploads_dir=uploads, database_url=url)

    @property
    def runs_dir(self) -> Path:
        """One folder a job."""
        return self.home / "runs"

    @property
    def datasets_dir(self) -> Path:
        """Uploaded datasets; `ds_xxx` is the file `ds_xxx.jsonl` here."""
        assert self.uploads_dir is not None  # completed in model_post_init
        return self.uploads_dir

    @property
    def cache_dir(self) -> Path:
        """What was fetched from the artifact store for serving."""
        return self.home / "cache"

    @property
    def inference_urls(self) -> list[str]:
        """Every inference server."""
        return self.inference_url.split(",")

    @property
    def on_loopback(self) -> bool:
        """Is the API reached from this machine alone?"""
        return is_loopback(self.host)

    def run_dir(self, job_id: str) -> Path:
        """The run directory of a job; events' and adapters' paths are relative to it."""
        return self.runs_dir / job_id


def explain(error: ValidationError) -> str:
    """What is wrong with the environment, a line a variable. Shows no value: one may be secret."""
    lines = []
    for item in error.errors(include_url=False):
        name = "BRIDGE_" + str(item["loc"][0]).upper() if item["loc"] else "settings"
        lines.append(f"{name}: {item['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The process's settings. Tests call `get_settings.cache_clear()` after changing the
    environment."""
    return Settings()
