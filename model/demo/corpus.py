"""The demo model's text is the Python standard library; one file in twenty is held out for measuring."""

from __future__ import annotations

import hashlib
import lzma
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
EOS, IM_END = 2, 4
VOCAB_SIZE = 2048
HELD_OUT_SHARE = 20  # one file in 20 is held out


def is_held_out(name: str) -> bool:
    """Return True for one file in twenty, chosen by a hash of the name, so that all machines choose the same files."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def read_corpus() -> tuple[list[str], list[str]]:
    """Read and return the list of training texts and the list of held-out texts, in the order of the file names.

    Files that are not UTF-8 are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    split: tuple[list[str], list[str]] = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith("site-packages/"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            split[is_held_out(name)].append(text)
    return split


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer, which can encode every text and can decode every sequence of tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Encode all texts, each followed by EOS, and return the token ids as one int64 array."""
    pieces = [np.array([*encoding.ids, EOS]) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(pieces)


def xz_bits_per_byte(texts: list[str]) -> float:
    """Return the bits per byte of `xz -9` for all texts in one stream, which xz compresses better than single files."""
    data = "".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
