"""The model card of a downloaded adapter, `README.md`: what it is, of what, and how good."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from bridge_engine.errors import EngineError
from bridge_engine.evaluation.report import EvaluationResult
from bridge_engine.models import catalog
from bridge_engine.spec.identity import spec_sha256
from bridge_engine.spec.train import TrainSpec
from service.store import AdapterRow, JobRow


def model_card(adapter: AdapterRow, job: JobRow, evaluations: Sequence[JobRow] = ()) -> str:
    """Markdown with the front matter that the Hugging Face hub reads; the same each time, once the
    job has ended and while there are no further evaluations of the adapter."""
    license = base_license(adapter.base_model)
    about = {
        "base_model": adapter.base_model,
        "library_name": "transformers" if adapter.is_model else "peft",
        "pipeline_tag": "text-generation",
        "license": license,
        "tags": list(dict.fromkeys(["lora", "bridge", job.method][adapter.is_model :])),
    }
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in about.items() if value)
    result = job.result or {}
    facts: list[tuple[str, Any]] = [
        ("Method", job.method),
        ("Base model", f"{adapter.base_model} (licence: {license or 'see the base model'})"),
        ("Step", f"{adapter.step} of {job.total_steps}"),
        ("Rank", adapter.rank or None),
        *((f"Data, {role}", _dataset(what)) for role, what in job.spec["data"].items() if what),
        ("Held-out accuracy", _percent(adapter.accuracy)),
        ("Held-out accuracy before training", _percent(result.get("accuracy_before"))),
        ("Job", job.id),
        ("SHA-256 of the spec", _spec_hash(job)),
        ("SHA-256 of the weights", adapter.sha256),
    ]
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts if value is not None)
    what = "whole model" if adapter.is_model else "LoRA adapter"
    return (
        f"---\n{front}---\n# {adapter.name}\n\nA {what} trained by Bridge.\n\n"
        f"| | |\n|---|---|\n{rows}\n{_scores(evaluations)}{_loading(adapter)}"
        "`bridge.json` holds the template that problems were put in.\n"
    )


def _loading(adapter: AdapterRow) -> str:
    """How to load it from within the unpacked folder. Bridge's own names for models mean nothing to
    PEFT, which would look for them on the hub."""
    base = adapter.base_model
    where = ""
    if adapter.is_model:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        )
    elif catalog.is_hub_name(base):
        code = (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained(".")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(base)})\n"
        )
    else:
        code = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'base = "PATH TO THE BASE"\n'
            'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")\n'
            "tokenizer = AutoTokenizer.from_pretrained(base)\n"
        )
        where = (
            f"The base, `{base}`, is not on the hub under this name. Where Bridge is installed, "
            "this prints its path (of a folder of your own: with its `BRIDGE_MODEL_DIR`):\n\n"
            "```sh\n"
            "python -c 'from bridge_engine.models.folders import materialize_model as m; "
            f'print(m("{base}"))\'\n'
            "```\n\n"
        )
    return f"```python\n{code}```\n\n{where}"


def _scores(evaluations: Sequence[JobRow]) -> str:
    """A table of what evaluations have found, each with what it has to be read with."""
    rows = []
    for job in evaluations:
        found = EvaluationResult.model_validate(job.result)
        for one in found.benchmarks:
            for name, score in one.scores.items():
                interval = f"{100 * score.low:.1f} to {100 * score.high:.1f}"
                how = (
                    f"{score.problems} problems, {one.samples} samples, temperature "
                    f"{one.temperature:g}, top_p {one.top_p:g}, {one.max_new_tokens} tokens, "
                    f"{one.truncation_rate:.1%} cut off, grader {found.grader['name']} "
                    f"{found.grader['version']}"
                )
                rows.append(
                    f"| {one.name} | {name} | {score.value:.1%} | {interval} | {how} | {job.id} |"
                )
    if not rows:
        return ""
    head = "| set | score | | 95 % | how | job |\n|---|---|---|---|---|---|\n"
    return "## Evaluations\n\n" + head + "\n".join(rows) + "\n\n"


def base_license(model: str) -> str | None:
    """The licence that the base model's own card names, where the model lies on this machine."""
    try:
        folder = catalog.resolve_model(model).path
        text = (folder / "README.md").read_text(errors="replace") if folder else ""
    except (EngineError, OSError):
        return None
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)", text.partition("\n---")[0], re.MULTILINE)
    return found.group(1) if found else None


def _dataset(what: Any) -> str:
    if not isinstance(what, dict):
        return str(what)
    told = {key: value for key, value in what.items() if key != "name" and value}
    more = ", ".join(f"{key} {_words(value)}" for key, value in told.items())
    return f"{what.get('name')}" + (f" ({more})" if more else "")


def _words(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def _percent(accuracy: float | None) -> str | None:
    return None if accuracy is None else f"{accuracy:.1%}"


def _spec_hash(job: JobRow) -> str | None:
    try:
        return spec_sha256(TrainSpec.model_validate(job.spec))
    except ValidationError:  # of an older version
        return None
