"""Datasets: every source gives the same shape, and the first bad row is named."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridge_engine.data import arithmetic, hub, registry
from bridge_engine.data.datasets import digest, load, read_rows, summarize
from bridge_engine.data.example import Example
from bridge_engine.errors import DataError
from bridge_engine.evaluation.answers import case_of
from bridge_engine.rewards import Verifier, stated_answer
from bridge_engine.spec.train import DatasetRef

ROW = {"problem": "2+3?", "answer": "5", "solution": "2+3=5#5"}


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRIDGE_UPLOADS_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRIDGE_DATA_DIR", str(tmp_path))
    return tmp_path


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return caught.value.message


# ------------------------------------------------------------------- a part to measure on


def test_the_parts_of_an_upload_are_apart_and_are_all_of_it(uploads: Path) -> None:
    rows = [{**ROW, "problem": f"{n}+1?"} for n in range(300)]
    write(uploads / "ds_x.jsonl", *rows)

    def problems(split: str, **more: Any) -> list[str]:
        ref = DatasetRef(name="ds_x", split=split, **more)
        return [one.problem for one in load(ref, "demos")]

    tenth, rest = problems("test10"), problems("train90")
    assert 15 <= len(tenth) <= 45
    assert set(tenth).isdisjoint(rest)
    assert sorted(tenth + rest) == sorted(problems("train"))
    assert problems("test10", limit=5) == tenth[:5]
    # the same rows in another order, some of them twice and with other blanks
    again = [{**row, "problem": f"  {row['problem']} "} for row in [*reversed(rows), *rows[:50]]]
    write(uploads / "ds_x.jsonl", *again)
    assert {one.strip() for one in problems("test10")} == set(tenth)


def test_an_upload_of_which_a_part_is_empty_says_so(uploads: Path) -> None:
    write(uploads / "ds_x.jsonl", ROW)
    (empty,) = (p for p in ("test10", "train90") if not registry.in_split(ROW["problem"], p))
    with pytest.raises(DataError) as caught:
        load(DatasetRef(name="ds_x", split=empty), "eval")
    assert (caught.value.code, caught.value.param) == ("no_data", "data.eval.split")
    assert f"so few problems that none is in {empty}" in caught.value.message


# ------------------------------------------------------------------- rows


def test_a_level_in_words_is_no_level_and_costs_no_row(tmp_path: Path) -> None:
    levels = ["hard", "Level ?", "Level 5", 3, "2"]
    path = write(tmp_path / "f.jsonl", *[{**ROW, "level": level} for level in levels])
    assert [one.level for one in read_rows(path)] == [None, None, 5, 3, 2]


def test_a_measured_answer_comes_with_its_value(uploads: Path) -> None:
    rows = [{**ROW, "answer": "8.7 \\times 10^{8}", "answer_value": 8.7e8}, ROW]
    write(uploads / "ds_m.jsonl", *rows)
    measured, exact = load(DatasetRef(name="ds_m"), "eval")
    assert (measured.value, exact.value) == (8.7e8, None)
    for value in ("8.7e8", True, [1]):
        row = {**ROW, "answer_value": value}
        assert "`answer_value` is" in refused(write(uploads / "ds_n.jsonl", row))
    with Verifier() as verifier:
        verdicts = verifier.judge([case_of(measured, r"\boxed{8.72e8}"), case_of(exact, "5.01")])
    assert [v.reason for v in verdicts] == ["within_tolerance", "other_number"]


def test_the_hash_of_problems_is_that_of_older_checkpoints() -> None:
    """It was the hash of six fields before there were measured values."""
    problem = Example("a", "1+1?", "2", "1+1=2#2", "add", 1)
    old = hashlib.sha256(repr(("a", "1+1?", "2", "1+1=2#2", "add", 1)).encode()).hexdigest()
    assert digest([problem]) == old
    assert digest([replace(problem, value=2.0)]) != old


def test_every_column_name_and_type_in_use_is_understood(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"id": 7, "problem": "p", "answer": 5, "subject": "Algebra", "level": "Level 3"},
        {"question": "q", "answer": 2.5, "response": r"so \boxed{2.5}", "kind": "k", "level": 4},
        {"prompt": "r", "answer": " x ", "solution": None, "extra": {"ignored": []}},
    )
    assert list(read_rows(path)) == [
        Example("7", "p", "5", None, "Algebra", 3),
        Example("a/2", "q", "2.5", r"so \boxed{2.5}", "k", 4),
        Example("a/3", "r", "x"),
    ]


def test_gsm8k_s_own_form_becomes_a_solution_that_ends_with_its_answer(tmp_path: Path) -> None:
    answer = "She sold 48/2 = <<48/2=24>>24 clips.\n#### 1,024"
    (row,) = read_rows(write(tmp_path / "a.jsonl", {"question": "How many?", "answer": answer}))
    assert row.answer == "1024"
    assert row.solution == "She sold 48/2 = 24 clips.\nThe answer is \\boxed{1024}."


@pytest.mark.parametrize(
    ("solution", "answer", "kept"),
    [
        ("2+3=5#5", "5", True),
        (r"It is \boxed{x}.", "x", True),
        ("So the answer is 7.", "5", True),  # a wrong demonstration stays the user's own
        ("It is 5.", "5", False),
        ("So the answer is clear.", "5", False),
        ("#12 will win", "16", False),
    ],
)
def test_an_expert_s_solution_always_states_an_answer(
    solution: str, answer: str, kept: bool, tmp_path: Path
) -> None:
    row = {"problem": "p", "answer": answer, "solution": solution}
    (example,) = read_rows(write(tmp_path / "a.jsonl", row))
    assert example.solution is not None
    assert (example.solution == solution) is kept
    if not kept:
        assert example.solution.startswith(solution)
        assert stated_answer(example.solution) == answer


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"[1, 2]", "is a list, not an object"),
        (b"null", "is null, not an object"),
        (b'{"problem": "p"}', "has no answer"),
        (b'{"problem": "p", "answer": null}', "has no answer"),
        (b'{"problem": "p", "answer": " "}', "`answer` is empty"),
        (b'{"problem": "p", "answer": NaN}', "is not JSON (NaN"),
        (b'{"problem": "p", "answer": 1e999}', "`answer` is inf"),
        (b'{"problem": "p", "answer": true}', "`answer` is true or false"),
        (b'{"problem": "p", "answer": ["5"]}', "`answer` is a list"),
        (b'{"problem": "p", "answer": "#### "}', "nothing before or after ####"),
        (b'{"answer": "5"}', "has no problem"),
        (b'{"problem": "", "answer": "5"}', "`problem` is empty"),
        (b'{"problem": 5, "answer": "5"}', "`problem` is a number, not text"),
        (b'{"problem": "p", "answer": "5", "solution": {}}', "`solution` is an object"),
        (b'{"problem": "p", "answer": "5", "id": ""}', "`id` is empty"),
        (b'{"problem": "p", "answer": "5", "level": []}', "`level` is a list"),
        (b'{"problem": "p", "answer": %s}' % (b"9" * 6000), "has thousands of digits"),
        (b'{"problem": "\xff", "answer": "5"}', "byte 14 is not UTF-8"),
        (b'{"problem": "\\ud800", "answer": "5"}', "half a character"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_bad_row_is_named_by_file_and_line(
    line: bytes, complaint: str, compressed: bool, tmp_path: Path
) -> None:
    good = json.dumps(ROW).encode()
    content = b"\n".join([good, line, good]) + b"\n"
    path = tmp_path / "set.jsonl"
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert "set.jsonl, line 2" in refused(path)
    assert complaint in refused(path)


def test_rows_before_a_bad_one_are_not_silently_the_dataset(uploads: Path) -> None:
    write(uploads / "ds_a.jsonl", ROW, {"problem": "p"})
    with pytest.raises(DataError, match=r"ds_a\.jsonl, line 2") as caught:
        load(DatasetRef(name="ds_a"), "prompts")
    assert caught.value.param == "data.prompts"


def test_an_id_used_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**ROW, "id": "x"}, {**ROW, "id": "y"}, {**ROW, "id": "x"})
    assert "a.jsonl, line 3: the id 'x' was used by an earlier line" in refused(path)


@pytest.mark.parametrize("content", [b"", gzip.compress(b"", mtime=0)])
def test_an_empty_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert "a.jsonl is empty" in refused(path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(ROW).encode() * 1000)[:-20])
    assert "damaged gzip" in refused(path)
    path.write_bytes(b"PAR1 and then nothing PAR1")
    assert "damaged Parquet" in refused(path)
    assert "cannot be read" in refused(tmp_path / "missing.jsonl")


def test_the_last_line_needs_no_newline_and_windows_files_work(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = json.dumps(ROW).encode()
    path.write_bytes(b"\xef\xbb\xbf" + text + b"\r\n" + text)
    assert [row.problem for row in read_rows(path)] == ["2+3?", "2+3?"]


def test_parquet_gives_the_same_rows_as_json_lines(tmp_path: Path) -> None:
    rows = [{"problem": f"{n}+1?", "answer": n + 1, "solution": f"#{n + 1}"} for n in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    write(tmp_path / "a.jsonl", *rows)
    assert list(read_rows(tmp_path / "a.parquet")) == list(read_rows(tmp_path / "a.jsonl"))


def test_a_bad_parquet_row_is_named(tmp_path: Path) -> None:
    answers = [1.0] * 300 + [float("nan")]
    table = pa.table({"problem": ["p"] * 301, "answer": answers})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet, line 301: `answer` is nan" in refused(tmp_path / "a.parquet")


def test_reading_holds_one_row_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for _ in range(400):
            file.write(json.dumps({"problem": "x" * 100_000, "answer": "5"}) + "\n")
    tracemalloc.start()
    assert summarize(path).rows == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000 < path.stat().st_size / 10


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(200 << 20)  # sparse: 200 MiB of one line
    tracemalloc.start()
    assert "a.jsonl, line 1 is longer than 16 MiB" in refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_name_given_for_people_replaces_the_file_s_own(tmp_path: Path) -> None:
    path = write(tmp_path / "upload-123.tmp", {"problem": "p"})
    with pytest.raises(DataError, match=r"^mine\.jsonl, line 1 has no answer"):
        summarize(path, name="mine.jsonl")


# ------------------------------------------------------------------- sources


def test_arithmetic_is_generated_with_the_defaults_of_its_roles() -> None:
    demos = load(DatasetRef(name="arithmetic", limit=5), "demos")
    assert demos == arithmetic.generate("demos", limit=5)
    assert load(DatasetRef(name="arithmetic", limit=3), "eval")[0].id.startswith("arithmetic/dev/")
    with Verifier() as verifier:
        verdicts = verifier.judge([(e.answer, e.solution or "") for e in demos])
    assert all(v.value is True and v.fast for v in verdicts)


def test_math_s_splits_share_no_problem_but_train_and_train_hard(benchmarks: Path) -> None:
    rows = [
        {**ROW, "id": f"{level}/{hard}", "level": level, "in_math8k": hard, "subject": "Algebra"}
        for level in (1, 3, 5, None)
        for hard in (False, True)
    ]
    with gzip.open(benchmarks / "math_train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

    def ids(split: str) -> set[str]:
        return {e.id for e in load(DatasetRef(name="math", split=split), "prompts")}

    assert ids("dev") == {"3/False", "5/False"}
    assert not ids("train") & ids("dev")
    assert ids("train") | ids("dev") == {row["id"] for row in rows}
    assert ids("train_hard") == {row["id"] for row in rows if row["in_math8k"]}


def test_limit_and_kinds_choose_in_the_file_s_order(uploads: Path) -> None:
    rows = [{**ROW, "id": n, "kind": "ab"[n % 2]} for n in range(10)]
    write(uploads / "ds_a.jsonl", *rows)
    chosen = load(DatasetRef(name="ds_a", kinds=["b"], limit=3), "eval")
    assert [e.id for e in chosen] == ["1", "3", "5"]
    with pytest.raises(DataError, match="no problem of kind c; its kinds: a, b") as caught:
        load(DatasetRef(name="ds_a", kinds=["c"]), "eval")
    assert caught.value.param == "data.eval.kinds"


def test_a_limit_reads_no_further_than_it_needs(uploads: Path) -> None:
    write(uploads / "ds_a.jsonl", ROW, ROW, {"bad": "row"})
    assert len(load(DatasetRef(name="ds_a", limit=2), "prompts")) == 2


def test_demos_need_a_solution_in_every_row(uploads: Path) -> None:
    write(uploads / "ds_a.jsonl", ROW, {"problem": "p", "answer": "5"})
    with pytest.raises(DataError, match=r"ds_a\.jsonl, line 2 has no solution") as caught:
        load(DatasetRef(name="ds_a"), "demos")
    assert caught.value.code == "no_solutions"


@pytest.mark.parametrize("name", ["ds_../../etc/passwd", "ds_nobody", "../a", "/etc/passwd", "x"])
def test_a_name_is_an_id_and_never_a_path(name: str, uploads: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(DatasetRef(name=name), "prompts")
    assert caught.value.code == "unknown_dataset"


def test_a_benchmark_that_is_nowhere_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BRIDGE_DATA_DIR", raising=False)
    with pytest.raises(DataError, match=r"set BRIDGE_DATA_DIR to a folder that holds svamp\.jsonl"):
        load(DatasetRef(name="svamp", split="test"), "eval")


@pytest.mark.skipif("BRIDGE_DATA_DIR" not in os.environ, reason="BRIDGE_DATA_DIR is not set")
@pytest.mark.parametrize("name", [*registry.BENCHMARKS])
def test_the_real_benchmarks_load_and_their_solutions_state_their_answers(name: str) -> None:
    known = registry.BENCHMARKS[name]
    split = next(iter(known.parts))
    for example in load(DatasetRef(name=name, split=split, limit=200), "prompts"):
        assert not known.has_solutions or stated_answer(example.solution or "")


# ------------------------------------------------------------------- the hub


def test_splits_are_seen_in_the_names_of_the_files() -> None:
    assert hub.splits(["README.md", "train.py", "data/train-00001-of-00002.parquet"]) == {
        "train": ["data/train-00001-of-00002.parquet"]
    }
    assert hub.splits(["test.jsonl", "dev.jsonl.gz", "x.parquet"]) == {
        "dev": ["dev.jsonl.gz"],
        "test": ["test.jsonl"],
        "train": ["x.parquet"],
    }
    two = hub.splits([f"{c}/{s}-00000-of-00001.parquet" for c in "ab" for s in ("train", "test")])
    assert sorted(two) == ["a/test", "a/train", "b/test", "b/train"]


def _offline(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs code against a Hugging Face cache under `home`, with the network switched off."""
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    kept = {k: v for k, v in os.environ.items() if k != "BRIDGE_DATA_DIR" and k[:3] != "HF_"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**kept, **settings},
        cwd=Path(__file__).parents[2],
        timeout=120,
    )


