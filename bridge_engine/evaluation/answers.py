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


def source_of(
    spec: EvaluationSpec, data: Sequence[str], adapter_sha256: str | None = None
) -> dict[str, Any]:
    """All that the answers of a resolved spec depend on; `data` are the hashes of its sets, and the
    adapter's is that of its manifest."""
    document = spec.model_dump(mode="json")
    sampling = document["sampling"]
    return {
        "model": spec.model,
        "adapter": spec.adapter and {"name": spec.adapter, "sha256": adapter_sha256},
        "runtime.dtype": spec.runtime.dtype,
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


def source_of_others(
    spec: EvaluationSpec, data: Sequence[str], path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the same where the answers in the file `path`, another evaluation's, are judged anew; the
    environment they were given in): how the model was loaded is the other one's affair."""
    head = next(_lines_of(path), {})
    theirs = head.get("source") or {}
    source = source_of(spec, data, (theirs.get("adapter") or {}).get("sha256"))
    source["runtime.dtype"] = theirs.get("runtime.dtype")
    return source, head.get("environment") or {}


class KeptAnswers:
    """The answers of a run: those that are there, and those that come."""

    def __init__(
        self,
        path: Path,
        source: Mapping[str, Any],
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        """Of the file `path`, which is made if it is not there. EngineError (`spec_changed`) if it
        holds answers to something else than `source`. `environment`: hardware and versions that
        they are given with."""
        self.path = path
        self.source = source
        self.environment = dict(environment or {})
        self._lines: dict[tuple[int, str], list[Answer]] = {}
        self.asked_as: dict[int, dict[str, Any]] = {}
        """How the problems of each set became prompts: the `template`, `auto` decided, and the
        `prompt` of the first that was asked; a `warning` where there is one."""
        if not self._take(path):
            self._write([json.dumps({"source": source})], mode="w")

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
        """Another file of all that is here, with the verdicts that there are; `judged` are those of
        each set."""
        left = dict(self._lines)
        with path.open("w", encoding="utf-8") as file:
            head = {"source": self.source, "environment": self.environment}
            file.write(json.dumps(head) + "\n")
            for number, some in enumerate(judged):
                if number in self.asked_as:
                    file.write(self._asked_as_line(number) + "\n")
                file.writelines(f"{line}\n" for line in graded_lines(number, some))
                for one in some:
                    left.pop((number, one.example.id), None)
            file.writelines(f"{_line(*key, answers)}\n" for key, answers in left.items())

    def note(
        self, benchmark: int, template: Mapping[str, Any], prompt: str, warning: str | None = None
    ) -> None:
        """Keeps how the problems of a set become prompts, and what speaks against its scores."""
        asked_as: dict[str, Any] = {"template": dict(template), "prompt": prompt}
        if warning is not None:
            asked_as["warning"] = warning
        if self.asked_as.get(benchmark) != asked_as:
            self.asked_as[benchmark] = asked_as
            self._write([self._asked_as_line(benchmark)])

    def remember(self, benchmark: int, asked: Iterable[Asked]) -> None:
        """Counts these as there, which another process keeps."""
        for one in asked:
            self._lines[benchmark, one.example.id] = list(one.answers)

    def take_from(self, path: Path) -> None:
        """Takes over what another file has and this one lacks."""
        before = set(self._lines)
        if not self._take(path):
            return
        self._write([self._asked_as_line(benchmark) for benchmark in self.asked_as])
        new = [key for key in self._lines if key not in before]
        self._write([_line(*key, self._lines[key]) for key in new])

    def _take(self, path: Path) -> bool:
        """Takes up a file's lines; False if there are none."""
        lines = _lines_of(path)
        head = next(lines, None)
        if head is None:
            return False
        theirs = head.get("source") or {}
        if theirs != self.source:
            now = self.source
            differing = [k for k in now if theirs.get(k) != now[k]]
            shown = "; ".join(f"{k}: {theirs.get(k)} → {now[k]}" for k in differing)
            raise EngineError(
                f"{path} holds answers to another spec or to other problems; use another "
                f"directory. Differences: {shown[:2000]}",
                code="spec_changed",
                param=differing[0] if differing else None,
            )
        for line in lines:
            if "template" in line:
                self.asked_as[line.pop("benchmark")] = line
                continue
            found = [_answer(answer) for answer in line["answers"]]
            self._lines.setdefault((line["benchmark"], line["id"]), found)
        return True

    def _asked_as_line(self, benchmark: int) -> str:
        return json.dumps({"benchmark": benchmark, **self.asked_as[benchmark]}, ensure_ascii=False)

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


def _lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, one at a time; what is not whole at its end is cut off."""
    whole = 0
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                yield json.loads(line)
            else:
                return
    except FileNotFoundError:
        return
    os.truncate(path, whole)
