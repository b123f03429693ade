"""Bridge's client: `Client` and `AsyncClient` for programs, `bridge` for the command line.

from bridge_client import Client

with Client() as bridge:
    job = bridge.submit("examples/arithmetic-bridge.yaml")
    job = bridge.wait(job.id, progress=True)
    print(bridge.generate("12+3-5?", adapter=job.adapter).text)
"""

from bridge_client.async_client import AsyncClient
from bridge_client.client import Client
from bridge_client.errors import (
    APIStatusError,
    BridgeError,
    ConnectionError,
    SpecError,
    UsageError,
)
from bridge_client.models import (
    Adapter,
    Checkpoint,
    Choice,
    Dataset,
    DryRun,
    Event,
    Generation,
    Grade,
    Grades,
    Job,
    Metrics,
    Project,
    Sample,
    Scores,
    Series,
)

__all__ = [
    "APIStatusError",
    "Adapter",
    "AsyncClient",
    "BridgeError",
    "Checkpoint",
    "Choice",
    "Client",
    "ConnectionError",
    "Dataset",
    "DryRun",
    "Event",
    "Generation",
    "Grade",
    "Grades",
    "Job",
    "Metrics",
    "Project",
    "Sample",
    "Scores",
    "Series",
    "SpecError",
    "UsageError",
]
