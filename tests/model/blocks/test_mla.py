"""The tests check that no bit of MLA depends on how the work is divided, and which FP8 blocks are kept.

`test_deepseek_v3.py` compares MLA with its equations.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.blocks.mixer import ResidualBlock
from model.blocks.mla import MLA
from model.blocks.norm import RMSNorm
from model.blocks.rope import Rope
from model.configs.mixer_shapes import MLAShape
from model.configs.rope_shape import RopeShape
from model.configs.state_spec import StateSpec
from model.cpu import mla as cpu_mla
from model.encoder import encode
from model.state import Batch, State
from model.stored_matrix import StoredMatrix
from tests.model.steps import relative_error, seeded

SHAPE = MLAShape(40, 7, 24, 35, 10, 6, 13)
LENS = (70, 1, 1, 33, 1, 5, 1, 1, 1, 1, 1, 1)


def make_block(shape: MLAShape, seed: int = 0) -> ResidualBlock:
    randn = seeded(seed)
    mixer = MLA(shape, Rope(RopeShape(shape.rope_dim, 10_000.0, True)), 0.3, layer=0).requires_grad_(False)
    for parameter in mixer.parameters():
        if parameter.dim() == 2:
            parameter.copy_(randn(*parameter.shape) / parameter.shape[1] ** 0.5)
    return ResidualBlock(RMSNorm(shape.hidden_size, 1e-6).requires_grad_(False), mixer)


def make_batch(lens: tuple[int, ...] = LENS, contexts: tuple[int, ...] | None = None) -> Batch:
    tables = tuple(tuple(range(8 * r, 8 * r + 8)) for r in range(len(lens)))
    contexts = contexts or (0,) * len(lens)
    return Batch(torch.zeros(sum(lens), dtype=torch.long), lens, contexts, tuple(range(len(lens))), tables)


def run(block: ResidualBlock, x_TD: Tensor, batch: Batch, state: State | None = None) -> Tensor:
    shape = block.mixer.shape
    state = state or State(StateSpec((shape.state_spec(0),), ()), 1, 8 * len(batch.lens), torch.float32)
    out: Tensor = block(x_TD.clone(), batch, state)
    return out


def packed(block: ResidualBlock) -> ResidualBlock:
    block.pack(torch.float32)
    return block


@pytest.fixture
def two_threads() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        MLAShape(33, 1, None, 5, 1, 2, 1),
        MLAShape(8, 2, 3, 32, 64, 2, 33),
        MLAShape(64, 17, 16, 64, 32, 64, 32),
        MLAShape(16, 3, None, 130, 16, 30, 65),
    ],
    ids=str,
)
def test_the_kernels_equal_plain_pytorch(shape: MLAShape) -> None:
    x = seeded(1)(sum(LENS), shape.hidden_size)
    plain = run(make_block(shape), x, make_batch())
    assert relative_error(run(packed(make_block(shape)), x, make_batch()), plain) < 1e-5


@pytest.mark.parametrize("num_heads", [1, 2, 5, 7])
def test_the_number_of_heads_of_a_task_changes_no_bit(monkeypatch: pytest.MonkeyPatch, num_heads: int) -> None:
    x, block = seeded(1)(sum(LENS), SHAPE.hidden_size), packed(make_block(SHAPE))
    usual = run(block, x, make_batch())
    monkeypatch.setattr(cpu_mla, "MIN_HEADS", num_heads)
    monkeypatch.setattr(cpu_mla, "MAX_HEADS", num_heads)
    assert torch.equal(run(block, x, make_batch()), usual)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    x, block = seeded(1)(sum(LENS), SHAPE.hidden_size), packed(make_block(SHAPE))
    alone = run(block, x, make_batch())
    monkeypatch.setattr(cpu_mla, "MIN_WORK_TO_SHARE", 0)
    for _ in range(5):
        assert torch.equal(run(block, x, make_batch()), alone)


def test_every_cut_of_a_prompt_gives_the_same_bits() -> None:
    x, block = seeded(1)(70, SHAPE.hidden_size), packed(make_block(SHAPE))
    whole = run(block, x, make_batch((70,)))
    for cut in range(1, 70):
        state = State(StateSpec((SHAPE.state_spec(0),), ()), 1, 8, torch.float32)
        first = run(block, x[:cut], make_batch((cut,)), state)
        second = run(block, x[cut:], make_batch((70 - cut,), (cut,)), state)
        assert torch.equal(torch.cat([first, second]), whole), cut


@pytest.mark.parametrize(
    ("sizes", "is_kept"),
    [((128, 128), True), ((256, 128), True), ((128, 64), False), ((64, 64), False)],
    ids=str,
)
def test_fp8_blocks_give_the_bits_of_their_dequantized_weights(sizes: tuple[int, int], is_kept: bool) -> None:
    """Check that blocks are kept if they end where keys and values end; rows of the latents' blocks may be fewer."""
    shape = MLAShape(40, 2, None, 200, sizes[0], 6, sizes[1])
    x, block = seeded(1)(20, 40), make_block(shape)
    stored = encode(block.mixer.kv_b_proj.weight, "fp8_blocks")
    block.mixer.kv_b_proj.keep_stored(stored)
    other = make_block(shape)
    other.mixer.kv_b_proj.keep_stored(StoredMatrix.plain(stored.dequantized()))
    found = run(packed(block), x, make_batch((20,)))
    assert torch.equal(found, run(packed(other), x, make_batch((20,))))
    kinds = {matrix.kind for matrices in block.mixer.packed for matrix in matrices}
    assert kinds == ({"e4m3"} if is_kept else {"fp32"})
