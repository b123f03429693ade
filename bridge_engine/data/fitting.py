"""Can a job use anything of the uploads it names? Asked when it is posted. Imports no torch.

The rows are read as far as the first that can be used, so the usual answer costs a line of a file.
The engine counts for itself once it has the model; both say it in the sentences below.

What is counted here never exceeds what the engine will count, so nothing is refused that would
work: the tokens of the texts alone, by the tokenizer's own file. That is exact for a plain prompt
and a tokenizer that is read as its file says. Elsewhere (a chat template, which may trim a text and
lets its ends melt into what stands around it; a tokenizer class with rules of its own) `SLACK` is
taken off. Where the file is not at hand, or after `MOST_ROWS` and the like, nothing is known, and
the engine finds out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from bridge_engine.data import registry
from bridge_engine.data.datasets import too_few
from bridge_engine.data.rows import plain_rows
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.models.catalog import ModelInfo, resolve_model
from bridge_engine.spec.checks import has_chat_template
from bridge_engine.spec.errors import FieldError
from bridge_engine.spec.train import DatasetRef, TemplateSpec, TrainSpec

SLACK = 64
"""Tokens of a text, at most, that are not its own where other text stands around it."""
MOST_ROWS = 200_000
"""Rows of an upload that are looked at before the rest is left to the engine; 50 000 take 2 s."""
MOST_COUNTED = 2_000_000
"""Characters that are counted, at about a million a second."""
_CHARACTERS = 8
"""A token has fewer, on average: of a text much longer than the context its beginning will do."""
_AS_ITS_FILE_SAYS = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})


# --------------------------------------------------------------------------- the sentences


def left_out(param: str, rows: int, why: str) -> str:
    """All of a set is left out; `why` is said of its rows."""
    which = "its only row is" if rows == 1 else f"all {rows} rows are"
    return f"nothing of {param} can be used: {which} {why}"


def no_room(room: int, answer: int, context: int) -> str:
    """Why a problem is left out."""
    return (
        f"over {room} tokens, which leaves no room for an answer of {answer} in the model's "
        f"context of {context}"
    )


def too_long(longest: int) -> str:
    """Why a demonstration is left out."""
    return f"over {longest} tokens, prompt and solution together"


def no_pairs(method: str) -> str:
    """Why a paired method has nothing to explore."""
    return (
        f"method {method} explores problems that have a demonstration, and none of data.prompts "
        "is among data.demos; name the same problems for both"
    )


# --------------------------------------------------------------------------- the question


def check_uploads(spec: TrainSpec) -> list[FieldError]:
    """What the uploads in a spec cannot give it. The spec has its defaults, and no other errors."""
    if not any(map(_is_upload, (spec.data.prompts, spec.data.demos, spec.data.eval))):
        return []
    model = resolve_model(spec.model)
    count = _counter(model, spec.template)
    learns_from, data, context = spec.method.learns_from, spec.data, model.context

    longest = min(spec.sft.max_tokens or context, context)

    def demo_fits(row: Row) -> bool:  # its end is a token too
        return count is None or count([row["problem"], row["solution"]], longest) < longest

    errors: list[FieldError] = []
    if "demos" in learns_from:
        errors += _nothing("data.demos", data.demos, demo_fits, too_long(longest), context)
    if "rewards" in learns_from:
        errors += _no_room("data.prompts", data.prompts, spec.rollout.max_new_tokens, model, count)
        if spec.method.paired and not errors:
            errors += _no_pair(spec.method.name, data.prompts, data.demos, demo_fits)
    answer = spec.eval.max_new_tokens or spec.rollout.max_new_tokens
    return errors + _no_room("data.eval", data.eval, answer, model, count)


def check_asked(spec: EvaluationSpec) -> list[FieldError]:
    """The same of the uploads that an evaluation asks."""
    errors: list[FieldError] = []
    for number, one in enumerate(spec.benchmarks):
        if _is_upload(one):
            model, answer = resolve_model(spec.base), spec.sampling.max_new_tokens or 0
            count = _counter(model, spec.template_of(one))
            errors += _no_room(f"benchmarks.{number}", one, answer, model, count)
    return errors


Row = dict[str, str]
_Fits = Callable[[Row], bool]
_Count = Callable[[list[str], int], int]
"""(texts, enough) → the fewest tokens they can be; no more than a little above `enough` is
counted."""


def _no_room(
    param: str, ref: DatasetRef | None, answer: int, model: ModelInfo, count: _Count | None
) -> list[FieldError]:
    """The error if no problem of an upload leaves room for an answer of so many tokens."""
    room = model.context - answer

    def fits(row: Row) -> bool:
        return count is None or count([row["problem"]], room) <= room

    return _nothing(param, ref, fits, no_room(room, answer, model.context), model.context)


def _nothing(
    param: str, ref: DatasetRef | None, fits: _Fits, why: str, context: int
) -> list[FieldError]:
    """The error if no row of an upload fits."""
    if ref is None or not _is_upload(ref):
        return []
    rows = counted = 0
    for row in _rows(ref):
        if rows >= MOST_ROWS or counted >= MOST_COUNTED or fits(row):
            return []
        rows += 1
        counted += sum(min(len(text), _CHARACTERS * context) for text in row.values())
    if rows == 0 and ref.kinds is not None:  # the engine says which kinds there are
        return []
    if rows == 0:
        message = too_few(ref.name, str(ref.split))
        return [FieldError(f"{param}.split", "no_data", message, given=ref.split)]
    return [FieldError(param, "no_data", left_out(param, rows, why), given=ref.name)]


def _no_pair(
    method: str, prompts: DatasetRef | None, demos: DatasetRef | None, fits: _Fits
) -> list[FieldError]:
    """The error if two uploads have no problem in common. Both are read side by side, as most that
    do have one have it early. Once enough is counted, demonstrations are taken to fit."""
    if prompts is None or demos is None or not _is_upload(prompts) or not _is_upload(demos):
        return []
    explored: set[int] = set()
    imitated: set[int] = set()
    counted = 0
    rows = zip_longest(_rows(prompts), _rows(demos))
    for number, (problem, demo) in enumerate(rows):
        if number >= MOST_ROWS:
            return []
        if problem is not None:
            explored.add(mark := hash(problem["problem"].strip()))
            if mark in imitated:
                return []
        if demo is not None and (counted >= MOST_COUNTED or fits(demo)):
            imitated.add(mark := hash(demo["problem"].strip()))
            if mark in explored:
                return []
        counted += sum(map(len, demo.values())) if demo is not None else 0
    return [FieldError("data.prompts", "no_pairs", no_pairs(method), given=prompts.name)]


def _is_upload(ref: DatasetRef | None) -> bool:
    return ref is not None and registry.UPLOADED.fullmatch(ref.name) is not None


def _rows(ref: DatasetRef) -> Iterator[Row]:
    rows = plain_rows(registry.uploaded_file(ref.name))
    split = ref.split or "train"
    mine = (row for row in rows if registry.in_split(row["problem"], split))
    chosen = (row for row in mine if ref.kinds is None or row["kind"] in ref.kinds)
    return islice(chosen, ref.limit)


# --------------------------------------------------------------------------- counting tokens


def _counter(model: ModelInfo, template: TemplateSpec) -> _Count | None:
    """What counts for this model and template; None where its tokenizer is not at hand."""
    file = model.path / "tokenizer.json" if model.path is not None else None
    if file is None or not file.is_file():
        return None
    loaded = _tokenizer(file, file.stat().st_mtime_ns)
    if loaded is None:
        return None
    tokenizer, exact = loaded
    plain = template.kind == "plain" or (template.kind == "auto" and not has_chat_template(model))
    before = (template.system or "") if plain else ""
    after = template.suffix if plain else ""
    slack = 0 if plain and exact else SLACK

    def tokens(text: str, enough: int) -> int:
        head = text[: _CHARACTERS * (enough + SLACK)]
        counted = len(tokenizer.encode(head, add_special_tokens=False).ids)
        if head == text or counted > enough + 2 * SLACK:
            return counted - slack if head == text else counted - SLACK
        return len(tokenizer.encode(text, add_special_tokens=False).ids) - slack

    def count(texts: list[str], enough: int) -> int:
        problem, *solutions = texts
        whole = f"{before}{problem}{after}" if plain else problem.strip()
        return max(0, tokens(whole, enough)) + sum(
            max(0, tokens(text if plain else text.strip(), enough)) for text in solutions
        )

    return count


@lru_cache(maxsize=4)
def _tokenizer(file: Path, changed: int) -> tuple[Any, bool] | None:
    """(the tokenizer in a file, and whether it is used as it stands there); `changed` is when."""
    try:
        from tokenizers import Tokenizer

        config = json.loads((file.parent / "tokenizer_config.json").read_text("utf-8"))
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # no such package here, or no file that it can read: the engine will see
        return None
    return tokenizer, config.get("tokenizer_class") in _AS_ITS_FILE_SAYS
