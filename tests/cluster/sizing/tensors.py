"""The generators list the tensors of public checkpoints by name and shape, as an oracle for model sizes.

Names and shapes are taken from model cards and loaders, and shapes are written out in numbers. A tensor is fp32 if its
name ends with an entry of FP32, else bf16. The functions whose names end in `_bytes` compute the bytes of a tensor in a
quantized checkpoint from the tensor's name and shape alone, without the scale of its inputs, which is not served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, prod

from cluster.sizing.weight_formats import Dtype

Tensor = tuple[str, tuple[int, ...]]
FP32 = ("e_score_correction_bias",)
SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
ULTRA = "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def nemotron_super() -> Iterator[Tensor]:
    yield from _nemotron(SUPER, 4096, (18560, 8192, 10240, 128), (4096, 256), (512, 1024, 2688, 5376), has_mtp=True)


def nemotron_nano() -> Iterator[Tensor]:
    yield from _nemotron(NANO, 2688, (10304, 4096, 6144, 64), (4096, 256), (128, 0, 1856, 3712), has_mtp=False)


def nemotron_ultra() -> Iterator[Tensor]:
    yield from _nemotron(ULTRA, 8192, (35072, 16384, 18432, 256), (8192, 256), (512, 2048, 5120, 10240), has_mtp=True)


def _nemotron(
    pattern: str,
    hidden: int,
    mamba: tuple[int, int, int, int],
    attention: tuple[int, int],
    moe: tuple[int, int, int, int],
    has_mtp: bool,
) -> Iterator[Tensor]:
    """Yield the tensors of a Nemotron checkpoint.

    - `mamba`: the rows of in_proj, d_inner, conv_dim and the number of heads.
    - `attention`: the rows of the query projection, and the rows of the key projection or the value projection.
    - `moe`: the number of experts, the latent width (0: none), the expert's width, and the shared expert's width.
    """
    rows, inner, conv, heads = mamba
    queries, kv = attention
    num_experts, latent, width, shared = moe
    yield "backbone.embeddings.weight", (131072, hidden)
    yield "lm_head.weight", (131072, hidden)
    yield "backbone.norm_f.weight", (hidden,)

    def layer(stem: str, letter: str) -> Iterator[Tensor]:
        yield f"{stem}.norm.weight", (hidden,)
        mixer = f"{stem}.mixer"
        if letter == "M":
            yield f"{mixer}.in_proj.weight", (rows, hidden)
            yield f"{mixer}.out_proj.weight", (hidden, inner)
            yield f"{mixer}.conv1d.weight", (conv, 1, 4)
            yield f"{mixer}.conv1d.bias", (conv,)
            for name in ("A_log", "D", "dt_bias"):
                yield f"{mixer}.{name}", (heads,)
            yield f"{mixer}.norm.weight", (inner,)
        elif letter == "*":
            yield f"{mixer}.q_proj.weight", (queries, hidden)
            yield f"{mixer}.k_proj.weight", (kv, hidden)
            yield f"{mixer}.v_proj.weight", (kv, hidden)
            yield f"{mixer}.o_proj.weight", (hidden, queries)
        else:
            yield f"{mixer}.gate.weight", (num_experts, hidden)
            yield f"{mixer}.gate.e_score_correction_bias", (num_experts,)
            if latent:
                yield f"{mixer}.fc1_latent_proj.weight", (latent, hidden)
                yield f"{mixer}.fc2_latent_proj.weight", (hidden, latent)
            yield f"{mixer}.shared_experts.up_proj.weight", (shared, hidden)
            yield f"{mixer}.shared_experts.down_proj.weight", (hidden, shared)
            for expert in range(num_experts):
                yield f"{mixer}.experts.{expert}.up_proj.weight", (width, latent or hidden)
                yield f"{mixer}.experts.{expert}.down_proj.weight", (latent or hidden, width)

    for i, letter in enumerate(pattern):
        yield from layer(f"backbone.layers.{i}", letter)
    if has_mtp:
        for name in ("enorm", "hnorm"):
            yield f"mtp.layers.0.{name}.weight", (hidden,)
        yield "mtp.layers.0.eh_proj.weight", (hidden, 2 * hidden)
        yield from layer("mtp.layers.0", "*")
        yield from layer("mtp.layers.1", "E")
        yield "mtp.layers.1.final_layernorm.weight", (hidden,)


def deepseek_v3() -> Iterator[Tensor]:
    yield "model.embed_tokens.weight", (129280, 7168)
    yield "lm_head.weight", (129280, 7168)
    yield "model.norm.weight", (7168,)
    for i in range(62):  # The last of these layers is the MTP layer.
        stem = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{stem}.{norm}.weight", (7168,)
        yield f"{stem}.self_attn.q_a_proj.weight", (1536, 7168)
        yield f"{stem}.self_attn.q_a_layernorm.weight", (1536,)
        yield f"{stem}.self_attn.q_b_proj.weight", (24576, 1536)
        yield f"{stem}.self_attn.kv_a_proj_with_mqa.weight", (576, 7168)
        yield f"{stem}.self_attn.kv_a_layernorm.weight", (512,)
        yield f"{stem}.self_attn.kv_b_proj.weight", (32768, 512)
        yield f"{stem}.self_attn.o_proj.weight", (7168, 16384)
        if i < 3:
            yield from _gated(f"{stem}.mlp", 7168, 18432)
            continue
        yield f"{stem}.mlp.gate.weight", (256, 7168)
        yield f"{stem}.mlp.gate.e_score_correction_bias", (256,)
        yield from _gated(f"{stem}.mlp.shared_experts", 7168, 2048)
        for expert in range(256):
            yield from _gated(f"{stem}.mlp.experts.{expert}", 7168, 2048)
    yield "model.layers.61.embed_tokens.weight", (129280, 7168)
    yield "model.layers.61.shared_head.head.weight", (129280, 7168)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"model.layers.61.{norm}.weight", (7168,)
    yield "model.layers.61.eh_proj.weight", (7168, 14336)


def qwen3_coder_next(has_mtp: bool = False) -> Iterator[Tensor]:
    yield "model.embed_tokens.weight", (151936, 2048)
    yield "lm_head.weight", (151936, 2048)
    yield "model.norm.weight", (2048,)

    def layer(stem: str, is_full: bool) -> Iterator[Tensor]:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{stem}.{norm}.weight", (2048,)
        if is_full:
            yield f"{stem}.self_attn.q_proj.weight", (8192, 2048)
            yield f"{stem}.self_attn.k_proj.weight", (512, 2048)
            yield f"{stem}.self_attn.v_proj.weight", (512, 2048)
            yield f"{stem}.self_attn.o_proj.weight", (2048, 4096)
            yield f"{stem}.self_attn.q_norm.weight", (256,)
            yield f"{stem}.self_attn.k_norm.weight", (256,)
        else:
            yield f"{stem}.linear_attn.in_proj_qkvz.weight", (12288, 2048)
            yield f"{stem}.linear_attn.in_proj_ba.weight", (64, 2048)
            yield f"{stem}.linear_attn.conv1d.weight", (8192, 1, 4)
            yield f"{stem}.linear_attn.A_log", (32,)
            yield f"{stem}.linear_attn.dt_bias", (32,)
            yield f"{stem}.linear_attn.norm.weight", (128,)
            yield f"{stem}.linear_attn.out_proj.weight", (2048, 4096)
        yield f"{stem}.mlp.gate.weight", (512, 2048)
        yield from _gated(f"{stem}.mlp.shared_expert", 2048, 512)
        yield f"{stem}.mlp.shared_expert_gate.weight", (1, 2048)
        for expert in range(512):
            yield from _gated(f"{stem}.mlp.experts.{expert}", 2048, 512)

    for i in range(48):
        yield from layer(f"model.layers.{i}", is_full=i % 4 == 3)
    if has_mtp:
        yield "mtp.fc.weight", (2048, 4096)
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            yield f"mtp.{norm}.weight", (2048,)
        yield from layer("mtp.layers.0", is_full=True)


def _gated(stem: str, hidden: int, width: int) -> Iterator[Tensor]:
    yield f"{stem}.gate_proj.weight", (width, hidden)
    yield f"{stem}.up_proj.weight", (width, hidden)
    yield f"{stem}.down_proj.weight", (hidden, width)


# Bytes ----------------------------------------------------------------------------------------------------------------


def plain_bytes(name: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * (4 if name.endswith(FP32) else 2)


def fp8_bytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of an FP8 tensor: one byte per number, and an fp32 scale."""
    return prod(shape) + 4


