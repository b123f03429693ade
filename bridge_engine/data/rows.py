"""Problems out of a file: JSON Lines (plain or gzip) or Parquet, read row by row and checked.

Whatever the size of a file, one row (or one batch of a Parquet file) is in memory at a time. A file
is told by its first bytes, not by its name. The first row that cannot be used is an error that
names file and line: half a dataset, silently read, would be worse than none.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bridge_engine.data.example import Example
from bridge_engine.errors import DataError
from bridge_engine.rewards import fast
from bridge_engine.rewards.extract import clean, stated_answer

PROBLEM_COLUMNS = ("problem", "question", "prompt")
SOLUTION_COLUMNS = ("solution", "response")
KIND_COLUMNS = ("kind", "subject")
LONGEST_LINE = 16 << 20
"""Bytes. A longer line is not a problem, and is refused before it fills the memory."""

_ANNOTATION = re.compile(r"<<[^<>]*>>")
"""GSM8K's calculator annotations, `48/2 = <<48/2=24>>24`."""

_TOO_LARGE = "a number in it has thousands of digits; if it is meant, give it as text, in quotes"
"""What else the parser refuses: Python makes no number of so many digits."""

_FORM = (
    'every line is one JSON object such as {"problem": "2+3?", "answer": "5", "solution": '
    '"2+3=5"}, where solution may be left out'
)


@dataclass(frozen=True)
class FileSummary:
    """A file that was read to its end without an error."""

    rows: int
    with_solution: int


def read_rows(path: Path, *, name: str | None = None) -> Iterator[Example]:
    """The file's problems. DataError names `name` (default: the file's name) and the line.

    Columns: `problem` (or `question`, `prompt`), `answer` (text or a number), and optionally
    `solution` (or `response`), `id`, `kind` (or `subject`), `level`, `answer_value` (the answer
    as a number that was measured); others are ignored. GSM8K's own form, where `answer` is the
    solution, `####` and the answer, is understood.
    """
    for _, _, example in numbered_rows(path, name=name):
        yield example


def plain_rows(path: Path) -> Iterator[dict[str, str]]:
    """The `problem`, `solution` and `kind` of each row of a file that has been checked, as they
    stand there and `""` where they do not: several times as fast as reading the examples."""
    columns = {"problem": PROBLEM_COLUMNS, "solution": SOLUTION_COLUMNS, "kind": KIND_COLUMNS}
    for _, row in _raw_rows(path, path.name):
        yield {
            name: next((str(row[one]) for one in among if row.get(one) is not None), "")
            for name, among in columns.items()
        }


def summarize(path: Path, *, name: str | None = None) -> FileSummary:
    """Checks a whole file, row by row."""
    rows = with_solution = 0
    for example in read_rows(path, name=name):
        rows += 1
        with_solution += example.solution is not None
    return FileSummary(rows, with_solution)


def numbered_rows(
    path: Path, *, name: str | None = None
) -> Iterator[tuple[int, dict[str, Any], Example]]:
    """(line number from 1, the row as it is in the file, the problem in it)."""
    shown = name or path.name
    seen: set[bytes] = set()
    number = 0
    for number, row in _raw_rows(path, shown):
        example = _example(row, f"{shown}, line {number}", default_id=f"{path.stem}/{number}")
        if row.get("id") is not None:
            # Eight bytes an id: ten million of them fit in memory, the ids themselves might not.
            digest = hashlib.blake2b(example.id.encode(), digest_size=8).digest()
            if digest in seen:
                raise DataError(
                    f"{shown}, line {number}: the id {example.id!r} was used by an earlier line; "
                    "make ids unique, or leave them out"
                )
            seen.add(digest)
        yield number, row, example
    if number == 0:
        raise DataError(f"{shown} is empty; {_FORM}")


# --------------------------------------------------------------------------- files


