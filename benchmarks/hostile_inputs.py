"""`cases` returns the hostile inputs of the benchmark: requests at a limit or above it, which try to be costly.

The sizes of the inputs come from the `GatewayLimits` of the measured server. Most inputs have a variant that the server
accepts and a variant that the server refuses. Each case says which answer shows that its input reached its code.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx

from protos.expertmesh.inference.v1 import inference_pb2 as pb
from protos.expertmesh.inference.v1 import inference_pb2_grpc
from services.engine.contract.sampling_params import MAX_COUNTED_CHARS, MAX_LOGIT_BIAS, MAX_LOGPROBS
from services.engine.grammar.compiled_grammar import MAX_TEXT
from services.gateway.limits import GatewayLimits

SLOW_S = 3.0  # seconds that the measured server allows for headers and for bodies
PATIENCE_S = SLOW_S + 10  # seconds in which the server must close a connection that stalls
COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
PIECE, PIECE_TOKENS = "x = 1; ", 4  # a text, and the number of its tokens in the demo model's vocabulary
TEXT = "@text@"  # stands in a body for the text that fills the body
NUM_CUT = 100  # tokens that the engine reads of a prompt that the server tokenizes whole
CUT: dict[str, Any] = {"truncate_prompt_tokens": NUM_CUT}
TOO_LONG = "400: .*maximum context length"
GRPC_TOO_LONG = "INVALID_ARGUMENT: .*maximum context length"
TOO_MANY_TOKENS = "(400|INVALID_ARGUMENT): .*to be tokenized or truncated"
TOO_MANY_ITEMS = "400: .*items in all lists"


@dataclass(frozen=True)
class Target:
    """A `Target` is a running server with a client for its REST port."""

    url: str
    grpc_address: str
    http: httpx.AsyncClient


Send = Callable[[Target], Coroutine[Any, Any, str]]  # sends requests and returns a short text about the answers


@dataclass(frozen=True)
class Case:
    """A `Case` is one row of the table.

    - `answer`: a regular expression that the beginning of the answer matches if the input reached the code that the
      case is meant for. Any other answer is an error of the benchmark.
    - `plain`: gives the engine the same work without the costly part of the request. The benchmark compares the longest
      engine step during `send` with the longest step during `plain`, or with the longest step without any request if
      there is no `plain`. The difference may be at most the bound.
    - `num_tokens`: number of tokens that the server handles, for which more memory is allowed.
    """

    name: str
    send: Send
    answer: str = "200"
    plain: Send | None = None
    num_tokens: int = 0


def post(path: str, body: object, headers: dict[str, str] | None = None) -> Send:
    """Return a function that posts `body`, which is encoded now and not during the measurement.

    The function returns the status, and the error's message after a colon.
    """
    content = body if isinstance(body, bytes) else encoded(body)
    headers = {"Content-Type": "application/json", **(headers or {})}

    async def send(target: Target) -> str:
        answer = await target.http.post(target.url + path, content=content, headers=headers)
        if answer.status_code == 200:
            return "200"
        return f"{answer.status_code}: {answer.json()['error']['message']}"

    return send


def encoded(body: object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def full(body: object, num_bytes: int) -> bytes:
    """Return the JSON of `body` with so long a text in place of TEXT that the JSON has `num_bytes` bytes."""
    data = encoded(body)
    return data.replace(TEXT.encode(), filled(num_bytes - len(data) + len(TEXT)).encode())


def filled(size: int, piece: str = PIECE) -> str:
    """Return a text of `size` characters that repeats `piece`."""
    return (piece * (size // len(piece) + 1))[:size]


def num_tokens(size: int) -> int:
    """Return about how many tokens the text `filled(size)` has."""
    return size * PIECE_TOKENS // len(PIECE)


def together(*sends: Send) -> Send:
    async def send(target: Target) -> str:
        answers = Counter(await asyncio.gather(*(one(target) for one in sends)))
        return ", ".join(f"{number} × {answer}" for answer, number in answers.items())

    return send


def over_grpc(method: str, request: object) -> Send:
    """Return a function that calls an RPC, and returns OK, or the code of the error with a colon and its message."""

    async def send(target: Target) -> str:
        options = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
        async with grpc.aio.insecure_channel(target.grpc_address, options=options) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            try:
                await getattr(stub, method)(request)
                return "OK"
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"

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
    """Ask for six slow grammars at once and, until the slow grammars have answers, for small grammars, one at a time.

    Return the answers to the small grammars and the longest time of such an answer, then the answers to the slow ones.
    """
    salt = time.time_ns() % 10**6

    def shaped(kind: str, text: str) -> Send:
        return post(COMPLETIONS, {"prompt": "a", "max_tokens": 2, "structured_outputs": {kind: text}})

    slow = [asyncio.create_task(shaped("grammar", slow_grammar(salt + n))(target)) for n in range(6)]
    small, times = list[str](), list[float]()
    while not all(task.done() for task in slow):
        began = time.monotonic()
        small.append((await shaped("regex", f"[0-9]{{2}}{salt}{len(small)}")(target))[:3])
        times.append(time.monotonic() - began)
        await asyncio.sleep(0.05)
    statuses = sorted({task.result()[:3] for task in slow})
    return f"small {'/'.join(sorted(set(small)))} in {max(times):.2f} s, slow {'/'.join(statuses)}"


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def chat(content: str = "a", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}


def completion(prompt: Any = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 4, "ignore_eos": True, **more}


def schema_cases(limits: GatewayLimits, num_bytes: int) -> list[Case]:
    itself: dict[str, Any] = {"anyOf": [{"$ref": "#/$defs/a"}] * 200}
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string", "maxLength": 9} for n in range(12)}}
    referring = {"$defs": {"a": itself}, "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}

    def forced(*schemas: dict[str, Any]) -> Send:
        tools = [tool(f"f{n}", one) for n, one in enumerate(schemas)]
        return post(CHAT, chat(tools=tools, tool_choice="required", **CUT))

    def sharing(num_schema_bytes: int) -> dict[str, Any]:
        """Return a schema whose definitions have about `num_schema_bytes` bytes and are used by 500 parameters."""
        definition = {"type": "string", "enum": ["a" * (num_schema_bytes // 500)]}
        parameters = {f"p{n}": {"$ref": f"#/$defs/d{n}"} for n in range(500)}
        return {"$defs": {f"d{n}": definition for n in range(500)}, "type": "object", "properties": parameters}

    def counting(num_chars: int) -> Send:
        """Return a function that asks for two strings whose lengths count `num_chars` characters together."""
        kinds = [{"type": "string", "pattern": f"^[{chars}]{{0,{num_chars // 2}}}$"} for chars in ("a-z", "a-z0-9")]
        schema = {"type": "array", "prefixItems": kinds, "minItems": 2, "items": False}
        return post(COMPLETIONS, completion(max_tokens=64, structured_outputs={"json": schema}))

    def shaped(kind: str, value: Any, size: int = num_bytes) -> Send:
        return post(COMPLETIONS, full(completion(structured_outputs={kind: value}), size))

    choices = [f"choice {n}" for n in range(limits.json_values - 100)]
    num_allowed = MAX_TEXT // len(' | "choice 12345"')
    large = {"type": "object", "description": "a" * (num_bytes // 128 - 200)}
    # half of the bytes that schemas may hold, because names and references count, too
    return [
        Case(
            "anyOf that refers 200 times to itself",
            forced(referring),
            plain=post(CHAT, chat(tools=[tool("f", referring)])),
        ),
        Case(f"500 parameters, {limits.schema_bytes >> 11} KB of $defs", forced(sharing(limits.schema_bytes // 2))),
        Case("500 parameters, $defs too large", forced(sharing(2 * limits.schema_bytes)), TOO_MANY_TOKENS),
        Case("128 forced tools", forced(*[wide] * 128)),
        Case(
            "128 tools that fill the body", post(CHAT, chat(tools=[tool(f"f{n}", large) for n in range(128)])), TOO_LONG
        ),
        Case("choice of 1,900 texts", shaped("choice", choices[:1900])),
        # The text of this grammar is short enough, but the engine's parser finds too many alternatives.
        Case(f"choice of {num_allowed:,} texts", shaped("choice", choices[:num_allowed]), "400: .*too complex"),
        Case(f"choice of {len(choices):,} texts", shaped("choice", choices), "400: .*at most"),
        Case(f"regex of {MAX_TEXT:,} characters", shaped("regex", TEXT, MAX_TEXT), "200|400: structured_outputs.regex"),
        Case("regex that fills the body", shaped("regex", TEXT), "400: .*at most"),
        Case("Lark that fills the body", shaped("grammar", f"start: /{TEXT}/"), "400: .*at most"),
        Case(f"grammar that counts {MAX_COUNTED_CHARS - 100:,} characters", counting(MAX_COUNTED_CHARS - 100)),
        Case("grammar that counts too many characters", counting(2 * MAX_COUNTED_CHARS - 100), "400: .*counts"),
    ]


def sampling_cases(limits: GatewayLimits, num_bytes: int) -> list[Case]:
    many = ["a"] * 64
    rows = completion(many, max_tokens=16)
    bias = {"logit_bias": {str(n): 1 for n in range(limits.logit_bias)}}
    num_biases = min(MAX_LOGIT_BIAS, limits.json_values - 100)
    too_many_biases = {"logit_bias": {str(n): 1 for n in range(num_biases)}}
    stops = [chr(97 + n) + "b" * (limits.stop_bytes - 1) for n in range(limits.stop_strings)]
    num_scored = limits.prompt_logprobs // (1 + MAX_LOGPROBS)
    scored = [5 + n % 500 for n in range(num_scored)]
    scores = {"echo": True, "logprobs": MAX_LOGPROBS, "prompt_logprobs": MAX_LOGPROBS}
    batch = [[5 + n % 500 for n in range(limits.prompt_logprobs // 2 // 64 - 1)]] * 64
    everything = completion("a" * 20, n=128, max_tokens=16)
    ids, num_items = [5] * ((num_bytes - 200) // 2), limits.json_items - 100

    def against(plain: dict[str, Any], more: dict[str, Any]) -> tuple[Send, str, Send]:
        return post(COMPLETIONS, plain | more), "200", post(COMPLETIONS, plain)

    def refused(body: dict[str, Any], reason: str) -> tuple[Send, str]:
        return post(COMPLETIONS, body), f"400: .*{reason}"

    return [
        Case(f"logit_bias of {num_biases:,} entries", *refused(completion(**too_many_biases), "logit_bias")),
        Case("logit_bias × 64 prompts × n", *against(completion(many, n=2), bias)),
        Case(f"logit_bias of {limits.logit_bias:,} entries for 64 rows", *against(rows, bias)),
        Case("200 KB of stop strings × 32", *refused(completion(n=32, stop=["a" * 200_000]), "stop")),
        Case("the longest stop strings × 128", *against(everything, {"stop": stops})),
        Case(f"{len(ids):,} stop_token_ids", *refused(completion(stop_token_ids=ids), "items in all lists")),
        Case(f"{num_items:,} stop_token_ids", *refused(completion(stop_token_ids=ids[:num_items]), "stop_token_ids")),
        Case(
            "6 MB of stop_token_ids",
            post(COMPLETIONS, completion(stop_token_ids=[100_000] * (6_000_000 // 7))),
            "413" if num_bytes < 6_001_000 else "400: .*stop_token_ids",
        ),
        Case("n = 128", *against(everything, {})),
        Case("n = 128, 20 logprobs", *against(everything, {"logprobs": MAX_LOGPROBS})),
        Case("the largest answer of prompt_logprobs", *against(completion(scored), scores), num_scored),
        Case("prompt_logprobs over the limit", *refused(completion(scored, n=2, **scores), "prompt_logprobs")),
        Case(
            "64 prompts with echo and logprobs",
            *against(completion(batch, max_tokens=1), {"echo": True, "logprobs": 1}),
            num_tokens=64 * len(batch[0]),
        ),
    ]


def prompt_cases(limits: GatewayLimits, context: int, num_bytes: int) -> list[Case]:
    """Return cases with long prompts in each API: one that is read to its end, and one that is refused."""
    tokens, ids = num_tokens(num_bytes), [5] * ((num_bytes - 200) // 2)
    most = limits.max_tokenize_tokens(context) - 500
    fitting, most_text = context - 500, filled(most * len(PIECE) // PIECE_TOKENS)
    chars = fitting * len(PIECE) // PIECE_TOKENS
    turns = [{"role": "user", "content": filled(num_bytes // 64 - 100)} for _ in range(63)]
    turns.append({"role": "user", "content": "a"})
    wrong_ids, many_ids = encoded({"tokens": [*ids[:most], 1 << 30]}), encoded({"tokens": ids})
    num_ids = limits.json_items - 100
    cut_ids, long_ids = encoded(completion(ids[:num_ids], **CUT)), encoded(completion(ids[:num_ids]))
    short = post(COMPLETIONS, completion([5 + n % 500 for n in range(NUM_CUT)]))
    just_below = 20 * context  # characters from which the gateway first looks at the beginning alone
    dropping = {"input": turns, "truncation": "auto", "max_output_tokens": 4}
    body = {"input": TEXT, "max_output_tokens": 4}
    message = {"model": "demo", "messages": chat(TEXT)["messages"]}
    return [
        Case(
            "chat that fills the context",
            post(CHAT, chat(filled(chars))),
            "200",
            post(COMPLETIONS, completion([5 + n % 500 for n in range(fitting)])),
            fitting,
        ),
        Case(f"chat of {most:,} tokens, cut", post(CHAT, chat(most_text, **CUT)), "200", short, most),
        Case(f"prompt of {most:,} tokens, cut", post(COMPLETIONS, completion(most_text, **CUT)), "200", short, most),
        Case(
            "chat that fills the body, cut",
            post(CHAT, full(chat(TEXT, **CUT), num_bytes)),
            TOO_MANY_TOKENS,
            None,
            tokens,
        ),
        Case("chat that fills the body", post(CHAT, full(chat(TEXT), num_bytes)), TOO_LONG, None, tokens),
        Case(
            "prompt that fills the body, cut",
            post(COMPLETIONS, full(completion(TEXT, **CUT), num_bytes)),
            TOO_MANY_TOKENS,
            None,
            tokens,
        ),
        Case(
            "prompt that fills the body", post(COMPLETIONS, full(completion(TEXT), num_bytes)), TOO_LONG, None, tokens
        ),
        Case(
            f"prompt of {just_below:,} characters",
            post(COMPLETIONS, completion(filled(just_below))),
            TOO_LONG,
            None,
            num_tokens(just_below),
        ),
        Case(f"prompt of {num_ids:,} ids, cut", post(COMPLETIONS, cut_ids), "200", short, num_ids),
        Case(f"prompt of {num_ids:,} ids", post(COMPLETIONS, long_ids), TOO_LONG, None, num_ids),
        Case(f"prompt of {len(ids):,} ids", post(COMPLETIONS, completion(ids)), TOO_MANY_ITEMS, None, len(ids)),
        Case(
            "tokenize a text that fills the body",
            post("/tokenize", full({"prompt": TEXT, "return_token_strs": True}, num_bytes)),
            TOO_MANY_TOKENS,
            None,
            tokens,
        ),
        Case(
            f"tokenize {most:,} tokens",
            post("/tokenize", {"prompt": most_text, "return_token_strs": True}),
            "200",
            None,
            most,
        ),
        Case("tokenize a text one byte too long", post("/tokenize", full({"prompt": TEXT}, num_bytes + 1)), "413"),
        Case(f"detokenize {len(ids):,} ids", post("/detokenize", many_ids), "400: tokens must", None, len(ids)),
        Case(f"detokenize {most:,} ids", post("/detokenize", {"tokens": ids[:most]}), "200", None, most),
        Case(
            "detokenize ids of which the last is wrong",
            post("/detokenize", wrong_ids),
            "400: .*token id",
            None,
            len(ids),
        ),
        Case("response to 64 messages that fill the body", post(RESPONSES, dropping), "200", None, tokens),
        Case("response to a text that fills the body", post(RESPONSES, full(body, num_bytes)), TOO_LONG, None, tokens),
        Case(
            "count tokens of a message that fills the body",
            post(f"{MESSAGES}/count_tokens", full(message, num_bytes)),
            TOO_MANY_TOKENS,
            None,
            tokens,
        ),
        Case(
            "message that fills the body",
            post(MESSAGES, full(message | {"max_tokens": 4}, num_bytes)),
            "400: .*too long",
            None,
            tokens,
        ),
    ]


def message_cases(limits: GatewayLimits, context: int, num_bytes: int) -> list[Case]:
    """Return cases with as many messages or items as the JSON of a body may hold, or one too many."""
    values = limits.json_values - 50
    num_messages, num_items = min(limits.messages, values // 5), min(limits.input_items // 2, values // 10)
    turns = [{"role": "user", "content": filled(num_bytes // num_messages - 40)} for _ in range(num_messages)]
    wrong_turns = [{"role": "user", "content": n} for n in range(min(limits.messages, values // 4))]
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "x = 1"}]} for _ in range(num_items)]
    items = {"input": parts, "max_output_tokens": 4}
    too_many = [{"role": "user", "content": ""}] * (limits.json_values // 5 + 1)
    tokens = num_tokens(num_bytes)
    return [
        Case(
            f"chat of {num_messages:,} messages, cut",
            post(CHAT, chat(**CUT) | {"messages": turns}),
            TOO_MANY_TOKENS,
            None,
            tokens,
        ),
        Case(f"chat of {num_messages:,} messages", post(CHAT, chat() | {"messages": turns}), TOO_LONG, None, tokens),
        Case(f"chat of {len(too_many):,} messages", post(CHAT, chat() | {"messages": too_many}), "400: .*at most"),
        Case(
            f"{len(wrong_turns):,} invalid messages",
            post(CHAT, chat() | {"messages": wrong_turns}),
            r"400: messages\[0\]",
        ),
        Case(f"{len(wrong_turns):,} invalid items", post(RESPONSES, {"input": wrong_turns}), r"400: input\[0\]"),
        Case(
            f"response to {num_items:,} items, oldest dropped",
            post(RESPONSES, items | {"truncation": "auto"}),
            "200",
            post(COMPLETIONS, completion([5 + n % 500 for n in range(context - 500)])),
            16 * num_items,
        ),
        Case(f"response to {num_items:,} items", post(RESPONSES, items), TOO_LONG, None, 16 * num_items),
    ]


def body_cases(limits: GatewayLimits, num_bytes: int) -> list[Case]:
    deep, lists = limits.json_depth - 10, limits.json_values - 100
    values = chat(chat_template_kwargs={"a": [""] * lists})
    return [
        Case(
            f"{lists:,} invalid prompts", post(COMPLETIONS, completion([[]] * lists)), "400: prompt must hold at most"
        ),
        Case(f"JSON of {lists:,} values", post(CHAT, values)),
        Case(
            "JSON of too many values", post(CHAT, chat(chat_template_kwargs={"a": [""] * 2 * lists})), "400: .*objects"
        ),
        Case(f"JSON {deep} deep", post(CHAT, b'{"messages":' + b"[" * deep + b"]" * deep + b"}"), r"400: messages"),
        Case("JSON that is open to the end of the body", post(CHAT, b"[" * num_bytes), "400: .*nested"),
        Case("body of 64 MB", post(CHAT, b" " * (64 << 20)), "413"),
        Case("100 MB in gzip", post(CHAT, gzip.compress(bytes(100_000_000)), {"Content-Encoding": "gzip"}), "413"),
    ]


def grpc_cases(limits: GatewayLimits, num_bytes: int) -> list[Case]:
    room = num_bytes - 200  # bytes
    text, ids, tokens = filled(room), [5] * room, num_tokens(room)  # an id below 128 has one byte
    turn = pb.ChatMessage(role="user", content=filled(room // limits.messages - 20))
    turns = pb.Chat(messages=[turn] * limits.messages)
    one_more = pb.Chat(messages=[turn] * (limits.messages + 1))
    biases = pb.SamplingParams(logit_bias=dict.fromkeys(range(room // 20), 1.0))
    num_ids = limits.json_items - 100
    some_ids = pb.TokenIds(ids=ids[:num_ids])
    short = post(COMPLETIONS, completion([5 + n % 500 for n in range(NUM_CUT)]))
    cut = {"truncate_prompt_tokens": NUM_CUT, "sampling": pb.SamplingParams(max_tokens=4)}

    def generate(**fields: Any) -> Send:
        return over_grpc("Generate", pb.GenerateRequest(**fields))

    return [
        Case("gRPC: prompt that fills the message, cut", generate(text=text, **cut), TOO_MANY_TOKENS, None, tokens),
        Case("gRPC: prompt that fills the message", generate(text=text), GRPC_TOO_LONG, None, tokens),
        Case("gRPC: prompt one MB too long", generate(text=filled(num_bytes + (1 << 20))), "RESOURCE_EXHAUSTED"),
        Case(f"gRPC: {num_ids:,} ids, cut", generate(token_ids=some_ids, **cut), "OK", short, num_ids),
        Case(f"gRPC: {num_ids:,} ids", generate(token_ids=some_ids), GRPC_TOO_LONG, None, num_ids),
        Case(
            f"gRPC: {len(ids):,} ids",
            generate(token_ids=pb.TokenIds(ids=ids)),
            "INVALID_ARGUMENT: prompt must hold at most",
            None,
            len(ids),
        ),
        Case(f"gRPC: {limits.messages:,} messages, cut", generate(chat=turns, **cut), TOO_MANY_TOKENS, None, tokens),
        Case(f"gRPC: {limits.messages + 1:,} messages", generate(chat=one_more), "INVALID_ARGUMENT: messages"),
        Case(
            f"gRPC: {len(ids):,} stop_token_ids",
            generate(text="a", sampling=pb.SamplingParams(stop_token_ids=ids)),
            "INVALID_ARGUMENT: stop_token_ids",
        ),
        Case(
            f"gRPC: logit_bias of {room // 20:,} entries",
            generate(text="a", sampling=biases),
            "INVALID_ARGUMENT: logit_bias",
        ),
        Case(
            "gRPC: tokenize a text that fills the message",
            over_grpc("Tokenize", pb.TokenizeRequest(text=text)),
            TOO_MANY_TOKENS,
            None,
            tokens,
        ),
        Case(
            f"gRPC: detokenize {len(ids):,} ids",
            over_grpc("Detokenize", pb.DetokenizeRequest(token_ids=ids)),
            "INVALID_ARGUMENT: tokens must",
            None,
            len(ids),
        ),
    ]


def connection_cases() -> list[Case]:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
    closed = "500 of 500 closed"
    return [
        Case("203 MB of headers", endless_headers, "431|closed"),
        Case("500 halves of a header", stalling(500, head), closed),
        Case("500 stalled bodies", stalling(500, head + b"Content-Length: 1000\r\n\r\n{"), closed),
        Case("500 idle connections", stalling(500, b""), closed),
    ]


def cases(limits: GatewayLimits, context: int, only: Sequence[str] = ()) -> list[Case]:
    """Return all cases, or only the cases whose names contain one of the texts in `only`."""
    num_bytes = limits.max_body_bytes(context)
    every = [
        *schema_cases(limits, num_bytes),
        *sampling_cases(limits, num_bytes),
        *prompt_cases(limits, context, num_bytes),
        *message_cases(limits, context, num_bytes),
        *body_cases(limits, num_bytes),
        *grpc_cases(limits, num_bytes),
        *connection_cases(),
        # last, because the server goes on checking these
        Case("six slow grammars, small ones beside them", slow_grammars, r"small 200 in .*, slow 4(00|29)"),
    ]
    return [case for case in every if not only or any(text in case.name for text in only)]
