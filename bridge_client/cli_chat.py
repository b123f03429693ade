"""`bridge chat`: ask a trained adapter and watch it write; two of them side by side, if wanted."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bridge_client.cli_jobs import connect
from bridge_client.client import Client
from bridge_client.errors import BridgeError

REFRESH = 12
"""Times a second that two answers are drawn anew."""


def chat(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="An adapter, an alias or a base model.")],
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="One question; without it they are read from the terminal."),
    ] = None,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--against", help="Another one, which answers beside it."),
    ] = None,
    conversation: Annotated[
        bool,
        typer.Option(
            "--conversation",
            help="Keep the turns before; for models with a chat template. Otherwise each question "
            "is put as in the adapter's training.",
        ),
    ] = False,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Longest answer, in tokens."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest.")] = 0.0,
    seed: Annotated[Optional[int], typer.Option(help="Of the sampling.")] = None,  # noqa: UP045
) -> None:
    """Ask an adapter and see the answer as it is written. An empty line or Ctrl-D ends it."""
    settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    client = connect(context)
    speakers = [
        _Speaker(client, name, settings, conversation) for name in (adapter, against) if name
    ]
    for question in _questions(prompt):
        if len(speakers) == 1:
            speakers[0].print(question)
        else:
            _side_by_side(speakers, question)


def _questions(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(shown)
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        yield line


class _Speaker:
    """One model and, in a conversation, what was said to and by it."""

    def __init__(
        self, client: Client, name: str, settings: dict[str, Any], conversation: bool
    ) -> None:
        self.name = name
        self._client, self._settings = client, settings
        self._turns: list[dict[str, str]] | None = [] if conversation else None

    def say(self, question: str) -> Iterator[str]:
        """The answer in pieces. A question that cannot be answered leaves no turn."""
        said = ""
        for chunk in self._client.stream(**self._asked(question), **self._settings):
            said += chunk.text
            yield chunk.text
        if self._turns is not None:
            self._turns += [_turn("user", question), _turn("assistant", said)]

    def _asked(self, question: str) -> dict[str, Any]:
        if self._turns is None:
            return {"model": self.name, "prompt": question}
        return {"model": self.name, "messages": [*self._turns, _turn("user", question)]}

    def print(self, question: str) -> None:
        """Writes the answer as it comes."""
        for piece in self.say(question):
            print(piece, end="", flush=True)
        print()


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _side_by_side(speakers: list[_Speaker], question: str) -> None:
    """Both write at the same time: in two columns on a terminal, else one below the other."""
    texts = [""] * len(speakers)
    errors: list[BridgeError] = []

    def follow(place: int) -> None:
        try:
            for piece in speakers[place].say(question):
                texts[place] += piece
        except BridgeError as error:
            errors.append(error)

    threads = [threading.Thread(target=follow, args=(i,), daemon=True) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    console = Console(highlight=False)
    if console.is_terminal:
        with Live(
            console=console,
            refresh_per_second=REFRESH,
            get_renderable=lambda: _columns(speakers, texts),
        ):
            for thread in threads:
                thread.join()
    else:
        for speaker, thread, place in zip(speakers, threads, range(len(texts)), strict=True):
            thread.join()
            print(f"{speaker.name}:\n{texts[place]}\n")
    if errors:
        raise errors[0]


def _columns(speakers: list[_Speaker], texts: list[str]) -> Table:
    table = Table(expand=True, box=None, pad_edge=False, header_style="bold")
    for speaker in speakers:
        table.add_column(speaker.name, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts))
    return table
