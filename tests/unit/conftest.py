from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.places import places as places


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes with one: what is small gains nothing by more, and bits depend on how many."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
