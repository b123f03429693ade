"""Streamed answers in the SDK and on the command line: whole, broken off, side by side."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from bridge_client import APIStatusError, AsyncClient, Client, ConnectionError, _core, cli_chat
from bridge_client.cli import app
from tests.client.flaky import flaky, hang_up, say, stream


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "jittered", lambda delay: 0.01)


def chunk(text: str, finish: str | None = None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    body = {"id": "gen_1", "adapter": "job_1@2", "model": "m", "choices": [choice]}
    return f"data: {json.dumps(body)}\n\n"


WHOLE = chunk("one ") + chunk("two", "stop") + "data: [DONE]\n\n"
PROBLEM = {"status": 502, "code": "inference_interrupted", "detail": "stopped in the middle"}
BROKEN = chunk("one ") + f"event: error\ndata: {json.dumps(PROBLEM)}\n\n"


def sync_texts(url: str) -> list[str]:
    with Client(url) as client:
        return [c.text for c in client.stream("1+1?", adapter="job_1", seed=7)]


def async_texts(url: str) -> list[str]:
    async def run() -> list[str]:
        async with AsyncClient(url) as client:
            return [c.text async for c in client.stream("1+1?", adapter="job_1", seed=7)]

    return asyncio.run(run())


both = pytest.mark.parametrize("texts", [sync_texts, async_texts])


@both
def test_a_stream_gives_the_answer_in_pieces(texts: Any) -> None:
    with flaky(stream(WHOLE)) as server:
        assert texts(server.url) == ["one ", "two"]
    body = json.loads(server.requests[0][3])
    assert body == {"prompt": "1+1?", "adapter": "job_1", "seed": 7, "stream": True}


@both
def test_a_service_that_is_busy_is_asked_again_before_the_stream_begins(texts: Any) -> None:
    busy = say(503, '{"code": "busy"}', Retry_After="0.05")
    with flaky(busy, stream(WHOLE)) as server:
        assert texts(server.url) == ["one ", "two"]
    assert len(server.requests) == 2


@both
@pytest.mark.parametrize(
    "answer", [stream(chunk("one ")), stream(chunk("one "), torn=True), hang_up]
)
def test_a_stream_without_its_end_is_an_error_and_is_not_asked_again(
    texts: Any, answer: Any
) -> None:
    with flaky(answer) as server, pytest.raises(ConnectionError, match="not whole"):
        texts(server.url)
    assert len(server.requests) == 1


@both
def test_a_stream_that_says_why_it_stops_raises_that(texts: Any) -> None:
    with flaky(stream(BROKEN)) as server, pytest.raises(APIStatusError) as stopped:
        texts(server.url)
    assert stopped.value.code == "inference_interrupted"


def chat(server: Any, *arguments: str, typed: str = "") -> Any:
    return CliRunner().invoke(app, ["--url", server.url, "chat", *arguments], input=typed)


def test_chat_writes_the_answer() -> None:
    with flaky(stream(WHOLE)) as server:
        result = chat(server, "job_1", "1+1?")
    assert result.exit_code == 0, result.output
    assert result.output == "one two\n"


def test_chat_reads_questions_and_keeps_the_turns_of_a_conversation() -> None:
    with flaky(stream(WHOLE)) as server:
        result = chat(server, "job_1", "--conversation", typed="first\nsecond\n")
    assert result.output == "one two\none two\n"
    asked = [json.loads(body)["messages"] for _, _, _, body in server.requests]
    assert [[turn["content"] for turn in turns] for turns in asked] == [
        ["first"],
        ["first", "one two", "second"],
    ]


def test_chat_reads_a_pipe_to_its_end_and_a_terminal_to_an_empty_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed = "\nfirst\n\n  \nsecond\n"
    with flaky(stream(WHOLE)) as server:
        assert chat(server, "job_1", typed=typed).output == "one two\none two\n"
        assert [question["prompt"] for question in asked(server)] == ["first", "second"]
    monkeypatch.setattr(cli_chat, "_at_terminal", lambda: True)
    with flaky(stream(WHOLE)) as server:
        assert chat(server, "job_1", typed=typed).exit_code == 0
        assert server.requests == []
        chat(server, "job_1", typed=typed[1:])
        assert [question["prompt"] for question in asked(server)] == ["first"]


@pytest.mark.parametrize("terminal", [False, True])
def test_chat_goes_on_after_a_question_that_failed_which_leaves_no_turn(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_chat, "_at_terminal", lambda: terminal)
    refused = say(422, '{"code": "too_long", "detail": "the prompt is too long"}')
    with flaky(stream(WHOLE), refused, stream(BROKEN), stream(WHOLE)) as server:
        result = chat(server, "job_1", "--conversation", typed="first\nlong\ntorn\nlast\n")
    assert result.stdout.replace("> ", "") == "one two\n\none \none two\n"
    assert "the prompt is too long" in result.stderr
    assert "stopped in the middle" in result.stderr
    assert [turn["content"] for turn in asked(server)[-1]["messages"]] == [
        "first",
        "one two",
        "last",
    ]
    assert result.exit_code == (0 if terminal else 1), "who reads no screen is told by the status"


def test_a_single_question_that_fails_ends_chat_with_its_status() -> None:
    with flaky(stream(BROKEN)) as server:
        assert chat(server, "job_1", "1+1?").exit_code == 1


def test_two_who_are_asked_keep_the_same_turns() -> None:
    """Of a question that one of them did not answer, neither keeps any."""

    with flaky(stream(BROKEN), stream(WHOLE)) as server:
        both_asked = ("job_1", "--against", "other", "--conversation")
        result = chat(server, *both_asked, typed="first\nsecond\n")
    assert result.exit_code == 1
    turns = [[turn["content"] for turn in body["messages"]] for body in asked(server)]
    assert turns == [["first"], ["first"], ["second"], ["second"]]


def asked(server: Any) -> list[dict[str, Any]]:
    """The questions, without what else the service was asked."""
    return [json.loads(body) for method, _, _, body in server.requests if method == "POST"]


def knowing(**templates: Any) -> Any:
    """A service that knows these adapters, and answers whatever it is asked."""

    def answer(handler: Any) -> None:
        _, _, name = handler.path.rpartition("/adapters/")
        if handler.command == "POST":
            stream(WHOLE)(handler)
        elif name in templates:
            say(200, json.dumps({"name": name, "template": templates[name]}))(handler)
        else:
            say(404, '{"code": "unknown_adapter", "detail": "there is none"}')(handler)

    return answer


PLAIN = {"kind": "plain", "system": "Sum: ", "suffix": " ="}
CHAT = {"kind": "chat", "system": "think", "suffix": "!"}


@pytest.mark.parametrize("names", [("job_1", "bridge-tiny"), ("owner/name", "job_1")])
@pytest.mark.parametrize(
    ("template", "put"),
    [
        (PLAIN, {"prompt": "Sum: 1+1? ="}),
        ({"kind": "plain"}, {"prompt": "1+1?"}),
        (
            CHAT,
            {
                "messages": [
                    {"role": "system", "content": "think"},
                    {"role": "user", "content": "1+1?!"},
                ]
            },
        ),
        ({"kind": "chat"}, {"messages": [{"role": "user", "content": "1+1?"}]}),
    ],
)
def test_a_base_beside_an_adapter_is_asked_as_the_adapter_was_trained(
    template: dict[str, Any], put: dict[str, Any], names: tuple[str, str]
) -> None:
    one, other = names
    with flaky(knowing(job_1=template)) as server:
        result = chat(server, one, "1+1?", "--against", other)
    assert result.output == f"{one}:\none two\n\n{other}:\none two\n\n"
    found = {body.pop("model"): body for body in asked(server)}
    common = {"temperature": 0.0, "stream": True}
    base = other if one == "job_1" else one
    assert found == {"job_1": {"prompt": "1+1?", **common}, base: {**put, **common}}


NO_TEMPLATE = say(422, '{"code": "cannot_generate", "detail": "\'m\' has no chat template"}')


def speaking(*, template: bool) -> Any:
    """A service without adapters, whose base model has a chat template or none."""

    def answer(handler: Any) -> None:
        if handler.command == "GET":
            say(404, '{"code": "unknown_adapter"}')(handler)
        elif not template and b"messages" in handler.body:
            NO_TEMPLATE(handler)
        elif handler.path == "/generate" and b'"stream"' in handler.body:
            stream(WHOLE)(handler)
        else:
            say(200, '{"choices": [{"text": "one two"}]}')(handler)

    return answer


MESSAGES = [[{"role": "user", "content": text}] for text in ("first", "second")]


def test_a_base_is_asked_in_its_chat_template_where_it_has_one() -> None:
    for name in ("base", "owner/base"):
        with flaky(speaking(template=True)) as server:
            result = chat(server, name, typed="first\nsecond\n")
        assert result.output == "one two\none two\n"
        assert [body.get("messages") for body in asked(server)] == MESSAGES
    with flaky(speaking(template=True)) as server:
        result = generated(server, "first", "--model", "base")
    assert result.output == "one two\n"
    assert [body.get("messages") for body in asked(server)] == MESSAGES[:1]


def test_a_base_without_one_is_asked_as_it_is_and_tried_only_once() -> None:
    with flaky(speaking(template=False)) as server:
        result = chat(server, "base", typed="first\nsecond\n")
    assert result.output == "one two\none two\n"
    assert [body.get("prompt") for body in asked(server)] == [None, "first", "second"]
    with flaky(speaking(template=False)) as server:
        result = generated(server, "first", "--model", "base")
    assert result.output == "one two\n"
    assert [body.get("prompt") for body in asked(server)] == [None, "first"]


def test_raw_questions_go_in_as_they_are() -> None:
    with flaky(speaking(template=True)) as server:
        assert chat(server, "base", "first", "--raw").exit_code == 0
        assert chat(server, "base", "first", "--raw", "--against", "job_1").exit_code == 0
        assert generated(server, "first", "--model", "base", "--raw").exit_code == 0
        assert chat(server, "base", "first", "--raw", "--conversation").exit_code == 2
    assert {(body.get("prompt"), body["raw"]) for body in asked(server)} == {("first", True)}


def test_an_adapter_is_asked_as_it_was_trained_under_either_option() -> None:
    with flaky(say(200, '{"name": "tutor@5", "choices": [{"text": "x"}]}')) as server:
        generated(server, "first", "--model", "tutor")
        generated(server, "first", "--adapter", "tutor")
    assert [body.get("prompt") for body in asked(server)] == ["first", "first"]


def generated(server: Any, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["--url", server.url, "generate", *arguments])


def test_two_adapters_are_each_asked_as_they_were_trained() -> None:
    with flaky(knowing(job_1=PLAIN, job_2=CHAT)) as server:
        chat(server, "job_1", "1+1?", "--against", "job_2")
    assert [body["prompt"] for body in asked(server)] == ["1+1?", "1+1?"]


def test_a_base_whose_adapters_template_nobody_noted_is_said_to_be_asked_otherwise() -> None:
    with flaky(knowing(job_1={"kind": "auto"})) as server:
        result = chat(server, "job_1", "1+1?", "--against", "bridge-tiny")
    assert result.exit_code == 0
    assert "bridge-tiny gets each question as it is" in result.stderr
    assert [body["prompt"] for body in asked(server)] == ["1+1?", "1+1?"]


def test_chat_that_breaks_off_says_so_and_fails() -> None:
    with flaky(stream(BROKEN)) as server:
        result = chat(server, "job_1", "1+1?", "--against", "other", "--conversation")
    assert result.exit_code == 1
    assert "stopped in the middle" in result.output
