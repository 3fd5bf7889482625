"""The committed generated code matches the .proto files and works under the installed protobuf."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import Message

from protos.expertmesh.expert.v1 import expert_pb2, expert_pb2_grpc
from protos.expertmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from protos.generate import ROOT, generate, generated_files


def test_the_committed_code_is_what_the_proto_files_say(tmp_path: Path) -> None:
    generate(tmp_path)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*")}
    assert written == set(generated_files())
    for path in generated_files():
        assert (ROOT / path).read_text() == (tmp_path / path).read_text(), f"{path} is stale: run `make protos`"


def test_it_imports_under_the_installed_runtime() -> None:
    assert expert_pb2.DESCRIPTOR.package == "expertmesh.expert.v1"
    assert inference_pb2.DESCRIPTOR.package == "expertmesh.inference.v1"
    assert {"ExpertStub", "ExpertServicer"} <= vars(expert_pb2_grpc).keys()
    assert {"InferenceStub", "InferenceServicer"} <= vars(inference_pb2_grpc).keys()


def test_a_sampling_parameter_that_is_not_set_is_not_zero() -> None:
    params = inference_pb2.SamplingParams(temperature=0.0)
    assert params.HasField("temperature")
    assert not params.HasField("max_tokens")
    again = inference_pb2.SamplingParams.FromString(params.SerializeToString())
    assert isinstance(again, Message)
    assert again.HasField("temperature")
    assert not again.HasField("top_p")
