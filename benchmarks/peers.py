"""The benchmark measures other programs on the same machine: transformers, and llama.cpp if it was built before.

    python -m benchmarks.peers --model /tmp/shape --llama-cpp /tmp/llama.cpp     # prints a table; also --json FILE
    python -m benchmarks.peers build /tmp/llama.cpp                       # fetches and builds llama.cpp, ~8 minutes

The benchmark measures decode at each batch size, and prefill of one longer prompt, in tokens per second. For decode, a
prompt has 128 tokens and an output has 32 tokens; the time of the prompt does not count. Each program computes in bf16,
in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGE = "llama-cpp-python"  # the source package contains llama.cpp and its converter
SOURCE, BUILD = Path("source/vendor/llama.cpp"), Path("build")
BENCH = BUILD / "bin" / "llama-batched-bench"
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DGGML_BLAS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
)
PRE_TOKENIZER = "gpt-2"  # llama.cpp's name for byte-level BPE with GPT-2's pattern, which the demo's tokenizer uses
TIMEOUT_S = 600
TRIES = 2  # each measurement runs this number of times; the fastest run counts


@dataclass(frozen=True)
class Workload:
    """A `Workload` has the batch sizes, and the lengths in tokens, with which a benchmark measures each program."""

    batches: tuple[int, ...] = (1, 8, 16)
    prompt_len: int = 128
    output_len: int = 32
    prefill_len: int = 512


@dataclass(frozen=True)
class Speeds:
    """A `Speeds` has the tokens per second of one program.

    `decode` has, for each batch size, the speed of all sequences together; `prefill` is the speed for one prompt.
    """

    decode: dict[int, float] = field(default_factory=dict)
    prefill: float = 0.0


# transformers ---------------------------------------------------------------------------------------------------------


def measure_transformers(model: Path, workload: Workload, num_threads: int) -> Speeds:
    """Measure the method `generate` of transformers in a new process."""
    command = [sys.executable, "-m", "benchmarks.peers", "transformers", str(model), json.dumps(asdict(workload))]
    threads = str(num_threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    output = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, timeout=TIMEOUT_S, check=True
    ).stdout
    raw = json.loads(output.splitlines()[-1])
    return Speeds({int(batch): speed for batch, speed in raw["decode"].items()}, raw["prefill"])


class StepClock:
    """A `StepClock` is a streamer for `generate` of transformers and records the time of each call of `put`.

    The first call gets the prompt, and every later call gets a new token.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def run_transformers(model: Path, workload: Workload) -> Speeds:
    """Measure transformers in this process. The decode time starts when the first token is generated."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    torch.manual_seed(os.getpid())
    oracle: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    oracle.train(False)

    def generate(batch: int, prompt_len: int, num_tokens: int) -> tuple[float, float]:
        """Generate tokens; return the pair (seconds until the first token, seconds for all later tokens)."""
        ids_BT = torch.randint(16, oracle.config.vocab_size, (batch, prompt_len))
        clock = StepClock()
        lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        mask = torch.ones_like(ids_BT)
        oracle.generate(ids_BT, attention_mask=mask, do_sample=False, streamer=clock, **lengths)
        assert len(clock.times) == 1 + num_tokens
        return clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]

    decode = {}
    with torch.inference_mode():
        generate(1, workload.prompt_len, 2)  # warm-up
        prefill = workload.prefill_len / min(generate(1, workload.prefill_len, 1)[0] for _ in range(TRIES))
        for batch in workload.batches:
            seconds = min(generate(batch, workload.prompt_len, workload.output_len)[1] for _ in range(TRIES))
            decode[batch] = batch * (workload.output_len - 1) / seconds
    return Speeds(decode, prefill)


# llama.cpp ------------------------------------------------------------------------------------------------------------


def build_llama_cpp(root: Path) -> None:
    """Download the source package with pip and build llama.cpp's benchmark tool in `root` at low priority."""
    root.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, PACKAGE, "--dest", str(root)]
    subprocess.run(pip, check=True)
    archive = max(root.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, inner = member.name.partition("/")
            if inner:
                member.name = inner
                tar.extract(member, root / "source", filter="data")
    cmake = ["cmake", "-S", str(root / SOURCE), "-B", str(root / BUILD), *CMAKE_OPTIONS]
    subprocess.run(cmake, check=True)
    target = ["cmake", "--build", str(root / BUILD), "--target", BENCH.name, "--parallel", str(os.cpu_count() or 1)]
    subprocess.run(["nice", "-n", "19", *target], check=True)


def has_llama_cpp(root: Path | None) -> bool:
    return root is not None and (root / BENCH).is_file()


def convert(root: Path, model: Path) -> Path:
    """Return the path of a GGUF file with the checkpoint in bf16; write the file if it is missing or out of date."""
    out = model / "llama-cpp-bf16.gguf"
    if out.is_file() and out.stat().st_mtime > (model / "model.safetensors").stat().st_mtime:
        return out
    command = [sys.executable, "-m", "benchmarks.peers", "convert", str(root), str(model), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S, text=True)
    if done.returncode:
        raise RuntimeError(f"llama.cpp's converter failed for {model}: {done.stdout[-2000:]}")
    return out


def run_converter(root: Path, model: Path, out: Path) -> None:
    """Run llama.cpp's converter in this process.

    The converter recognises a tokenizer by a hash of the token ids of a fixed text. It does not know the demo's
    tokenizer. Therefore this function replaces the check and names the tokenizer.
    """
    source = (root / SOURCE).resolve()
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import convert_hf_to_gguf as converter  # type: ignore[import-not-found]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: PRE_TOKENIZER
    partial = out.with_suffix(".partial")
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outtype", "bf16", "--outfile", str(partial)]
    if json.loads((model / "config.json").read_text())["model_type"] == "qwen3_next":
        sys.argv.append("--no-mtp")  # otherwise the converter requires MTP layers of a model of this type
    converter.main()
    partial.rename(out)


def measure_llama_cpp(root: Path, model: Path, workload: Workload, num_threads: int) -> Speeds:
    """Measure the speed of llama.cpp with its benchmark tool.

    The tool decodes one token of every sequence in each step, and does not sample.
    """
    gguf = convert(root, model)
    decode: dict[int, float] = {}
    for row in _bench(root, gguf, workload.prompt_len, workload.output_len, workload.batches, num_threads):
        decode[row["pl"]] = max(row["speed_tg"], decode.get(row["pl"], 0.0))
    prefill = max(row["speed_pp"] for row in _bench(root, gguf, workload.prefill_len, 1, (1,), num_threads))
    return Speeds(decode, prefill)


def _bench(
    root: Path, gguf: Path, prompt_len: int, output_len: int, batches: tuple[int, ...], num_threads: int
) -> list[dict[str, Any]]:
    context = max(batches) * (prompt_len + output_len)
    lengths = ["-npp", str(prompt_len), "-ntg", str(output_len), "-npl", ",".join(map(str, batches * TRIES))]
    threads = ["-t", str(num_threads), "-tb", str(num_threads)]
    command = [str(root / BENCH), "-m", str(gguf), "-c", str(context), *lengths, *threads, "--output-format", "jsonl"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != len(batches) * TRIES:
        raise RuntimeError(f"{BENCH.name} ended with exit code {done.returncode}: {done.stdout[-2000:]}")
    return rows


# The command line -----------------------------------------------------------------------------------------------------


def report(speeds: dict[str, Speeds], workload: Workload) -> None:
    table = Table(title=f"tokens/s, prompt {workload.prompt_len}, output {workload.output_len}")
    for column in ("", *(f"decode × {batch}" for batch in workload.batches), f"prefill {workload.prefill_len}"):
        table.add_column(column, justify="right")
    for name, speed in speeds.items():
        table.add_row(name, *(f"{speed.decode[batch]:.0f}" for batch in workload.batches), f"{speed.prefill:.0f}")
    Console().print(table)


def main() -> None:
    if sys.argv[1:2] == ["transformers"]:
        raw = json.loads(sys.argv[3])
        workload = Workload(**raw | {"batches": tuple(raw["batches"])})
        print(json.dumps(asdict(run_transformers(Path(sys.argv[2]), workload))))
        return
    if sys.argv[1:2] == ["convert"]:
        run_converter(*map(Path, sys.argv[2:5]))
        return
    if sys.argv[1:2] == ["build"]:
        build_llama_cpp(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description="Measure tokens per second of transformers and llama.cpp.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, help="the directory of a build by `python -m benchmarks.peers build`")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    workload = Workload()
    speeds = {"transformers": measure_transformers(args.model, workload, args.threads)}
    if has_llama_cpp(args.llama_cpp):
        speeds["llama.cpp"] = measure_llama_cpp(args.llama_cpp, args.model, workload, args.threads)
    else:
        print("llama.cpp is left out: --llama-cpp has no build; build with: python -m benchmarks.peers build DIR")
    report(speeds, workload)
    if args.json:
        args.json.write_text(json.dumps({name: asdict(speed) for name, speed in speeds.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
