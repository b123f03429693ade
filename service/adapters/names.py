"""From a name a person writes to the adapter it means, or to the names they may have meant."""

from __future__ import annotations

from collections.abc import Sequence

from bridge_engine.spec.errors import nearest_name
from service.errors import ApiError
from service.store import AdapterRow, NotFound, Store
from service.store.ids import nearest_id

_SUGGESTED_FROM = 200
"""So many of the newest adapters are looked at for a name that is like the given one."""


def find_adapter(store: Store, name: str, param: str = "adapter") -> AdapterRow:
    """The adapter that `JOB@STEP`, `JOB@best`, `JOB@latest`, `JOB` or an alias means; `ApiError`
    404 with the nearest name where there is none, which was given as `param`."""
    try:
        return look_up(store, name)
    except NotFound as error:
        near = nearest(store, name)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ApiError(
            404,
            "unknown_adapter",
            error.message + hint,
            param=param,
            given=name,
            nearest=near,
        ) from None


def look_up(store: Store, name: str) -> AdapterRow:
    """The adapter that a name means; raises NotFound, for names no database takes too."""
    if not name.isascii() or not name.isprintable():
        raise NotFound("adapter", name)
    return store.adapter(name)


def nearest(store: Store, name: str) -> str | None:
    """The adapter that whoever wrote this may have meant."""
    return nearest_of(name, newest(store))


def nearest_of(name: str, names: Sequence[str]) -> str | None:
    """Which of them may have been meant: of jobs' ids, which are all alike, only one that is nearly
    the same."""
    return nearest_id(name, names) if name.startswith("job_") else nearest_name(name, names)


def newest(store: Store) -> list[str]:
    """Aliases, and names of the newest adapters and of their jobs before them."""
    names = [row.name for row in store.adapters(limit=_SUGGESTED_FROM)[0]]
    aliases = [alias.name for alias in store.aliases()]
    return [*aliases, *dict.fromkeys(name.partition("@")[0] for name in names), *names]