def _raw_rows(path: Path, shown: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}") from error
    if magic == b"PAR1":
        yield from _parquet_rows(path, shown)
    elif magic[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as unzipped:
                yield from _json_rows(unzipped, shown)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{shown} is a damaged gzip file ({error}); make it again") from error
    else:
        with path.open("rb") as file:
            yield from _json_rows(file, shown)


def _json_rows(file: IO[bytes] | gzip.GzipFile, shown: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{shown}, line {number}"
        if len(line) > LONGEST_LINE:
            raise DataError(f"{where} is longer than {LONGEST_LINE >> 20} MiB; {_FORM}")
        yield number, _json_object(line, where, first=number == 1)


def _json_object(line: bytes, where: str, *, first: bool) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from error
    if not text:
        raise DataError(f"{where} is empty; take empty lines out: {_FORM}")
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply; {_FORM}") from error
    except ValueError as error:
        why = str(error) if isinstance(error, json.JSONDecodeError | _NoValue) else _TOO_LARGE
        raise DataError(f"{where} is not JSON ({why}); {_FORM}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is {_type_name(row)}, not an object; {_FORM}")
    return row


class _NoValue(ValueError):
    """What Python would read, and JSON does not know."""


def _refuse_constant(constant: str) -> None:
    raise _NoValue(f"{constant} is not a JSON value")


def _parquet_rows(path: Path, shown: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{shown} is a damaged Parquet file (after line {number}: {error}); write it again"
        ) from error


# --------------------------------------------------------------------------- rows


def _example(row: dict[str, Any], where: str, *, default_id: str) -> Example:
    problem = _text(row, PROBLEM_COLUMNS, where)
    if problem is None:
        raise DataError(f"{where} has no problem; {_FORM}")
    solution = _text(row, SOLUTION_COLUMNS, where)
    answer = _answer(row, where)
    if solution is None and "####" in answer:
        solution, answer = _gsm8k(answer, where)
    return Example(
        id=_id(row, where) or default_id,
        problem=problem,
        answer=answer,
        solution=None if solution is None else with_answer(solution, answer),
        kind=_text(row, KIND_COLUMNS, where),
        level=_level(row, where),
        value=_value(row, where),
    )


def with_answer(solution: str, answer: str) -> str:
    r"""The solution as a policy should produce it: it ends by stating the answer.

    A solution that states one in a form the verifier reads stays as it is, right or wrong; else
    `The answer is \boxed{…}.` is added as its last line. Outside a box, a last line such as "so the
    answer is clear" or "#12 will win" counts only if it can be compared with the answer.
    """
    stated = stated_answer(solution)
    if stated is not None and (
        "\\boxed" in solution or fast.judge(clean(answer), stated) is not None
    ):
        return solution
    return f"{solution.rstrip()}\nThe answer is \\boxed{{{answer}}}."


def _gsm8k(text: str, where: str) -> tuple[str, str]:
    """GSM8K's answer column: the solution, `####`, the answer."""
    solution, _, answer = text.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not answer or not solution.strip():
        raise DataError(f"{where}: `answer` has nothing before or after ####")
    return with_answer(_ANNOTATION.sub("", solution).strip(), answer), answer


def _text(row: dict[str, Any], columns: tuple[str, ...], where: str) -> str | None:
    """The first of `columns` that has a value."""
    for column in columns:
        value = row.get(column)
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{where}: `{column}` is {_type_name(value)}, not text")
        if not value.strip():
            raise DataError(f"{where}: `{column}` is empty; give it text, or leave the row out")
        return _encodable(value, column, where)
    return None


def _answer(row: dict[str, Any], where: str) -> str:
    value = row.get("answer")
    if value is None:
        raise DataError(f"{where} has no answer; {_FORM}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: `answer` is {value}, which no answer can equal")
    if isinstance(value, int | float) and not isinstance(value, bool):
        whole = isinstance(value, float) and value.is_integer()
        return str(int(value) if whole else value)
    if not isinstance(value, str):
        raise DataError(f"{where}: `answer` is {_type_name(value)}, not text or a number")
    if not value.strip():
        raise DataError(f"{where}: `answer` is empty; give it text, or leave the row out")
    return _encodable(value.strip(), "answer", where)


def _id(row: dict[str, Any], where: str) -> str | None:
    value = row.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where}: `id` is {_type_name(value)}, not text or a whole number")
    return _encodable(str(value), "id", where)


def _level(row: dict[str, Any], where: str) -> int | None:
    """A whole number; MATH's `Level 5` too. Another text is no level, as if there were none: the
    column is other people's, nothing needs it, and no row is lost for it."""
    value = row.get("level")
    if isinstance(value, str):
        digits = re.fullmatch(r"(?:Level )?(\d{1,3})", value.strip())
        return int(digits[1]) if digits else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise DataError(f"{where}: `level` is {_type_name(value)}, not a whole number")


def _value(row: dict[str, Any], where: str) -> float | None:
    value = row.get("answer_value")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: `answer_value` is {_type_name(value)}, not a finite number")
    return float(value)


def _encodable(text: str, column: str, where: str) -> str:
    r"""JSON can escape half a character (`\ud800`), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `{column}` holds half a character (a lone surrogate) at position "
            f"{error.start + 1}; write the file again as UTF-8"
        ) from error
    return text


def _type_name(value: Any) -> str:
    names = {bool: "true or false", dict: "an object", list: "a list", str: "text"}
    if value is None:
        return "null"
    if value == "":
        return "empty"
    return names.get(type(value), "a number")
