"""The load generator measures an OpenAI-compatible server on this machine: TTFT, ITL, end-to-end time and throughput.

    python -m benchmarks.load --url http://127.0.0.1:8000 --rate 2 --requests 100        # open loop, Poisson arrivals
    python -m benchmarks.load --url http://127.0.0.1:8000 --concurrency 8 --json out.json --plot out.png

In an open loop, the arrival times of requests do not depend on the server. Therefore the measured times include the
time in a queue. In a closed loop, a fixed number of requests runs at a time. The generator sends no new request after
`--seconds`, and ends when the last request has ended. The client measures all times. TTFT is the time from sending the
request to the text of the first token. ITL is the gap between two stream events with text. `benchmarks.load_overhead`
measures the time that the generator itself adds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from model.demo.corpus import read_corpus
from services.cli.drill.load import RequestOutcome, ask, open_loop

FIRST_ORDINARY_ID = 16  # lower token ids are special tokens
CHARACTERS_PER_TOKEN = 4  # approximation for the demo's tokenizer; reports use the token counts that the server returns
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


# Many requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """`Prompts` draws an endless sequence of request bodies. It draws the lengths, in tokens, from the given lists."""

    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    vocab_size: int  # number of token ids; 0 if prompts must be text, because the server's token ids are unknown
    seed: int
    model: str = ""

    def bodies(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(self.seed)
        texts = [] if self.vocab_size else [text for text in read_corpus()[1] if len(text) > CHARACTERS_PER_TOKEN]
        while True:
            length = rng.choice(self.prompt_lens)
            prompt = self._ids(rng, length) if self.vocab_size else self._text(rng, texts, length)
            body = {"prompt": prompt, "max_tokens": rng.choice(self.output_lens), "temperature": 0, "ignore_eos": True}
            yield {**body, "model": self.model} if self.model else body

    def _ids(self, rng: random.Random, length: int) -> list[int]:
        return [rng.randrange(FIRST_ORDINARY_ID, self.vocab_size) for _ in range(length)]

    def _text(self, rng: random.Random, texts: Sequence[str], length: int) -> str:
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - CHARACTERS_PER_TOKEN * length))
        return text[start : start + CHARACTERS_PER_TOKEN * length]


# The closed loop ------------------------------------------------------------------------------------------------------


async def closed_loop(
    url: str, bodies: Iterable[dict[str, Any]], concurrency: int, seconds: float, timeout_s: float = 600
) -> list[RequestOutcome]:
    """Send `bodies`, `concurrency` requests at a time, and return the outcomes.

    The function sends no new request after `seconds` seconds, and waits for the requests that still run.
    """
    outcomes: list[RequestOutcome] = []
    source, origin = iter(bodies), time.perf_counter()

    async def one_after_another() -> None:
        for body in source:
            outcomes.append(await ask(url, body, origin, timeout_s))
            if time.perf_counter() - origin > seconds:
                return

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    return outcomes


# Numbers --------------------------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], share: float) -> float:
    """Return the quantile at `share` (0 to 1) of `values`, interpolated linearly; return 0 if `values` is empty."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def milliseconds(values_s: Sequence[float]) -> dict[str, float]:
    mean = sum(values_s) / len(values_s) if values_s else 0.0
    return {"mean": 1e3 * mean, **{name: 1e3 * quantile(values_s, share) for name, share in QUANTILES.items()}}


def summarize(outcomes: Sequence[RequestOutcome]) -> dict[str, Any]:
    """Return percentiles of the times in milliseconds, tokens and requests per second, and the errors by kind."""
    good = [outcome for outcome in outcomes if not outcome.error]
    wall_s = max((outcome.ended_at for outcome in outcomes), default=0.0)
    totals = {
        name: sum(getattr(outcome, f"num_{name}") for outcome in good) for name in ("prompt", "cached", "generated")
    }
    return {
        "num_requests": len(outcomes),
        "num_good": len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "seconds": wall_s,
        "requests_per_s": len(good) / wall_s if wall_s else 0.0,
        "tokens": totals,
        "tokens_in_per_s": totals["prompt"] / wall_s if wall_s else 0.0,
        "tokens_out_per_s": totals["generated"] / wall_s if wall_s else 0.0,
        "ttft_ms": milliseconds([outcome.ttft_s for outcome in good]),
        "itl_ms": milliseconds([gap for outcome in good for gap in outcome.gaps_s]),
        "e2e_ms": milliseconds([outcome.ended_at - outcome.sent_at for outcome in good]),
    }


