"""Where checkpoints and adapters are kept beside the run directories: a folder that all machines
see, or an S3 bucket. Imports neither torch nor FastAPI: workers use it too."""

from service.artifacts.errors import ArtifactsUnavailable, Damaged
from service.artifacts.store import ArtifactStore, Stored, artifact_store

__all__ = ["ArtifactStore", "ArtifactsUnavailable", "Damaged", "Stored", "artifact_store"]
