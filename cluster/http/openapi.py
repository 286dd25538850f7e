"""The OpenAPI document of the HTTP API, made from the pydantic models that parse its requests."""

import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from forecache.cluster.http.openai_types import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    PinRequest,
    TokenizeRequest,
)

_SESSION = "/v1/sessions/{session_id}"
_BODIES: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatCompletionRequest, "Answers to messages"),
    "/v1/completions": (CompletionRequest, "Continuations of prompts"),
    "/v1/tokenize": (TokenizeRequest, "Token ids of a prompt or of messages"),
    "/v1/detokenize": (DetokenizeRequest, "Text of token ids"),
    _SESSION: (PinRequest, "Keep a session's chunks in memory"),
}
_READS = {
    "/v1/models": "The model that is served",
    "/v1/models/{name}": "The model of this name",
    _SESSION: "The stored chunks of a session",
    "/health": "This process is up",
    "/ready": "Requests can be served; 503 while they can't",
    "/metrics": "Prometheus series of the process that answers",
    "/metrics/targets": "Every process that serves series, for Prometheus' HTTP service discovery",
    "/metrics/cluster": "Series of all processes",
}

_ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
}


def document(model_name: str, version: str) -> dict[str, Any]:
    """The document (OpenAPI 3.1) of a server of ``model_name``."""
    models = [(model, "validation") for model, _ in _BODIES.values()]
    _, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components = {**schemas["$defs"], "Error": _ERROR}
    for model, _ in _BODIES.values():
        if "model" in model.model_fields:
            components[model.__name__]["properties"]["model"] = {"type": "string", "enum": [model_name]}
    failed = _content({"$ref": "#/components/schemas/Error"}, "What was wrong")
    paths: dict[str, Any] = {}
    for path, (model, summary) in _BODIES.items():
        body = _content({"$ref": f"#/components/schemas/{model.__name__}"}, None)
        streamed = "; server-sent events with `stream`" if "stream" in model.model_fields else ""
        answers = {"200": {"description": f"The answer{streamed}"}, "default": failed}
        required = any(field.is_required() for field in model.model_fields.values())
        request_body = {**body, "required": required}
        paths[path] = {"post": {"summary": summary, "requestBody": request_body, "responses": answers}}
    for path, summary in _READS.items():
        answers = {"200": {"description": summary}, "default": {"description": "Not available now"}}
        paths.setdefault(path, {})["get"] = {"summary": summary, "responses": answers}
    deleted = {"200": {"description": "The session is deleted"}, "default": failed}
    paths[_SESSION]["delete"] = {"summary": "Delete a session: unpin and forget it", "responses": deleted}
    for path, operations in paths.items():
        if named := re.findall(r"{(\w+)}", path):
            operations["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                for name in named
            ]
    return {
        "openapi": "3.1.0",
        "info": {"title": "forecache", "version": version},
        "paths": paths,
        "security": [{"key": []}, {}],  # a key is needed only if the server has a file of keys
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _content(schema: dict[str, Any], description: str | None) -> dict[str, Any]:
    described = {} if description is None else {"description": description}
    return {**described, "content": {"application/json": {"schema": schema}}}
