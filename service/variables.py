"""Every environment variable of Bridge's, whoever reads it, and which of those that are set it has
not: a mistyped one would be ignored without a word.

`python -m service.variables` writes docs/settings.md anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import SecretStr

from bridge_engine.spec.errors import nearest_name
from service.settings import Settings

PREFIX = "BRIDGE_"
PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
ELSEWHERE: dict[str, dict[str, tuple[str, str]]] = {
    "The `bridge` command and the SDK": {
        "URL": ("", "Where the service answers; default: the one in `BRIDGE_HOME`, else port 8000"),
        "PROJECT": ("`default`", "Whose jobs are submitted and listed"),
    },
    "Models and data: the API, the worker's engines and inference": {
        "MODEL_DIR": ("", "Folder whose sub-folders are base models by name"),
        "DATA_DIR": ("", "Folder with the files of benchmarks ([data.md](data.md))"),
        "CACHE_DIR": ("`~/.cache/bridge`", "What is made once and kept: weights out of packages"),
    },
    "An engine that samples by a vLLM server ([vllm.md](vllm.md))": {
        "VLLM_URL": ("", "Where the server answers"),
        "VLLM_API_KEY": ("", "What it was started with as --api-key"),
        "VLLM_WEIGHTS": ("", "`adapter` or `merged`: how it gets the policy; default: by the job"),
        "VLLM_SHARED": ("", "Folder that both see; default: the run directory"),
        "VLLM_TIMEOUT": ("`600`", "Seconds that an answer may take"),
    },
    "Local inference, `python -m inference`": {
        "INFERENCE_DEVICE": ("`auto`", "`cpu`, `cuda`, …"),
        "INFERENCE_THREADS": ("`1`", "With more, a busy machine gets slower, not faster"),
        "INFERENCE_QUEUE": ("`64`", "Requests that may wait to be begun"),
        "INFERENCE_ROWS": ("`64`", "Completions of one base that are written at the same time"),
        "INFERENCE_MAX_MODELS": ("`2`", "Base models that stay loaded"),
        "INFERENCE_MEMORY_GB": ("", "For all that is loaded; default: 60 % of the machine or GPU"),
        "INFERENCE_CACHE_MB": ("`1024`", "For the keys and values of each base's rows"),
    },
    "docker-compose.yml alone": {
        "VLLM_KEY": ("`bridge`", "The key of the vLLM server in it"),
        "VLLM_MODEL": ("`Qwen/Qwen2.5-3B`", "The base model that it serves"),
        "VLLM_RANK": ("`64`", "Its --max-lora-rank"),
    },
}
"""By their reader, with default and meaning; all others are fields of `Settings`."""
_OURS = ("UP_FD", "ENGINE_ID", "FAILPOINTS", "FAULTS", "FAULT_SEED", "FAULT_REPORT", "VLLM_PYTHON")
"""What processes of Bridge's tell each other, and its tests."""
_TESTS = "TEST_"


def known() -> set[str]:
    """The names of all that a person may set."""
    elsewhere = [name for about in ELSEWHERE.values() for name in about]
    return {PREFIX + name.upper() for name in (*Settings.model_fields, *elsewhere)}


def unknown(environment: Iterable[str]) -> list[str]:
    """A sentence for each variable with our prefix that nobody reads."""
    names = known()
    ours = {PREFIX + name for name in _OURS}
    return [
        _sentence(name, names)
        for name in sorted(environment)
        if name.startswith(PREFIX)
        and name not in names | ours
        and not name.startswith(PREFIX + _TESTS)
    ]


def _sentence(name: str, names: set[str]) -> str:
    # The prefix, which all have, would make any two alike.
    bare = {known.removeprefix(PREFIX).lower(): known for known in names}
    near = nearest_name(name.removeprefix(PREFIX), bare)
    hint = f"; did you mean {bare[near]}?" if near else "; docs/settings.md has those that are"
    return f"{name} is not a setting of Bridge's and is ignored{hint}"


def page() -> str:
    """docs/settings.md."""
    return _HEAD + "\n".join(_tables()) + "\n"


_HEAD = """\
# Settings

All of them are environment variables. One that Bridge does not know is a warning at the start of
the API and of a worker, with the nearest that it knows. This page is written by
`python -m service.variables`.

"""


def _tables() -> Iterator[str]:
    yield from _heading("The API and the worker")
    for name, field in Settings.model_fields.items():
        meaning = " ".join((field.description or "").split()).removesuffix(".")
        yield _row(name, _default(name, field.default), meaning)
    for reader, about in ELSEWHERE.items():
        yield ""
        yield from _heading(reader)
        for name, (default, meaning) in about.items():
            yield _row(name, default, meaning)


def _heading(reader: str) -> Iterator[str]:
    yield from (f"## {reader}", "", "| variable | default | |", "|---|---|---|")


def _row(name: str, default: str, meaning: str) -> str:
    return f"| `{PREFIX}{name.upper()}` | {default} | {meaning} |"


def _default(name: str, value: object) -> str:
    if name == "engine_command":
        return "`python -m bridge_engine`"  # of whichever Python runs the worker
    if isinstance(value, SecretStr) or value in (None, "", []):
        return ""
    if isinstance(value, bool):
        return f"`{int(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
