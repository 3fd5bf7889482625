"""The fuzzer looks for bytes that our HTTP/2 handles wrongly. `test_frames_fuzzer` checks the bytes that it has found.

    .venv/bin/python -m pip install atheris
    .venv/bin/python -m tests.services.expert.transport.frames_fuzzer fuzz FOLDER    # until a check fails, or Ctrl-C
    .venv/bin/python -m tests.services.expert.transport.frames_fuzzer pack FOLDER    # writes frames_corpus.txt

The first command begins with the inputs of frames_corpus.txt, and collects in FOLDER the inputs that reach new code.
The second command writes all inputs of FOLDER to frames_corpus.txt, one per line in base64.
"""

from __future__ import annotations

import base64
import sys
from itertools import pairwise
from pathlib import Path

from services.expert.transport.header_blocks import encode_headers
from services.expert.transport.http2 import PREFACE, ClientStream, GrpcStream, ServerStream
from services.expert.transport.http2_errors import StreamEnded
from services.expert.transport.wire import COMPUTE_PATH

CORPUS = Path(__file__).parent / "frames_corpus.txt"
MAX_MESSAGE = 1 << 16
OPENING_HEADERS = encode_headers((":method", "POST"), (":path", COMPUTE_PATH), ("content-type", "application/grpc"))
OPENED = PREFACE + len(OPENING_HEADERS).to_bytes(3, "big") + b"\1\4\0\0\0\1" + OPENING_HEADERS
REPLY = bytes(70_000)  # does not fit into the first window


def check(data: bytes) -> None:
    """Raise AssertionError, or the error of a bug, if a stream handles `data` wrongly.

    The first byte chooses who gets the rest, and where the rest is cut. What comes out may not depend on the cuts.
    """
    if not data:
        return
    kind, rest = data[0], data[1:]
    whole = _outcome(kind & 3, [rest])
    assert _outcome(kind & 3, _pieces(rest, 1 + (kind >> 2))) == whole


def _pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start:end] for start, end in pairwise([*range(0, len(data), size), len(data)])]


def _outcome(kind: int, pieces: list[bytes]) -> tuple[list[bytes], str, bytes]:
    """Return the messages, the sentence of the error if one was raised, and the bytes to be sent."""
    stream: GrpcStream
    if kind == 0:
        stream = ClientStream(COMPUTE_PATH, "host", MAX_MESSAGE)
    else:
        stream = ServerStream(COMPUTE_PATH, MAX_MESSAGE)
        stream.receive(OPENED if kind > 1 else PREFACE)
        if kind > 2:
            stream.send(REPLY)
            stream.end()  # type: ignore[attr-defined]
    messages, sentence = list[bytes](), ""
    try:
        for piece in pieces:
            messages += stream.receive(piece)
    except StreamEnded as error:
        sentence = str(error)
    if stream.failure is not None:
        sentence = str(stream.failure)
    return messages, sentence, bytes(stream.unsent)


def corpus() -> list[bytes]:
    return [base64.b64decode(line) for line in CORPUS.read_text().splitlines()]


def fuzz(folder: Path) -> None:
    import atheris  # type: ignore[import-not-found]

    folder.mkdir(exist_ok=True)
    for n, data in enumerate(corpus()):
        (folder / f"corpus-{n}").write_bytes(data)
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], "-max_len=3000", str(folder)], check)
    atheris.Fuzz()


def pack(folder: Path) -> None:
    lines = sorted({base64.b64encode(path.read_bytes()).decode() for path in folder.iterdir()})
    CORPUS.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    {"fuzz": fuzz, "pack": pack}[sys.argv[1]](Path(sys.argv[2]))
