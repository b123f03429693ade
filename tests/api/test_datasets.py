"""Uploads: taken whole or not at all, and refused with the line at fault."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from bridge_engine.data.datasets import read_rows
from service.datasets import upload
from service.settings import Settings
from service.store import Store
from tests.api.conftest import connect, problem

GOOD = {"problem": "2+3?", "answer": "5", "solution": "2+3=5#5"}
ROWS = [GOOD, {"problem": "7-1?", "answer": 6}]


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def kept(settings: Settings) -> list[str]:
    folder = settings.datasets_dir
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_form_upload_is_checked_counted_and_put_in_place(
    client: TestClient, settings: Settings
) -> None:
    files = {"file": ("my data.jsonl", jsonl(*ROWS))}
    response = client.post("/datasets", files=files)
    assert response.status_code == 201, response.text
    body = response.json()
    assert response.headers["location"] == f"/datasets/{body['id']}"
    assert (body["rows"], body["with_solution"]) == (2, 1)
    assert (body["name"], body["filename"]) == ("my data", "my data.jsonl")
    assert kept(settings) == [f"{body['id']}.jsonl"]
    path = settings.datasets_dir / f"{body['id']}.jsonl"
    assert body["bytes"] == path.stat().st_size
    examples = list(read_rows(path))
    assert [(e.problem, e.answer) for e in examples] == [("2+3?", "5"), ("7-1?", "6")]
    assert [e.id for e in examples] == [f"{body['id']}/1", f"{body['id']}/2"]
    assert client.get(f"/datasets/{body['id']}").json() == body


def test_uploaded_dataset_can_be_trained_on_under_its_id(client: TestClient) -> None:
    dataset = client.post("/datasets", content=jsonl(GOOD)).json()["id"]
    spec = {"method": "sft", "data": {"demos": dataset, "eval": "arithmetic"}}
    response = client.post("/jobs", json=spec)
    assert response.status_code == 201, response.text
    assert response.json()["spec"]["data"]["demos"]["name"] == dataset


def test_form_with_a_name_and_the_file_in_many_pieces(client: TestClient) -> None:
    rows = [{"problem": f"{n}+1?", "answer": str(n + 1)} for n in range(5000)]
    boundary = "xyzzy"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="name"\r\n\r\nmine\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="C:\\d\\a.jsonl"'
        "\r\nContent-Type: application/octet-stream\r\n\r\n"
    ).encode() + jsonl(*rows)
    body += f"\r\n--{boundary}--\r\n".encode()
    pieces = (body[i : i + 997] for i in range(0, len(body), 997))
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    dataset = client.post("/datasets", content=pieces, headers=headers).json()
    assert (dataset["name"], dataset["filename"], dataset["rows"]) == ("mine", "a.jsonl", 5000)


@pytest.mark.parametrize("form", [True, False])
def test_parquet_and_gzip_are_told_by_their_bytes(client: TestClient, form: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = io.BytesIO()
    pq.write_table(pa.table({"question": ["2+3?", "1+1?"], "answer": ["5", "2"]}), table)
    for name, content in (
        ("a.parquet", table.getvalue()),
        ("a.jsonl.gz", gzip.compress(jsonl(GOOD, GOOD), mtime=0)),
    ):
        arguments: dict[str, Any] = (
            {"files": {"file": (name, content)}}
            if form
            else {
                "content": content,
                "params": {"name": name},
            }
        )
        response = client.post("/datasets", **arguments)
        assert response.status_code == 201, response.text
        assert response.json()["rows"] == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (jsonl(GOOD, {"problem": "2+3?"}), "line 2 has no answer"),
        (jsonl(GOOD) + b'{"problem": "\xff\xfe", "answer": "1"}\n', "line 2: byte 14 is not UTF-8"),
        (b"", "is empty"),
        (jsonl(GOOD, GOOD) + b"\n" + jsonl(GOOD), "line 3 is empty"),
        (jsonl(GOOD, {"problem": " ", "answer": "1"}), "line 2: `problem` is empty"),
        (jsonl(GOOD) + b"{not json}\n", "line 2 is not JSON"),
        (jsonl(GOOD, [1, 2]), "line 2 is a list"),
        (b"PAR1 but not really", "damaged Parquet"),
        (gzip.compress(jsonl(GOOD), mtime=0)[:-9], "damaged gzip"),
    ],
)
def test_bad_row_is_refused_with_its_line_and_nothing_is_kept(
    client: TestClient, settings: Settings, store: Store, content: bytes, said: str
) -> None:
    files = {"file": ("rows.jsonl", content)}
    body = problem(client.post("/datasets", files=files), 422, "invalid_dataset")
    assert said in body["detail"]
    assert "rows.jsonl" in body["detail"]  # the sender's name for it, not ours
    assert str(settings.home) not in body["detail"]
    assert kept(settings) == []
    assert store.list_datasets() == ([], False)


@pytest.fixture
def limited(settings: Settings) -> Callable[[int], TestClient]:
    """An application that takes uploads of so many bytes."""
    return lambda size: connect(settings.model_copy(update={"max_upload_bytes": size}))


def test_upload_over_the_limit_is_413_with_or_without_a_length(
    limited: Callable[[int], TestClient], settings: Settings
) -> None:
    client = limited(1000)
    rows = jsonl(*[GOOD] * 100)
    problem(client.post("/datasets", content=rows), 413, "upload_too_large")
    problem(client.post("/datasets", content=iter([rows])), 413, "upload_too_large")
    problem(client.post("/datasets", files={"file": ("a", rows)}), 413, "upload_too_large")
    assert kept(settings) == []
    assert client.post("/datasets", content=jsonl(*[GOOD] * 10)).status_code == 201


def test_file_that_unpacks_to_more_than_the_limit_is_413(
    limited: Callable[[int], TestClient], settings: Settings
) -> None:
    client = limited(10_000)
    bomb = gzip.compress(jsonl(*[GOOD] * 10_000))
    assert len(bomb) < 10_000
    body = problem(client.post("/datasets", content=bomb), 413, "upload_too_large")
    assert "unpacks" in body["detail"]
    assert kept(settings) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_507_and_leaves_nothing(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(file: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(upload, "_flush", full)
    body = problem(client.post("/datasets", content=jsonl(GOOD)), 507, "disk_full")
    assert "space" in body["detail"]
    assert kept(settings) == []


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"Content-Type": "multipart/form-data"}, b"x", 400),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b"no boundary in here", 400),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{"cut',
            400,
        ),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nmine\r\n--b--\r\n',
            422,
        ),
    ],
)
def test_broken_form_is_refused_and_leaves_nothing(
    client: TestClient, settings: Settings, headers: dict[str, str], content: bytes, status: int
) -> None:
    problem(client.post("/datasets", content=content, headers=headers), status)
    assert kept(settings) == []


def test_two_files_in_one_form_are_refused(client: TestClient) -> None:
    files = [("file", ("a.jsonl", jsonl(GOOD))), ("file", ("b.jsonl", jsonl(GOOD)))]
    problem(client.post("/datasets", files=files), 422, "too_many_files")


def test_filename_never_decides_where_the_file_goes(client: TestClient, settings: Settings) -> None:
    files = {"file": ("../../../escaped.jsonl", jsonl(GOOD))}
    body = client.post("/datasets", files=files).json()
    assert body["filename"] == "escaped.jsonl"
    assert kept(settings) == [f"{body['id']}.jsonl"]


@pytest.mark.parametrize("how", ["query", "form"])
@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a\x00b", "x" * 201])
def test_name_that_lists_could_not_show_is_refused_with_the_field(
    client: TestClient, settings: Settings, how: str, name: str
) -> None:
    if how == "query":
        answer = client.post("/datasets", params={"name": name}, content=jsonl(GOOD))
    else:
        files = {"file": ("good.jsonl", jsonl(GOOD))}
        answer = client.post("/datasets", data={"name": name}, files=files)
    assert problem(answer, 422)["param"] == "name"
    assert kept(settings) == []


def test_filename_is_cut_to_what_lists_can_show(client: TestClient, settings: Settings) -> None:
    def send(filename: str) -> Any:
        head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'
        body = head.encode() + jsonl(GOOD) + b"\r\n--x--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        return client.post("/datasets", content=body, headers=headers)

    assert send("\x1b[31mred.jsonl").json()["name"] == "[31mred"
    assert send("y" * 240 + ".jsonl").json()["name"] == "y" * 200


def test_memory_does_not_grow_with_the_file(http: httpx.Client) -> None:
    import tracemalloc

    row = jsonl({"problem": "x" * 1000, "answer": "1"})

    def pieces() -> Any:
        for _ in range(120):
            yield row * 100  # 12 MB in all

    def peak() -> int:
        tracemalloc.start()
        try:
            response = http.post("/datasets", content=pieces())
            assert response.json()["rows"] == 12_000
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak() < 4_000_000


def test_datasets_are_listed_newest_first(client: TestClient) -> None:
    ids = [client.post("/datasets", content=jsonl(GOOD)).json()["id"] for _ in range(3)]
    page = client.get("/datasets", params={"limit": 2}).json()
    assert [d["id"] for d in page["data"]] == ids[:0:-1]
    rest = client.get("/datasets", params={"after": page["next"]}).json()
    assert [d["id"] for d in rest["data"]] == ids[:1]
    assert rest["has_more"] is False
    problem(client.get("/datasets/ds_gone"), 404, "unknown_dataset")


def test_remains_of_a_killed_upload_are_swept_and_a_running_one_is_not(tmp_path: Path) -> None:
    old, new, other = (tmp_path / n for n in (".upload-old", ".upload-new", "ds_1.jsonl"))
    for path in (old, new, other):
        path.write_text("x")
    day = time.time() - 86_400
    os.utime(old, (day, day))
    os.utime(other, (day, day))
    upload.sweep(tmp_path)
    assert not old.exists()
    assert new.exists()
    assert other.exists()


def test_the_same_file_has_the_same_hash_at_each_upload_and_in_each_form(
    client: TestClient,
) -> None:
    content = jsonl(*ROWS)
    answers = [
        client.post("/datasets", content=content),
        client.post("/datasets", content=content, params={"name": "other"}),
        client.post("/datasets", files={"file": ("a.jsonl", content)}),
    ]
    hashes = {answer.json()["sha256"] for answer in answers}
    assert hashes == {hashlib.sha256(content).hexdigest()}
    packed = gzip.compress(content, mtime=0)
    told = client.post("/datasets", content=packed).json()["sha256"]
    assert told == hashlib.sha256(packed).hexdigest()


def test_a_file_in_another_field_than_file_is_refused(client: TestClient) -> None:
    body = problem(client.post("/datasets", files={"other": ("a.jsonl", jsonl(GOOD))}), 422)
    assert (body["param"], body["allowed"]) == ("other", ["file", "name"])
    assert client.get("/datasets").json()["data"] == []


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("good.jsonl", "good"),
        ("good.jsonl.gz", "good"),
        ("v1.2.json.GZ", "v1.2"),
        ("good.ndjson", "good"),
        ("good.parquet", "good"),
        ("notes.txt", "notes"),
        (".jsonl", ".jsonl"),
    ],
)
def test_a_dataset_is_named_as_its_file_without_the_form(
    client: TestClient, filename: str, name: str
) -> None:
    dataset = client.post("/datasets", files={"file": (filename, jsonl(GOOD))}).json()
    assert (dataset["name"], dataset["filename"]) == (name, filename)


def test_lines_that_curl_has_joined_are_explained(client: TestClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    content = jsonl(*ROWS).replace(b"\n", b"")
    body = problem(client.post("/datasets", content=content, headers=headers), 422)
    assert "--data-binary @FILE" in body["detail"]
