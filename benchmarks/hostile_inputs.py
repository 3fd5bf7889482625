"""`cases` returns the hostile inputs of the benchmark: requests at a limit or above it, which try to be costly."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from protos.expertmesh.inference.v1 import inference_pb2_grpc

BODY = 4 << 20  # default limit of a body for contexts of up to 524,288 tokens
SLOW_S = 3.0  # seconds that the measured server allows for headers and for bodies
PATIENCE_S = SLOW_S + 10  # seconds in which the server must close a connection that stalls
COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"


@dataclass(frozen=True)
class Target:
    """A `Target` is a running server with a client for its REST port."""

    url: str
    grpc_address: str
    http: httpx.AsyncClient


Send = Callable[[Target], Awaitable[str]]  # sends requests and returns a short text about the answers


@dataclass(frozen=True)
class Case:
    """A `Case` is one row of the table.

    `plain` gives the engine the same work without the costly part of the request. The benchmark compares the longest
    engine step during `send` with the longest step during `plain`, or with the longest step without any request if
    there is no `plain`. The difference may be at most the bound.
    """

    name: str
    send: Send
    plain: Send | None = None
    num_prompt_tokens: int = 0


async def nothing(_: Target) -> str:
    await asyncio.sleep(3)
    return ""


def post(path: str, body: object, headers: dict[str, str] | None = None) -> Send:
    """Return a function that posts `body`, which is encoded now and not during the measurement."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}

    async def send(target: Target) -> str:
        answer = await target.http.post(target.url + path, content=content, headers=headers)
        return str(answer.status_code)

    return send


def together(*sends: Send) -> Send:
    async def send(target: Target) -> str:
        answers = Counter(await asyncio.gather(*(one(target) for one in sends)))
        return ", ".join(f"{number} × {answer}" for answer, number in answers.items())

    return send


def over_grpc(request: pb.GenerateRequest) -> Send:
    async def send(target: Target) -> str:
        options = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
        async with grpc.aio.insecure_channel(target.grpc_address, options=options) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            try:
                await stub.Generate(request)
                return "OK"
            except grpc.aio.AioRpcError as error:
                return error.code().name

    return send


