"""What a model answered, kept line by line: `completions.jsonl` of a run directory.

A line is a problem with all its answers, so a problem is finished or it is not; a torn last line is
cut off. The first line says what the answers depend on. Whoever samples with the same spec on the
same problems gets the same answers, so lines from wherever may stand together. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridge_engine.data.example import Example
from bridge_engine.errors import EngineError
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.rewards import Case, Verdict

COMPLETIONS = "completions.jsonl"
PROBLEMS = "problems.json"
"""Beside it in a checkpoint: how each problem went, for comparisons."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion, as its reader sees it."""

    text: str
    tokens: int
    """Its length, with the end token where it has one."""
    truncated: bool
    """Cut off at the limit."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A problem with all the answers to it, in the order of their samples.

    None at all where its prompt left no room for an answer in the model's context.
    """

    example: Example
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class Judged:
    """The same, with a verdict on each answer."""

    example: Example
    answers: Sequence[Answer]
    verdicts: Sequence[Verdict]
    stated: Sequence[str | None]
    """The answer that each of them states, None where it states none."""


def case_of(example: Example, text: str) -> Case:
    """A completion beside its problem, as the verifier takes it."""
    return Case(example.answer, text, example.problem, example.value)


def source_of(spec: EvaluationSpec, data: Sequence[str]) -> dict[str, Any]:
    """All that the answers of a resolved spec depend on; `data` are the hashes of its sets."""
    document = spec.model_dump(mode="json")
    sampling = document["sampling"]
    return {
        "model": spec.model,
        "adapter": spec.adapter,
        "seed": spec.seed,
        "sampling": {k: v for k, v in sampling.items() if k not in ("batch_size", "samples")},
        "benchmarks": [
            {
                **{k: v for k, v in shown.items() if k not in ("samples", "template")},
                "samples": spec.samples_of(one),
                "template": spec.template_of(one).model_dump(mode="json"),
                "data_sha256": sha256,
            }
            for shown, one, sha256 in zip(
                document["benchmarks"], spec.benchmarks, data, strict=True
            )
        ],
    }


class KeptAnswers:
    """The answers of a run: those that are there, and those that come."""

    def __init__(self, path: Path, source: Mapping[str, Any]) -> None:
        """Of the file `path`, which is made if it is not there. EngineError (`spec_changed`) if it
        holds answers to something else than `source`."""
        self.path = path
        self.source = source
        self._lines: dict[tuple[int, str], list[Answer]] = {}
        self.templates: dict[int, dict[str, Any]] = {}
        """How the problems of each set became prompts, `auto` decided."""
        head, rest = _lines_of(path)
        if head is None:
            self._write([json.dumps({"source": source})], mode="w")
        else:
            self._take(head, rest, path)

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self._lines

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, benchmark: int, example: Example) -> Asked:
        """A problem that was asked: of the set with this number in the spec."""
        return Asked(example, self._lines[benchmark, example.id])

    def add(self, benchmark: int, asked: Iterable[Asked]) -> None:
        """Keeps these, on the disk too once this returns."""
        asked = list(asked)
        self.remember(benchmark, asked)
        self._write([_line(benchmark, one.example.id, one.answers) for one in asked])

    def write_graded(self, path: Path, judged: Sequence[Sequence[Judged]]) -> None:
        """Another file of all that is here, with verdicts; `judged` are those of each set."""
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"source": self.source}) + "\n")
            for number, some in enumerate(judged):
                if number in self.templates:
                    line = {"benchmark": number, "template": self.templates[number]}
                    file.write(json.dumps(line) + "\n")
                file.writelines(f"{line}\n" for line in graded_lines(number, some))

    def note_template(self, benchmark: int, template: Mapping[str, Any]) -> None:
        """Keeps how the problems of a set become prompts."""
        if self.templates.get(benchmark) != template:
            self.templates[benchmark] = dict(template)
            self._write([json.dumps({"benchmark": benchmark, "template": template})])

    def remember(self, benchmark: int, asked: Iterable[Asked]) -> None:
        """Counts these as there, which another process keeps."""
        for one in asked:
            self._lines[benchmark, one.example.id] = list(one.answers)

    def take_from(self, path: Path) -> None:
        """Takes over what another file has and this one lacks."""
        head, rest = _lines_of(path)
        if head is None:
            return
        before = set(self._lines)
        self._take(head, rest, path)
        for benchmark, template in self.templates.items():
            self._write([json.dumps({"benchmark": benchmark, "template": template})])
        new = [key for key in self._lines if key not in before]
        self._write([_line(*key, self._lines[key]) for key in new])

    def _take(self, head: Mapping[str, Any], rest: Iterable[Mapping[str, Any]], at: Path) -> None:
        theirs = head.get("source") or {}
        if theirs != self.source:
            now = self.source
            differing = [k for k in now if theirs.get(k) != now[k]]
            shown = "; ".join(f"{k}: {theirs.get(k)} → {now[k]}" for k in differing)
            raise EngineError(
                f"{at} holds answers to another spec or to other problems; use another directory. "
                f"Differences: {shown[:2000]}",
                code="spec_changed",
                param=differing[0] if differing else None,
            )
        for line in rest:
            if "template" in line:
                self.templates[line["benchmark"]] = line["template"]
                continue
            found = [_answer(answer) for answer in line["answers"]]
            self._lines.setdefault((line["benchmark"], line["id"]), found)

    def _write(self, lines: Sequence[str], mode: str = "a") -> None:
        if not lines:
            return
        with self.path.open(mode, encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def graded_lines(benchmark: int, judged: Iterable[Judged]) -> Iterator[str]:
    """The same lines with the verdicts in them, for people: whoever reads them here takes the
    answers alone."""
    for one in judged:
        line = json.loads(_line(benchmark, one.example.id, one.answers))
        line |= {"problem": one.example.problem, "gold": one.example.answer}
        for answer, verdict, stated in zip(line["answers"], one.verdicts, one.stated, strict=True):
            answer |= {"stated": stated, "verdict": verdict.name, "reason": verdict.reason}
        yield json.dumps(line, ensure_ascii=False)


def _answer(line: Mapping[str, Any]) -> Answer:
    return Answer(line["text"], line["tokens"], line["truncated"])


def _line(benchmark: int, problem: str, answers: Sequence[Answer]) -> str:
    content = {"benchmark": benchmark, "id": problem, "answers": [asdict(a) for a in answers]}
    return json.dumps(content, ensure_ascii=False)


def _lines_of(path: Path) -> tuple[dict[str, Any] | None, Iterator[dict[str, Any]]]:
    """(the first line, the others); what is not whole at the end of the file is cut off."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, iter(())
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = (json.loads(line) for line in whole.splitlines())
    return next(lines, None), lines
