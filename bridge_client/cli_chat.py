"""`bridge chat`: ask a trained adapter and watch it write; two of them side by side, if wanted."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bridge_client import output
from bridge_client.asking import adapter_of, is_base, lacks_template, turn
from bridge_client.cli_jobs import connect
from bridge_client.client import Client
from bridge_client.errors import APIStatusError, BridgeError
from bridge_client.text import plain

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
            "is put as in the adapter's training, or into a base model's own chat template.",
        ),
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Each question as it is, without any template.")
    ] = False,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Longest answer, in tokens."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest.")] = 0.0,
    seed: Annotated[Optional[int], typer.Option(help="Of the sampling.")] = None,  # noqa: UP045
) -> None:
    """Ask an adapter and see the answer as it is written. An empty line or Ctrl-D ends it; from a
    pipe every line is read, and empty ones are left out."""
    if raw and conversation:
        raise typer.BadParameter("a conversation needs a template: leave out --raw")
    settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    settings["raw"] = raw or None
    client = connect(context)
    speakers = [
        _Speaker(client, name, settings, conversation) for name in (adapter, against) if name
    ]
    if not (conversation or raw):
        _choose_templates(client, speakers)
    failed = False
    for question in _questions(prompt):
        try:
            if len(speakers) == 1:
                speakers[0].print(question)
            else:
                _side_by_side(speakers, question)
        except BridgeError as error:
            if prompt is not None:
                raise
            output.complain(str(error))  # the next question may be answered
            failed = True
    if failed and not _at_terminal():
        raise typer.Exit(output.EXIT_FAILED)


def _questions(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    terminal = _at_terminal()
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is no text must not end them all
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line
        elif terminal:
            return


def _at_terminal() -> bool:
    """Does somebody type the questions?"""
    return sys.stdin.isatty()


class _Speaker:
    """One model and, in a conversation, what was said to and by it."""

    def __init__(
        self, client: Client, name: str, settings: dict[str, Any], conversation: bool
    ) -> None:
        self.name = name
        self._client, self._settings = client, settings
        self._turns: list[dict[str, str]] | None = [] if conversation else None
        self.template: dict[str, Any] | None = None
        """What questions to a base model are put into; the service does it for an adapter."""
        self._own_template = False

    def say(self, question: str) -> Iterator[str]:
        """The answer in pieces."""
        try:
            yield from self._answer(question)
        except APIStatusError as error:
            if not (self._own_template and lacks_template(error)):
                raise
            self.template, self._own_template = None, False
            yield from self._answer(question)

    def use_own_template(self) -> None:
        """Puts the questions to a base model into its own chat template, if it turns out to have
        one."""
        self.template, self._own_template = {"kind": "chat"}, True

    def _answer(self, question: str) -> Iterator[str]:
        for chunk in self._client.stream(**self._asked(question), **self._settings):
            yield chunk.text

    def remember(self, question: str, answer: str) -> None:
        """Leaves a turn, in a conversation. Only what all who were asked have answered leaves one:
        the next question then comes after the same turns."""
        if self._turns is not None:
            self._turns += [turn("user", question), turn("assistant", answer)]

    def _asked(self, question: str) -> dict[str, Any]:
        if self._turns is not None:
            return {"model": self.name, "messages": [*self._turns, turn("user", question)]}
        if self.template is None:
            return {"model": self.name, "prompt": question}
        text = question + (self.template.get("suffix") or "")
        system = self.template.get("system")
        if self.template.get("kind") == "plain":
            return {"model": self.name, "prompt": (system or "") + text}
        before = [] if system is None else [turn("system", system)]
        return {"model": self.name, "messages": [*before, turn("user", text)]}

    def print(self, question: str) -> None:
        """Writes the answer as it comes."""
        said = ""
        try:
            for piece in self.say(question):
                said += piece
                print(plain(piece, lines=True), end="", flush=True)
        finally:
            print()
        self.remember(question, said)


def _choose_templates(client: Client, speakers: list[_Speaker]) -> None:
    """Puts the questions to a base model into its own template or, beside an adapter, into that of
    the adapter, which the service puts the adapter's own into."""
    if len(speakers) == 1:
        if is_base(client, speakers[0].name):
            speakers[0].use_own_template()
        return
    found = {speaker: adapter_of(client, speaker.name) for speaker in speakers}
    adapters = [adapter for adapter in found.values() if adapter is not None]
    if not adapters:
        for speaker in speakers:
            speaker.use_own_template()
    if len(adapters) != 1:
        return
    (base,) = (speaker for speaker, adapter in found.items() if adapter is None)
    template = adapters[0].template or {}
    if template.get("kind") in ("plain", "chat"):
        base.template = template
    else:
        output.note(
            f"{base.name} gets each question as it is: nobody noted which template "
            f"{adapters[0].name} was trained with"
        )


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
            print(plain(f"{speaker.name}:\n{texts[place]}\n", lines=True))
    if errors:
        raise errors[0]
    for speaker, text in zip(speakers, texts, strict=True):
        speaker.remember(question, text)


def _columns(speakers: list[_Speaker], texts: list[str]) -> Table:
    table = Table(expand=True, box=None, pad_edge=False, header_style="bold")
    for speaker in speakers:
        table.add_column(speaker.name, ratio=1, overflow="fold")
    table.add_row(*(Text(plain(text, lines=True)) for text in texts))
    return table