def fp8_block_bytes(shape: tuple[int, ...]) -> int:
    rows, columns = shape
    return rows * columns + 4 * ceil(rows / 128) * ceil(columns / 128)


def nvfp4_bytes(shape: tuple[int, ...]) -> int:
    """Return the bytes of an NVFP4 tensor: two codes per byte, a one-byte scale for 16 codes, and an fp32 scale."""
    rows, columns = shape
    return rows * columns // 2 + rows * columns // 16 + 4


def super_nvfp4_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor in the public NVFP4 checkpoint of Nemotron 3 Super, which mixes formats.

    If only the number of quantized layers is known, the first layers count as quantized.
    """
    if name.startswith("mtp."):
        return plain_bytes(name, shape)
    if ".experts." in name or name.endswith("layers.1.mixer.shared_experts.down_proj.weight"):
        return nvfp4_bytes(shape)
    parts = name.split(".")
    layer = int(parts[2]) if parts[1] == "layers" else -1
    nth = SUPER[:layer].count(SUPER[layer])  # The number of earlier layers of the same kind.
    is_fp8 = {
        "in_proj": nth < 28,
        "out_proj": nth < 29,
        "o_proj": layer in (69, 78),
        "fc1_latent_proj": layer in (1, 3, 5),
        "fc2_latent_proj": layer == 3,
        "up_proj": nth < 39,
        "down_proj": 1 <= nth < 38,
    }
    return fp8_bytes(shape) if is_fp8.get(parts[-2], False) else plain_bytes(name, shape)


def super_fp8_bytes(name: str, shape: tuple[int, ...]) -> int:
    is_fp8 = not name.startswith("mtp.") and any(part in name for part in ("experts.", "in_proj", "out_proj"))
    return fp8_bytes(shape) if is_fp8 else plain_bytes(name, shape)


def nano_bytes(name: str, shape: tuple[int, ...], quantized_bytes: Callable[[tuple[int, ...]], int]) -> int:
    """Return the bytes of a tensor in the public FP8 and NVFP4 checkpoints of Nemotron 3 Nano.

    The checkpoints quantize everything except the head, attention, convolutions, routers, and the six Mamba layers that
    precede an attention layer.
    """
    is_kept = any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "conv1d", "norm"))
    before = any(f".layers.{layer}." in name for layer in (4, 11, 18, 25, 32, 41))
    is_linear = name.endswith("proj.weight")
    return quantized_bytes(shape) if is_linear and not is_kept and not before else plain_bytes(name, shape)


def nano_fp8_bytes(name: str, shape: tuple[int, ...]) -> int:
    return nano_bytes(name, shape, fp8_bytes)


def nano_nvfp4_bytes(name: str, shape: tuple[int, ...]) -> int:
    return nano_bytes(name, shape, nvfp4_bytes)


def ultra_nvfp4_bytes(name: str, shape: tuple[int, ...]) -> int:
    if not name.startswith("mtp."):
        if ".experts." in name:
            return nvfp4_bytes(shape)
        if any(part in name for part in ("shared_experts.", "in_proj", "out_proj")):
            return fp8_bytes(shape)
    return plain_bytes(name, shape)


def deepseek_fp8_bytes(name: str, shape: tuple[int, ...]) -> int:
    is_fp8 = "proj" in name and "eh_proj" not in name
    return fp8_block_bytes(shape) if is_fp8 else plain_bytes(name, shape)


def qwen_fp8_bytes(name: str, shape: tuple[int, ...]) -> int:
    is_fp8 = "proj" in name and "in_proj_ba" not in name
    return fp8_block_bytes(shape) if is_fp8 else plain_bytes(name, shape)


def deepseek_nvfp4_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor in NVIDIA's NVFP4 checkpoint of DeepSeek-V3-0324, whose last layer stays bf16."""
    is_quantized = ".mlp." in name and name.endswith("_proj.weight") and ".layers.61." not in name
    return nvfp4_bytes(shape) if is_quantized else plain_bytes(name, shape)


