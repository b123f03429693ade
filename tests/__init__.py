"""What holds for all tests. Not in a `conftest.py`: pytest-alembic takes one in this folder for its
own."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same examples each time: what they find, whoever changes something finds, and not who comes by
# later. And no clocks: a busy machine is slow at making an example and at trying it.
settings.register_profile(
    "bridge", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("bridge")
