import numpy as np
import torch

from services.engine.sampling.noise import PIECE, draw_tokens, uniforms, uniforms_on_device


def words(seed: int, position: int) -> list[int]:
    """Return the first block's four words; of words 2 and 4 only the upper 20 bits, which the uniforms contain."""
    bits = [int(u * 2**52 - 0.5) for u in uniforms(seed, position, 2)]
    return [bits[0] >> 20, bits[0] & 0xFFFFF, bits[1] >> 20, bits[1] & 0xFFFFF]


def test_the_noise_is_philox() -> None:
    # These are Random123's known answers (kat_vectors, philox4x32 10) for a counter and a key of zeros.
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(0, 0) == [known[0], known[1] >> 12, known[2], known[3] >> 12]


def test_the_noise_is_a_function_of_seed_position_and_id() -> None:
    assert np.array_equal(uniforms(7, 3, 1000), uniforms(7, 3, 2001)[:1000])
    firsts = {uniforms(seed, position, 1)[0] for seed in (-1, 0, 1, 2**40, 2**63 - 1) for position in range(100)}
    assert len(firsts) == 500
    assert np.array_equal(uniforms(-1, 3, 9), uniforms(2**64 - 1, 3, 9)), "seeds are taken modulo 2 ** 64"


def test_the_noise_is_uniform_and_unrelated_along_each_axis() -> None:
    noise = np.stack([uniforms(5, position, 512) for position in range(512)])
    assert 0 < noise.min() < 1e-4
    assert 1 - 1e-4 < noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.003
    counts = np.histogram(noise, bins=64, range=(0, 1))[0]
    # Chi-squared with 63 degrees of freedom exceeds 104 in 0.1 % of cases.
    assert ((counts - noise.size / 64) ** 2 / (noise.size / 64)).sum() < 104
    for shifted, original in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[:, 2:], noise[:, :-2])):
        assert abs(np.corrcoef(shifted.ravel(), original.ravel())[0, 1]) < 0.01


def test_torch_makes_the_same_noise() -> None:
    seeds, positions = np.array([5, 2**64 - 1, 2**33], dtype=np.uint64), np.array([0, 9, 2**40 + 3], dtype=np.uint64)
    for vocab_size in (1, 7, 1024):
        expected = np.stack([uniforms(int(s), int(p), vocab_size) for s, p in zip(seeds, positions, strict=True)])
        assert np.array_equal(uniforms_on_device(seeds, positions, vocab_size, torch.device("cpu")).numpy(), expected)


def test_a_draw_is_the_largest_weight_over_exponential_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (1, 2, PIECE - 1, PIECE + 1, 3000):
        for sharpness in (0.1, 3, 30):
            weights = torch.softmax(sharpness * torch.randn(20, vocab_size, generator=generator), dim=-1)
            keys = [(seed, 17 * seed) for seed in range(20)]
            noise = torch.from_numpy(np.stack([uniforms(*key, vocab_size) for key in keys]))
            assert draw_tokens(weights, keys) == (weights / -torch.log1p(-noise)).argmax(dim=-1).tolist()


def test_weight_zero_is_never_drawn() -> None:
    weights = torch.zeros(2000, 700)
    weights[:, 690] = 1e-38
    assert set(draw_tokens(weights, [(0, position) for position in range(2000)])) == {690}
