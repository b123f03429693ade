"""Datasets on the Hugging Face hub: which data files a repository has, and one file at a time.

Only data files are ever fetched (Parquet, JSON Lines); a repository's own loading scripts are never
run. The local cache is asked first, so that what was fetched once works offline
(HF_HUB_OFFLINE=1 never goes to the network).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from bridge_engine.errors import DataError

TIMEOUT_S = 5.0
"""Longest wait for the hub's answer to a question; downloads have the library's own limits."""

_DATA_FILE = re.compile(r".+\.(parquet|jsonl|jsonl\.gz)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_SPLIT_WORD = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev)(?=$|[-_.])")
_ALIASES = {"valid": "validation", "val": "validation"}
_PLAIN_FOLDERS = frozenset({"", "data", "default"})


def splits(files: Iterable[str]) -> dict[str, list[str]]:
    """The repository's data files by split, shards in order.

    Follows the hub's own conventions: the split is a word of the file's name
    (`data/train-00000-of-00002.parquet`), a folder above it is a configuration. With more than one
    configuration a split is called `configuration/split` (`main/train`). Files in which no split
    can be seen count as `train`.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted(files):
        if not _DATA_FILE.fullmatch(file):
            continue
        folder, _, name = file.rpartition("/")
        stem = _SHARD.sub("", name.split(".", 1)[0])
        word = _SPLIT_WORD.search(stem)
        split = _ALIASES.get(word[1], word[1]) if word else "train"
        config = folder.removeprefix("data/")
        found.setdefault(("" if config in _PLAIN_FOLDERS else config, split), []).append(file)
    configs = {config for config, _ in found}
    if len(configs) <= 1:
        return {split: shards for (_, split), shards in found.items()}
    return {f"{config}/{split}" if config else split: s for (config, split), s in found.items()}


def list_files(repo: str) -> list[str]:
    """Paths of the files in a dataset repository, or of those of them that are cached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = HfApi().dataset_info(repo, timeout=TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise DataError(
            f"there is no dataset {repo!r} on the Hugging Face hub, or it is private and HF_TOKEN "
            "may not read it",
            code="unknown_dataset",
            param="name",
        ) from error
    except Exception as error:
        if cached := _cached_files(repo):
            return cached
        raise unreachable(repo, error) from error
    return [sibling.rfilename for sibling in found.siblings or []]


def fetch(repo: str, file: str) -> Path:
    """One data file of a dataset repository, downloaded unless it is cached."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset", etag_timeout=TIMEOUT_S))
    except Exception as error:
        raise unreachable(repo, error) from error


def unreachable(repo: str, error: BaseException) -> DataError:
    """The hub did not answer, and what is wanted is not cached."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(
        f"the dataset {repo!r} is not in the local Hugging Face cache and the hub did not give it "
        f"({type(error).__name__}: {reason[0][:200]}); check the network and HF_HUB_OFFLINE, or "
        "upload the data with POST /datasets",
        code="dataset_unavailable",
        param="name",
    )


def _cached_files(repo: str) -> list[str]:
    """Files of the newest snapshot of `repo` in the local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "snapshots"
    snapshots = sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime)
    if not snapshots:
        return []
    newest = snapshots[-1]
    return [path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()]