def stalling(num_connections: int, begun: bytes) -> Send:
    """Return a function that opens connections, sends `begun` on each, and waits until the server closes them."""

    async def one(target: Target) -> bool:
        where = urlsplit(target.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        try:
            writer.write(begun)
            async with asyncio.timeout(PATIENCE_S):
                with suppress(OSError):
                    await reader.read()
            return True
        except TimeoutError:
            return False
        finally:
            writer.close()

    async def send(target: Target) -> str:
        closed = await asyncio.gather(*(one(target) for _ in range(num_connections)))
        return f"{sum(closed)} of {num_connections} closed"

    return send


async def endless_headers(target: Target) -> str:
    """Send up to 203 MB of headers, and return the status of the answer."""
    where = urlsplit(target.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    line = b"X-Long: " + b"a" * 8000 + b"\r\n"
    with suppress(OSError):
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: a\r\n")
        for _ in range(203_000_000 // len(line)):
            writer.write(line)
            await writer.drain()
            if reader.at_eof():
                break
    with suppress(OSError):
        head = await reader.readline()
        writer.close()
        return head.decode().partition(" ")[2].strip()[:3] or "closed"
    return "closed"


def slow_grammar(salt: int) -> str:
    """Return a Lark grammar of a few kilobytes whose compilation would take minutes."""
    terms = " & ".join(f"/(?s:.*)a.{{{n + salt}}}(?s:.*)/" for n in range(40))
    return f"start: T\nT: {terms}"


async def slow_grammars(target: Target) -> str:
    """Ask for six slow grammars at once and, meanwhile, for small grammars; return the longest time of the latter."""
    salt = time.time_ns() % 10**6

    def shaped(kind: str, text: str) -> Send:
        return post(COMPLETIONS, {"prompt": "a", "max_tokens": 2, "structured_outputs": {kind: text}})

    slow = [asyncio.create_task(shaped("grammar", slow_grammar(salt + n))(target)) for n in range(6)]
    times, n = list[float](), 0
    while not all(task.done() for task in slow) and n < 40:
        n, began = n + 1, time.monotonic()
        await shaped("regex", f"[0-9]{{2}}{salt}{n}")(target)
        times.append(time.monotonic() - began)
        await asyncio.sleep(0.05)
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    return f"a small one in {max(times):.2f} s"


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def chat(content: str = "a", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}


def completion(prompt: Any = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 4, "ignore_eos": True, **more}


def filled(size: int, piece: str = "x = 1; ") -> str:
    return piece * (size // len(piece))


def schema_cases() -> list[Case]:
    itself: dict[str, Any] = {"anyOf": [{"$ref": "#/$defs/a"}] * 200}
    shared = {f"d{n}": {"type": "string", "enum": [f"{n}" * 100]} for n in range(500)}
    parameters = {f"p{n}": {"$ref": f"#/$defs/d{n}"} for n in range(500)}
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string", "maxLength": 9} for n in range(12)}}
    large = {"type": "object", "properties": {f"p{n}": {"description": "a" * 1000} for n in range(30)}}
    referring = {"$defs": {"a": itself}, "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}
    sharing = {"$defs": shared, "type": "object", "properties": parameters}
    choices = [f"choice {n}" for n in range(60_000)]
    return [
        Case(
            "anyOf that refers 200 times to itself",
            post(CHAT, chat(tools=[tool("f", referring)], tool_choice="required")),
            post(CHAT, chat(tools=[tool("f", referring)])),
        ),
        Case("500 parameters, 200 KB of $defs", post(CHAT, chat(tools=[tool("f", sharing)], tool_choice="required"))),
        Case(
            "128 forced tools",
            post(CHAT, chat(tools=[tool(f"f{n}", wide) for n in range(128)], tool_choice="required")),
        ),
        Case("128 tools, 4 MB", post(CHAT, chat(tools=[tool(f"f{n}", large) for n in range(128)]))),
        Case("choice of 60,000 texts", post(COMPLETIONS, completion(structured_outputs={"choice": choices}))),
        Case("grammar text of 4 MB", post(COMPLETIONS, completion(structured_outputs={"regex": "a" * (BODY - 1000)}))),
    ]


def sampling_cases() -> list[Case]:
    bias = {str(n): 1 for n in range(1024)}
    many = ["a"] * 64
    rows = completion(many, max_tokens=16)
    stops = [chr(97 + n) + "b" * 1023 for n in range(4)]
    scored = [5 + n % 500 for n in range(2340)]
    batch = [[5 + n % 500 for n in range(380)]] * 64
    everything = completion("a" * 20, n=128, max_tokens=16)
    return [
        Case(
            "logit_bias of 131,072 entries",
            post(COMPLETIONS, completion(logit_bias={str(n): 1 for n in range(131_072)})),
        ),
        Case(
            "logit_bias × 64 prompts × n",
            post(COMPLETIONS, completion(many, n=2, logit_bias=bias)),
            post(COMPLETIONS, completion(many, n=2)),
        ),
        Case("1,024 entries for 64 rows", post(COMPLETIONS, rows | {"logit_bias": bias}), post(COMPLETIONS, rows)),
        Case("200 KB of stop strings × 32", post(COMPLETIONS, completion(n=32, stop=["a" * 200_000]))),
        Case(
            "4 stop strings of 1 KB × 128",
            post(COMPLETIONS, everything | {"stop": stops}),
            post(COMPLETIONS, everything),
        ),
        Case("n = 128", post(COMPLETIONS, everything), post(COMPLETIONS, everything)),
        Case("n = 128, 20 logprobs", post(COMPLETIONS, everything | {"logprobs": 20}), post(COMPLETIONS, everything)),
        Case(
            "prompt_logprobs at the limit",
            post(COMPLETIONS, completion(scored, prompt_logprobs=20)),
            post(COMPLETIONS, completion(scored)),
            len(scored),
        ),
        Case("prompt_logprobs over the limit", post(COMPLETIONS, completion(scored, n=2, prompt_logprobs=20))),
        Case(
            "64 prompts with echo and logprobs",
            post(COMPLETIONS, completion(batch, echo=True, logprobs=1, max_tokens=1)),
            post(COMPLETIONS, completion(batch, max_tokens=1)),
            64 * 380,
        ),
    ]


def size_cases() -> list[Case]:
    turns = [{"role": "user", "content": filled(200)} for _ in range(16_384)]
    wrong_turns = [{"role": "user", "content": n} for n in range(20_000)]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "x = 1"}]} for _ in range(8000)]
    fitting = filled(40_000)
    room = BODY - 1000
    return [
        Case("20,000 invalid messages", post(CHAT, chat() | {"messages": wrong_turns})),
        Case("20,000 invalid input items", post(RESPONSES, {"input": wrong_turns})),
        Case("60,000 invalid list items", post(COMPLETIONS, completion(prompt=[[]] * 60_000))),
        Case("chat of 2.7 MB", post(CHAT, chat(filled(2_700_000)))),
        Case("chat of 4 MB", post(CHAT, chat(filled(room)))),
        Case("chat of 16,384 messages", post(CHAT, chat() | {"messages": turns})),
        Case("chat that fills the context", post(CHAT, chat(fitting)), post(CHAT, chat(fitting)), 15_000),
        Case("prompt of 4 MB", post(COMPLETIONS, completion(filled(room)))),
        Case("prompt of 1,390,000 token ids", post(COMPLETIONS, completion([1] * 1_390_000))),
        Case("4 MB to tokenize", post("/tokenize", {"prompt": filled(room), "return_token_strs": True})),
        Case("1,390,000 tokens to detokenize", post("/detokenize", {"tokens": [5] * 1_390_000})),
        Case("JSON 100,000 deep", post(CHAT, b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
        Case("JSON of 65,000 values", post(CHAT, chat(chat_template_kwargs={"a": [""] * 65_000}))),
        Case("body of 64 MB", post(CHAT, b" " * (64 << 20))),
        Case("100 MB in gzip", post(CHAT, gzip.compress(bytes(100_000_000)), {"Content-Encoding": "gzip"})),
        Case("response to 4 MB", post(RESPONSES, {"input": filled(room)})),
        Case("response to 8,000 items", post(RESPONSES, {"input": items, "max_output_tokens": 4})),
        Case("message of 4 MB", post(MESSAGES, {"model": "demo", **chat(filled(room))})),
        Case("gRPC message of 4 MB", over_grpc(pb.GenerateRequest(text=filled(room)))),
        Case("gRPC, 1,390,000 token ids", over_grpc(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 1_390_000)))),
        Case("gRPC message of 5 MB", over_grpc(pb.GenerateRequest(text=filled(5 << 20)))),
    ]


def connection_cases() -> list[Case]:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
    return [
        Case("203 MB of headers", endless_headers),
        Case("500 halves of a header", stalling(500, head)),
        Case("500 stalled bodies", stalling(500, head + b"Content-Length: 1000\r\n\r\n{")),
        Case("500 idle connections", stalling(500, b"")),
    ]


def cases(only: Sequence[str] = ()) -> list[Case]:
    """Return all cases, or only the cases whose names contain one of the texts in `only`."""
    every = [*schema_cases(), *sampling_cases(), *size_cases(), *connection_cases()]
    every.append(Case("six slow grammars", slow_grammars))  # last, because the server goes on checking these
    return [case for case in every if not only or any(text in case.name for text in only)]