def tables(summary: dict[str, Any]) -> Iterator[Table]:
    times = Table(title="milliseconds")
    for name in ("", "mean", *QUANTILES):
        times.add_column(name, justify="right")
    for name in ("ttft", "itl", "e2e"):
        times.add_row(name, *(f"{value:.1f}" for value in summary[f"{name}_ms"].values()))
    yield times
    rates = Table(title=f"{summary['num_good']} of {summary['num_requests']} requests in {summary['seconds']:.1f} s")
    for name in ("requests/s", "tokens in/s", "tokens out/s", "errors"):
        rates.add_column(name, justify="right")
    errors = ", ".join(f"{count} × {kind}" for kind, count in summary["errors"].items()) or "none"
    rates.add_row(*(f"{summary[f'{name}_per_s']:.2f}" for name in ("requests", "tokens_in", "tokens_out")), errors)
    yield rates


def plot(outcomes: Sequence[RequestOutcome], path: Path) -> None:
    """Write a PNG with the distributions of TTFT, ITL and end-to-end time.

    The PNG also shows the number of stream events with text in each second of the run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [outcome for outcome in outcomes if not outcome.error]
    series = {
        "TTFT, ms": [outcome.ttft_s for outcome in good],
        "ITL, ms": [gap for outcome in good for gap in outcome.gaps_s],
        "end to end, ms": [outcome.ended_at - outcome.sent_at for outcome in good],
    }
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for axis, (label, values) in zip(axes, series.items(), strict=False):
        ordered = sorted(1e3 * value for value in values)
        axis.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], drawstyle="steps-post")
        axis.set(xlabel=label, ylabel="share of requests" if "ITL" not in label else "share of gaps", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    arrivals = [when for outcome in good for when in outcome.event_times]
    axes[3].hist(arrivals, bins=max(1, int(max(arrivals, default=1))))
    axes[3].set(xlabel="second of the run", ylabel="events with text")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# The command line -----------------------------------------------------------------------------------------------------


def local_url(url: str) -> str:
    """Return `url`; raise ValueError if `url` names another machine, because the load could harm another machine."""
    if urlsplit(url).hostname != "127.0.0.1":
        raise ValueError(f"--url must be http://127.0.0.1:PORT, not {url!r}")
    return url.rstrip("/")


def main() -> None:
    parser = argparse.ArgumentParser(description="Send load to an OpenAI-compatible server on this machine.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="model name in the body; if empty, the body has no model name")
    loop = parser.add_mutually_exclusive_group(required=True)
    loop.add_argument("--rate", type=float, help="open loop: requests per second, with Poisson arrivals")
    loop.add_argument("--concurrency", type=int, help="closed loop: requests at a time")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=300, help="seconds after which no request is sent")
    parser.add_argument("--timeout", type=float, default=120, help="timeout of one request in seconds")
    parser.add_argument("--prompt-lens", type=int, nargs="+", default=[128], metavar="TOKENS")
    parser.add_argument("--output-lens", type=int, nargs="+", default=[32], metavar="TOKENS")
    parser.add_argument("--vocab", type=int, default=2048, help="token ids are drawn below this number; 0 sends text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG; needs the `bench` extra")
    args = parser.parse_args()
    try:
        url = local_url(args.url) + "/v1/completions"
    except ValueError as error:
        parser.error(str(error))
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; install it with: .venv/bin/pip install -e '.[bench]'")
    for name in ("rate", "concurrency", "requests", "seconds"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name} must be above 0, not {value}")
    prompts = Prompts(tuple(args.prompt_lens), tuple(args.output_lens), args.vocab, args.seed, args.model)
    bodies = list(itertools.islice(prompts.bodies(), args.requests))
    if args.rate:
        outcomes = asyncio.run(open_loop(url, bodies, args.rate, args.seconds, args.seed, args.timeout))
    else:
        outcomes = asyncio.run(closed_loop(url, bodies, args.concurrency, args.seconds, args.timeout))
    summary = summarize(outcomes)
    for table in tables(summary):
        Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")
    if args.plot:
        plot(outcomes, args.plot)


if __name__ == "__main__":
    main()
