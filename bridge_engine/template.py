"""How a problem becomes the tokens of a prompt, and a demonstration the tokens to imitate."""

from __future__ import annotations

from typing import Any

from bridge_engine.data.example import Example
from bridge_engine.errors import EngineError
from bridge_engine.sequences import TokenSequence
from bridge_engine.spec import TemplateSpec


def resolve_template(spec: TemplateSpec, tokenizer: Any) -> TemplateSpec:
    """The template with `auto` decided: chat where the tokenizer has a chat template."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if spec.kind == "chat" and not has_chat:
        raise EngineError(
            "template.kind is chat, but this model's tokenizer has no chat template; use plain",
            code="no_chat_template",
            param="template.kind",
        )
    if spec.kind != "auto":
        return spec
    return spec.model_copy(update={"kind": "chat" if has_chat else "plain"})


def prompt_tokens(problem: str, template: TemplateSpec, tokenizer: Any) -> list[int]:
    """Token ids of the prompt of a problem. `template.kind` is `plain` or `chat`."""
    text = problem + template.suffix
    if template.kind == "chat":
        messages = [{"role": "user", "content": text}]
        if template.system is not None:
            messages.insert(0, {"role": "system", "content": template.system})
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return list(tokenizer((template.system or "") + text)["input_ids"])


def demonstration(
    example: Example, template: TemplateSpec, tokenizer: Any, eos_id: int
) -> TokenSequence:
    """The prompt and the expert's solution with its EOS."""
    assert example.solution is not None
    solution = tokenizer(example.solution, add_special_tokens=False)["input_ids"]
    return TokenSequence(
        prompt=prompt_tokens(example.problem, template, tokenizer), completion=[*solution, eos_id]
    )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion, the tokenizer's own first."""
    ids: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    configured = model.generation_config.eos_token_id
    for token in configured if isinstance(configured, list) else [configured]:
        if token is not None and token not in ids:
            ids.append(token)
    if not ids:
        raise EngineError(
            "the model's tokenizer has no end-of-sequence token", code="no_eos", param="model"
        )
    return ids
