"""A problem as the prompt an adapter was trained on.

The same rules as `bridge_engine.data.template`, which works on tokens and therefore needs a
tokenizer; here the inference process has it, so a plain template is sent as text and a chat one as
messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TODAY = "26 Jul 2024"
"""The day that a chat template is told, where it tells the day (Llama's `date_string`): a prompt
must be tomorrow what it was in training."""


def adapter_template(
    card: Mapping[str, Any], spec_template: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The template in force, from the adapter's `bridge.json`; the spec's where there is none."""
    template = card.get("template")
    return template if isinstance(template, dict) else spec_template


def templated(problem: str, template: Mapping[str, Any]) -> dict[str, Any]:
    """{"prompt": …} or {"messages": […]}: what is sent to the backend."""
    system = template.get("system")
    text = problem + (template.get("suffix") or "")
    if template.get("kind") == "chat":
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return {"messages": messages}
    return {"prompt": (system or "") + text}
