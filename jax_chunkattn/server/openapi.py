"""The server's own description of its interface, in OpenAPI's form."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from jax_chunkattn.server.schemas import ChatRequest, CompletionRequest, ScoreRequest

_REQUESTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/completions": (CompletionRequest, "Answers to prompts, whole or as server-sent events."),
    "/v1/chat/completions": (ChatRequest, "Answers to chats, whole or as server-sent events."),
    "/v1/score": (ScoreRequest, "How likely the model finds continuations of a prefix."),
}
_GETS = {
    "/v1/models": "The model that is served.",
    "/tree": "The live prefix tree, in counts.",
    "/health": "Whether the engine runs.",
    "/ready": "Whether it is warm, and takes requests.",
}
_REFUSALS = ("400", "401", "403", "404", "408", "413", "415", "421", "429", "503")

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def description(model: str) -> dict[str, Any]:
    """As JSON values; `model` is an example of the field."""
    _, schemas = models_json_schema(
        [(one, "validation") for one, _ in _REQUESTS.values()],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {}
    for path, (schema, about) in _REQUESTS.items():
        body = {"$ref": f"#/components/schemas/{schema.__name__}"}
        stream = {"text/event-stream": {"schema": {"type": "string"}}}
        paths[path] = {
            "post": {
                "summary": about,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": body}},
                },
                "responses": _responses({} if path == "/v1/score" else stream),
            }
        }
    for path, about in _GETS.items():
        paths[path] = {"get": {"summary": about, "responses": _responses({})}}
    paths["/metrics"] = {
        "get": {
            "summary": "For Prometheus.",
            "responses": {**_responses({}), "200": {
                "description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}
            }},
        }
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "jax_chunkattn",
            "version": "1",
            "description": f"{model!r} behind OpenAI's interface.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _responses(more: dict[str, Any]) -> dict[str, Any]:
    refusal = {
        "description": "Why not, in OpenAI's shape.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    done = {"application/json": {"schema": {"type": "object"}}, **more}
    return {
        "200": {"description": "Done.", "content": done},
        **dict.fromkeys(_REFUSALS, refusal),
    }
