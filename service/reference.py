"""/docs: the API's description as one page that needs nothing from elsewhere, neither the internet
nor scripts. Swagger UI, which loads itself from a CDN, is at /docs/swagger."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)
SWAGGER = "/docs/swagger"


@router.get("/docs")
def reference(request: Request) -> HTMLResponse:
    """The page."""
    app: FastAPI = request.app
    return HTMLResponse("".join(_page(app.openapi())))


@router.get(SWAGGER)
def swagger(request: Request) -> HTMLResponse:
    """For trying requests out from a browser that is on the internet."""
    return get_swagger_ui_html(openapi_url="/openapi.json", title="Bridge")


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    about = document["info"]
    title = f"{escape(about['title'])} {escape(about['version'])}"
    yield f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>{_STYLE}"
    yield f"<h1>{title}</h1>{_prose(about['description'])}"
    yield "<p><a href=/openapi.json>openapi.json</a> · "
    yield f"<a href={SWAGGER}>Swagger UI</a> (needs the internet)</p>"
    for tag in document["tags"]:
        yield f"<h2>{escape(tag['name'])}</h2>{_prose(tag['description'])}"
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation.get("tags", ()):
                    yield from _operation(method, path, operation)
    yield "<h2>Bodies</h2>"
    for name, schema in sorted(document["components"]["schemas"].items()):
        # Behind the summary, where a link to it opens the rest.
        id = escape(name)
        yield f"<details><summary><b>{id}</b></summary><a id={id}></a>"
        yield _prose(schema.get("description", ""))
        required = schema.get("required", ())
        properties = schema.get("properties", {}).items()
        yield from _table(
            (field, _type(of) + (" (required)" if field in required else ""), of)
            for field, of in properties
        )
        yield "</details>"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    id = escape(operation["operationId"])
    yield f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> "
    yield f"{escape(operation['summary'])}</summary><a id={id}></a>"
    yield _prose(operation.get("description", ""))
    yield from _table(
        (part["name"], f"{_type(part.get('schema', {}))} ({part['in']})", part)
        for part in operation.get("parameters", ())
    )
    bodies = operation.get("requestBody", {}).get("content", {})
    for media_type, body in bodies.items():
        yield f"<p>Takes <code>{escape(media_type)}</code>: {_type(body.get('schema', {}))}</p>"
    yield "<ul>"
    for status, answer in operation["responses"].items():
        kinds = [_type(a.get("schema", {})) for a in answer.get("content", {}).values()]
        shown = f": {' or '.join(kinds)}" if any(kinds) else ""
        yield f"<li>{escape(status)} {_inline(answer['description'])}{shown}</li>"
    yield "</ul></details>"


def _table(rows: Iterator[tuple[str, str, Mapping[str, Any]]]) -> Iterator[str]:
    shown = [
        f"<tr><td><code>{escape(name)}</code><td>{kind}<td>{_inline(of.get('description', ''))}"
        for name, kind, of in rows
    ]
    if shown:
        yield f"<table>{''.join(shown)}</table>"


def _type(schema: Mapping[str, Any]) -> str:
    """What a value is, in few words; other bodies by their names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if choices := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return " or ".join(dict.fromkeys(filter(None, map(_type, choices))))
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)
    kind = escape(str(schema.get("type", "")))
    return f"{kind} of {_type(schema['items']) or 'any'}" if "items" in schema else kind


def _prose(text: str) -> str:
    return "".join(f"<p>{_inline(part)}</p>" for part in text.split("\n\n") if part.strip())


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text.strip()))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)


_STYLE = """<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
details { margin: .3rem 0; padding: .3rem .6rem; border: 1px solid #8884; border-radius: 4px }
summary { cursor: pointer } td { padding: .1rem .8rem .1rem 0; vertical-align: top }
:root { color-scheme: light dark }
</style>"""
