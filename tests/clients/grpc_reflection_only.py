"""These checks call the gRPC API with nothing but grpcio, protobuf and what the server's reflection tells."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import grpc
from checks import MODEL, QUESTION, WEATHER_SCHEMA, check_weather, error_of, run_checks
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "expertmesh.inference.v1.Inference"


class ReflectedService:
    """A `ReflectedService` calls the methods of a gRPC service with JSON in both directions."""

    def __init__(self, channel: grpc.Channel, name: str) -> None:
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self._channel, self._service = channel, DescriptorPool(self.database).FindServiceByName(name)

    def call(self, method: str, request: dict[str, Any]) -> Any:
        """Return the response as JSON, or a list of responses if the method streams."""
        found = self._service.FindMethodByName(method)
        path = f"/{self._service.full_name}/{method}"
        message = json_format.ParseDict(request, GetMessageClass(found.input_type)())
        start = self._channel.unary_stream if found.server_streaming else self._channel.unary_unary
        rpc = start(
            path,
            request_serializer=lambda one: one.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        answer = rpc(message, timeout=60)
        if found.server_streaming:
            return [json_format.MessageToDict(one, preserving_proto_field_name=True) for one in answer]
        return json_format.MessageToDict(answer, preserving_proto_field_name=True)


def reflected(name: str = SERVICE) -> ReflectedService:
    return ReflectedService(grpc.insecure_channel(sys.argv[2]), name)


CHAT = {"messages": [{"role": "user", "content": QUESTION}]}
ASK: dict[str, Any] = {"model": MODEL, "chat": CHAT, "sampling": {"max_tokens": 20, "temperature": 0}}


def services(_: str) -> None:
    names = set(reflected().database.get_services())
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"} <= names, names
    for name in names:
        assert reflected(name).database.FindFileContainingSymbol(name).service, name


def health(_: str) -> None:
    assert reflected("grpc.health.v1.Health").call("Check", {"service": SERVICE}) == {"status": "SERVING"}


def models(_: str) -> None:
    answer = reflected().call("ListModels", {})
    assert MODEL in str(answer), answer


def generate_and_stream(_: str) -> None:
    whole = reflected().call("Generate", ASK)["choices"][0]
    chunks = reflected().call("GenerateStream", ASK)
    assert "".join(chunk["choice"].get("text", "") for chunk in chunks if "choice" in chunk) == whole["text"]


def forced_tool(_: str) -> None:
    tool = {"name": "get_weather", "parameters": json.dumps(WEATHER_SCHEMA)}
    chat = {**CHAT, "tools": [tool], "tool_choice": {"mode": "MODE_REQUIRED"}, "parallel_tool_calls": False}
    answer = reflected().call("Generate", {**ASK, "chat": chat, "sampling": {"max_tokens": 200}})
    check_weather(answer["choices"][0]["tool_calls"][0]["arguments"])


def errors(_: str) -> None:
    for request, code in (
        ({**ASK, "model": "another"}, grpc.StatusCode.NOT_FOUND),
        ({**ASK, "sampling": {"temperature": -1}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({}, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        error = error_of(grpc.RpcError, partial(reflected().call, "Generate", request))
        assert error.code() is code, error


if __name__ == "__main__":
    run_checks(services, health, models, generate_and_stream, forced_tool, errors)