def qwen_nvfp4_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor in NVIDIA's NVFP4 checkpoints of Qwen3-Next, with the outputs of all mixers."""
    is_quantized = (
        "experts." in name or ".shared_expert." in name or name.endswith(("o_proj.weight", "out_proj.weight"))
    )
    return nvfp4_bytes(shape) if is_quantized and not name.startswith("mtp.") else plain_bytes(name, shape)


CHECKPOINTS: dict[str, tuple[str, Dtype, Callable[[], Iterator[Tensor]], Callable[[str, tuple[int, ...]], int]]] = {
    "super-bf16": ("Nemotron-3-Super", "bf16", nemotron_super, plain_bytes),
    "super-fp8": ("Nemotron-3-Super", "fp8", nemotron_super, super_fp8_bytes),
    "super-nvfp4": ("Nemotron-3-Super", "nvfp4", nemotron_super, super_nvfp4_bytes),
    "nano-bf16": ("Nemotron-3-Nano", "bf16", nemotron_nano, plain_bytes),
    "nano-fp8": ("Nemotron-3-Nano", "fp8", nemotron_nano, nano_fp8_bytes),
    "nano-nvfp4": ("Nemotron-3-Nano", "nvfp4", nemotron_nano, nano_nvfp4_bytes),
    "ultra-bf16": ("Nemotron-3-Ultra", "bf16", nemotron_ultra, plain_bytes),
    "ultra-nvfp4": ("Nemotron-3-Ultra", "nvfp4", nemotron_ultra, ultra_nvfp4_bytes),
    "deepseek-bf16": ("DeepSeek-V3", "bf16", deepseek_v3, plain_bytes),
    "deepseek-fp8": ("DeepSeek-V3", "fp8", deepseek_v3, deepseek_fp8_bytes),
    "deepseek-nvfp4": ("DeepSeek-V3", "nvfp4", deepseek_v3, deepseek_nvfp4_bytes),
    "qwen-bf16": ("Qwen3-Coder-Next", "bf16", qwen3_coder_next, plain_bytes),
    "qwen-fp8": ("Qwen3-Coder-Next", "fp8", qwen3_coder_next, qwen_fp8_bytes),
    "qwen-nvfp4": ("Qwen3-Coder-Next", "nvfp4", qwen3_coder_next, qwen_nvfp4_bytes),
}
