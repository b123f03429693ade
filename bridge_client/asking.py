"""How a question is put to a base model: in its own chat template, as training and evaluation put a
problem by default; where it has none, as it is. The service alone knows whether there is one."""

from __future__ import annotations

from typing import Any

from bridge_client.client import Client
from bridge_client.errors import APIStatusError
from bridge_client.models import Adapter, Generation


def adapter_of(client: Client, name: str) -> Adapter | None:
    """The adapter of this name; None where it is a base model's."""
    if "/" in name:
        return None
    try:
        return client.adapter(name)
    except APIStatusError as error:
        if error.status == 404:
            return None
        raise


def is_base(client: Client, name: str) -> bool:
    """Is it a base model's name? One with an @, of a job or an alias is an adapter's."""
    if "@" in name or name.startswith("job_"):
        return False
    return adapter_of(client, name) is None


def lacks_template(error: APIStatusError) -> bool:
    """Was a conversation refused because the model has no chat template?"""
    return error.status in (400, 422) and "chat template" in error.detail


def turn(role: str, content: str) -> dict[str, str]:
    """What was said by whom."""
    return {"role": role, "content": content}


def generate(client: Client, prompt: str, model: str, **settings: Any) -> Generation:
    """The answer of a model that is named as `model`."""
    if not settings.get("raw") and is_base(client, model):
        try:
            return client.generate(model=model, messages=[turn("user", prompt)], **settings)
        except APIStatusError as error:
            if not lacks_template(error):
                raise
    return client.generate(prompt, model=model, **settings)
