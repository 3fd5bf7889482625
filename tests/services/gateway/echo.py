"""An `EchoSource` replaces the engine in tests of the gateway, and `save_tokenizer` makes a small tokenizer."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import httpx
import uvicorn
from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from services.engine.contract.sampling_params import SamplingParams
from services.engine.contract.token_output import FinishReason, TokenLogprob, TokenOutput

EOS = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}\n<tool_call>\n<function={{ call.function.name }}>\n"
    "{% for name, value in call.function.arguments | items %}<parameter={{ name }}>\n{{ value }}\n</parameter>\n"
    "{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('the first message may not be that') }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def save_tokenizer(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Write a byte-level tokenizer with a small vocabulary to `path`.

    The vocabulary has the 256 bytes, three longer strings, two special tokens and the added token "<tool call>".
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: n for n, char in enumerate(alphabet)} | {"he": 256, "hel": 257, "ll": 258}
    backend = Backend(models.BPE(vocab=vocab, merges=[("h", "e"), ("he", "l"), ("l", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken(EOS)])
    backend.add_tokens([AddedToken("<tool call>", special=False)])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)  # type: ignore[no-untyped-call]
    hf.chat_template = chat_template
    hf.save_pretrained(path)


@dataclass
class EchoSource:
    """An `EchoSource` is a `TokenSource` that generates the tokens of `script` and then `eos_id`.

    If `script` is None, the source generates the tokens of the prompt. With `ignore_eos`, the source repeats the script
    without end. The logprob of a token depends only on the token's id. The alternatives of a token have
    the next higher ids.
    """

    eos_id: int
    script: list[int] | None = None
    cached: tuple[int, str] = (0, "")  # reported number of cached tokens of each prompt, and the reported cache reason
    tokens_per_output: int = 1
    pause: float = 0.0  # seconds of waiting before each output
    gate: asyncio.Event | None = None  # each output waits until this event is set; None: no waiting
    fails: Exception | None = None  # the exception that is raised after `num_good` outputs; None: no exception
    num_good: int = 0
    forgets_reason: bool = False  # True: the last output has no finish reason
    seen: list[SamplingParams] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    active: set[str] = field(default_factory=set)  # ids of the requests that have not ended
    # for each request that another backbone began, the tokens of the answer that had already been sent
    resumed: list[tuple[int, ...]] = field(default_factory=list)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        timeout: float | None = None,
        sent_token_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[TokenOutput, None]:
        assert request_id not in self.active
        self.active.add(request_id)
        self.seen.append(params)
        self.timeouts.append(timeout)
        if sent_token_ids is not None:
            self.resumed.append(tuple(sent_token_ids))
        try:
            outputs = self._outputs(request_id, list(prompt_token_ids), params)
            left = (output for output in outputs if output.num_generated > len(sent_token_ids or ()))
            for n, output in enumerate(left):
                if self.fails and n == self.num_good:
                    raise self.fails
                await asyncio.sleep(self.pause)
                if self.gate:
                    await self.gate.wait()
                yield output
        finally:
            self.active.discard(request_id)

    def _outputs(self, request_id: str, prompt: list[int], params: SamplingParams) -> Iterator[TokenOutput]:
        script = prompt if self.script is None else self.script
        answer = cycle(script) if params.ignore_eos else iter([*script, self.eos_id])
        limit = params.max_tokens or 1000
        num_done, is_first = 0, params.prompt_logprobs is not None
        while tokens := tuple(islice(answer, min(self.tokens_per_output, limit - num_done))):
            num_done += len(tokens)
            is_stop = not params.ignore_eos and tokens[-1] == self.eos_id
            reason = FinishReason.STOP if is_stop else FinishReason.LENGTH if num_done == limit else None
            reported = None if self.forgets_reason else reason
            output = TokenOutput(request_id, tokens, reported, len(prompt), num_done, queued_s=0.001)
            yield replace(
                output,
                logprobs=scores(tokens, params.logprobs),
                prompt_logprobs=(None, *scores(prompt[1:], params.prompt_logprobs)) if is_first else (),
                num_cached=self.cached[0],
                cache_reason=self.cached[1],
            )
            is_first = False
            if reason:
                return


def scores(token_ids: Sequence[int], num_top: int | None) -> tuple[TokenLogprob, ...]:
    if num_top is None:
        return ()
    return tuple(
        TokenLogprob(token_id, -token_id / 1024, 2, tuple((token_id + n, -n / 8) for n in range(1, num_top + 1)))
        for token_id in token_ids
    )


def plain_http(**options: Any) -> httpx.Client:
    """Return a client for servers without TLS. Unlike a usual client, it does not read the CA certificates (40 ms)."""
    return httpx.Client(verify=False, **options)


class PromptServer(uvicorn.Server):
    """A `PromptServer` is a uvicorn server that stops at once, because tests start and stop hundreds of servers.

    uvicorn's own server needs up to 0.1 s to see that it should stop, and then always waits another 0.1 s.
    """

    async def main_loop(self) -> None:
        await self.on_tick(0)  # sets the headers of all responses
        while not self.should_exit:
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:
            await asyncio.sleep(0.005)
        await self.lifespan.shutdown()


@contextmanager
def serving(app: FastAPI, lifespan: Literal["on", "off"] = "off") -> Iterator[str]:
    """Serve `app` with uvicorn on a free port, and yield the server's URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, ws="none", lifespan=lifespan, log_level="error")
    server = PromptServer(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
