"""`ResponseFormat` and `StructuredOutputs` are the two ways in which a client sets the form of an answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from services.engine.contract.sampling_params import Grammar, GrammarKind
from services.gateway.chat import grammars
from services.gateway.generation_request import AnswerFormat
from services.gateway.request_body import BaseBody, only


class StructuredOutputs(BaseBody):
    """A `StructuredOutputs` holds the format that the answer must match; the client must set exactly one format.

    The fields are the same as in vLLM's API.
    """

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_any_whitespace: Annotated[bool | None, only(False)] = None
    disable_additional_properties: Annotated[bool | None, only(False)] = None
    whitespace_pattern: Annotated[str | None, only()] = None
    structural_tag: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        formats = (self.json_, self.json_object, self.regex, self.choice, self.grammar)
        if sum(format_ is not None for format_ in formats) != 1:
            raise ValueError("must hold exactly one of json, json_object, regex, choice and grammar")
        return self

    def answer_format(self) -> AnswerFormat:
        param = "structured_outputs"
        if self.json_ is not None:
            schema = self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)
            return AnswerFormat(Grammar(GrammarKind.JSON_SCHEMA, schema), f"{param}.json")
        if self.regex is not None:
            return AnswerFormat(Grammar(GrammarKind.REGEX, self.regex), f"{param}.regex")
        if self.choice is not None:
            return AnswerFormat(grammars.any_of(self.choice), f"{param}.choice")
        if self.grammar is not None:
            return AnswerFormat(Grammar(GrammarKind.LARK, self.grammar), f"{param}.grammar")
        return AnswerFormat(Grammar(GrammarKind.JSON_OBJECT), f"{param}.json_object")


class JsonSchema(BaseBody):
    name: str | None = None
    description: str | None = None  # the description is accepted but has no effect
    schema_: dict[str, Any] | None = Field(alias="schema", default=None)
    strict: bool | None = None  # the field has no effect, because every schema is enforced


class ResponseFormat(BaseBody):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(alias="schema", default=None)  # for type json_object, as in llama.cpp

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("must hold a json_schema if, and only if, its type is 'json_schema'")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("may hold a schema only if its type is 'json_object'")
        return self

    def answer_format(self) -> AnswerFormat | None:
        param = "response_format"
        if self.json_schema is not None:
            schema = json.dumps(self.json_schema.schema_ or {})
            return AnswerFormat(Grammar(GrammarKind.JSON_SCHEMA, schema), f"{param}.json_schema.schema")
        if self.schema_ is not None:
            return AnswerFormat(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(self.schema_)), f"{param}.schema")
        return AnswerFormat(Grammar(GrammarKind.JSON_OBJECT), param) if self.type == "json_object" else None
