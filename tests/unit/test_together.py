"""What many ask for at once is looked up once, and never before they asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from service.generate.together import Together


class Registry:
    """What a name means; a look at it can be held up behind its reading."""

    def __init__(self) -> None:
        self.meaning = "old"
        self.looks = 0
        self.reading, self.go_on = threading.Event(), threading.Event()

    def look(self) -> str:
        self.looks += 1
        meaning = self.meaning
        self.reading.set()
        assert self.go_on.wait(120)
        return meaning


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not true():
            await asyncio.sleep(0.005)


def test_whoever_asks_after_a_change_hears_of_it_though_an_older_look_is_under_way() -> None:
    async def ask() -> None:
        registry, together = Registry(), Together[str]()
        first = asyncio.create_task(together.find("a", registry.look))
        await until(registry.reading.is_set)
        registry.meaning = "new"
        later = [asyncio.create_task(together.find("a", registry.look)) for _ in range(20)]
        await asyncio.sleep(0.05)
        assert registry.looks == 1, "they wait"
        registry.go_on.set()
        assert await first == "old"
        assert await asyncio.gather(*later) == ["new"] * 20
        assert registry.looks == 2, "all of them had one look"
        registry.meaning = "newer"
        assert await together.find("a", registry.look) == "newer", "nothing is kept"

    asyncio.run(ask())


def test_one_name_does_not_wait_for_another() -> None:
    async def ask() -> None:
        slow, quick, together = Registry(), Registry(), Together[str]()
        quick.go_on.set()
        waiting = asyncio.create_task(together.find("a", slow.look))
        await until(slow.reading.is_set)
        assert await together.find("b", quick.look) == "old"
        slow.go_on.set()
        assert await waiting == "old"

    asyncio.run(ask())


def test_who_hangs_up_takes_nothing_from_the_others() -> None:
    async def ask() -> None:
        registry, together = Registry(), Together[str]()
        tasks = [asyncio.create_task(together.find("a", registry.look)) for _ in range(3)]
        await until(registry.reading.is_set)
        tasks[0].cancel()
        registry.go_on.set()
        assert await asyncio.gather(*tasks[1:]) == ["old"] * 2
        assert registry.looks == 1

    asyncio.run(ask())


def test_a_failure_is_everybodys_who_asked_and_nobodys_who_comes_later() -> None:
    def fail() -> str:
        raise LookupError("gone")

    async def ask() -> None:
        together = Together[str]()
        found = await asyncio.gather(
            *(together.find("a", fail) for _ in range(3)), return_exceptions=True
        )
        assert [type(one) for one in found] == [LookupError] * 3
        assert await together.find("a", lambda: "there") == "there"
        with pytest.raises(LookupError):
            await together.find("a", fail)

    asyncio.run(ask())
