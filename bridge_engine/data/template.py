"""How a problem becomes the tokens of a prompt, and a demonstration the tokens to imitate.

A model may end an answer in more than one way. A base model's tokenizer has an end of text
(`<|endoftext|>`), and its chat template, if it has one, ends a turn with another token
(`<|im_end|>`). A demonstration ends as the template in force ends an answer, and sampling stops at
either: a policy that was taught one and is stopped by the other alone would run on for ever.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from bridge_engine.data.example import Example
from bridge_engine.errors import EngineError
from bridge_engine.forward.sequences import TokenSequence
from bridge_engine.spec.train import TemplateSpec

_TODAY = datetime(2024, 7, 26)
"""The day for templates that tell the date (Llama's do): a prompt must be the same tomorrow, or a
resumed run would not be the run that was interrupted."""
_PROBE = "The answer is 4711."
"""An answer that no template contains."""


def resolve_template(spec: TemplateSpec, tokenizer: Any) -> TemplateSpec:
    """The template with `auto` decided: chat where the tokenizer has a chat template."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if spec.kind == "chat" and not has_chat:
        raise EngineError(
            "template.kind is chat, but this model's tokenizer has no chat template; use plain, "
            "with what stands before and behind a problem in template.system and template.suffix",
            code="no_chat_template",
            param="template.kind",
        )
    if spec.kind != "auto":
        return spec
    return spec.model_copy(update={"kind": "chat" if has_chat else "plain"})


def render_chat(messages: list[dict[str, str]], tokenizer: Any, *, answered: bool = False) -> str:
    """The conversation as the tokenizer's chat template writes it, up to where the answer begins
    (or, `answered`, as it stands when its last message is the answer). The same on every day."""
    text: str = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=not answered,
        strftime_now=_TODAY.strftime,
    )
    return text


def prompt_tokens(problem: str, template: TemplateSpec, tokenizer: Any) -> list[int]:
    """Token ids of the prompt of a problem. `template.kind` is `plain` or `chat`.

    A beginning-of-sequence token is there once if the model's tokenizer or template writes one: the
    tokenizer adds it to a plain prompt, and a chat template writes its own.

    EngineError (`chat_template_refused`) where the chat template takes no such conversation: some
    know no system message.
    """
    text = problem + template.suffix
    if template.kind == "chat":
        messages = [{"role": "user", "content": text}]
        if template.system is not None:
            messages.insert(0, {"role": "system", "content": template.system})
        try:
            rendered = render_chat(messages, tokenizer)
        except TemplateError as error:
            param, remedy = (
                ("template.kind", "use template.kind: plain")
                if template.system is None
                else ("template.system", "leave template.system out")
            )
            raise EngineError(
                f"this model's chat template refuses the prompt: {error}; {remedy}",
                code="chat_template_refused",
                param=param,
            ) from None
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return list(tokenizer((template.system or "") + text)["input_ids"])


def demonstration(
    example: Example, template: TemplateSpec, tokenizer: Any, eos_id: int
) -> TokenSequence:
    """The prompt and the expert's solution with its ending: what the chat template ends an answer
    with, and `eos_id` for a plain prompt or a template that ends answers with nothing."""
    assert example.solution is not None
    solution = tokenizer(example.solution, add_special_tokens=False)["input_ids"]
    ending = answer_ending(tokenizer) if template.kind == "chat" else []
    return TokenSequence(
        prompt=prompt_tokens(example.problem, template, tokenizer),
        completion=[*solution, *(ending or [eos_id])],
    )


def answer_ending(tokenizer: Any) -> list[int]:
    """What the chat template writes after an answer, up to and with the first special token.

    Read off the template itself: `[<|im_end|>]` for ChatML, `[<|eot_id|>]` for Llama's headers,
    `[▁, </s>]` for one that leaves a space before it. Empty where there is no template, or no
    special token behind the answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        rendered = render_chat(messages, tokenizer, answered=True)
    except TemplateError:  # it refuses such a conversation, and so says nothing about answers
        return []
    _, found, rest = rendered.rpartition(_PROBE)
    ids: list[int] = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for place, token in enumerate(ids):
        if token in special:
            return ids[: place + 1]
    return []


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the tokenizer's own first, then what the model's
    generation config names, then what its chat template ends an answer with."""
    configured = model.generation_config.eos_token_id
    found = [
        tokenizer.eos_token_id,
        *(configured if isinstance(configured, list) else [configured]),
        *answer_ending(tokenizer)[-1:],
    ]
    ids = list(dict.fromkeys(token for token in found if token is not None))
    if not ids:
        raise EngineError(
            "the model names no token that ends an answer, so none would ever end: in a copy of "
            "its folder under BRIDGE_MODEL_DIR set eos_token in tokenizer_config.json (or "
            "eos_token_id in generation_config.json) to one that its tokenizer knows, and use the "
            "folder's name",
            code="no_eos",
            param="model",
        )
    return ids