def _cached(home: Path, repo: str) -> Path:
    """The snapshot folder of a dataset in a Hugging Face cache, as the library lays it out."""
    folder = home / "hub" / f"datasets--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    return folder / "snapshots" / "abc"


_LOAD = (
    "from bridge_engine.data.datasets import load\n"
    "from bridge_engine.spec.train import DatasetRef\n"
    "for e in load(DatasetRef(name={name!r}, split={split!r}), 'demos'): print(e.answer, e.kind)\n"
)


def test_gsm8k_is_read_from_the_hub_s_files_where_there_is_no_folder(tmp_path: Path) -> None:
    folder = _cached(tmp_path, "openai/gsm8k")
    for config in ("main", "socratic"):
        (folder / config).mkdir()
        rows = [{"question": "How many?", "answer": f"{config}: 3*4 = <<3*4=12>>12\n#### 12"}]
        pq.write_table(pa.Table.from_pylist(rows), folder / config / "train-00000-of-00001.parquet")
    done = _offline(_LOAD.format(name="gsm8k", split="train"), tmp_path)
    assert (done.returncode, done.stdout) == (0, "12 None\n"), done.stderr


def test_any_hub_dataset_is_read_by_its_usual_columns(tmp_path: Path) -> None:
    folder = _cached(tmp_path, "some/data")
    for shard in range(2):
        row = {"prompt": "p", "answer": str(shard), "response": f"#{shard}", "subject": "s"}
        (folder / f"train-0000{shard}-of-00002.jsonl").write_text(json.dumps(row) + "\n")
    done = _offline(_LOAD.format(name="hub:some/data", split="train"), tmp_path)
    assert (done.returncode, done.stdout) == (0, "0 s\n1 s\n"), done.stderr


def test_without_network_and_cache_the_error_says_what_to_do(tmp_path: Path) -> None:
    done = _offline(_LOAD.format(name="hub:some/data", split="train"), tmp_path)
    assert "is not in the local Hugging Face cache" in done.stderr
    assert "upload the data with POST /datasets" in done.stderr
    done = _offline(_LOAD.format(name="gsm8k", split="train"), tmp_path)
    assert "set BRIDGE_DATA_DIR to a folder that holds gsm8k_train.jsonl.gz" in done.stderr


def test_loading_data_imports_no_torch() -> None:
    code = (
        "import sys, bridge_engine.data.datasets, bridge_engine.models.catalog\n"
        "assert not {'torch', 'transformers', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW, {"bad": "row"})
    assert [e.answer for e in islice(read_rows(path), 1)] == ["5"]
