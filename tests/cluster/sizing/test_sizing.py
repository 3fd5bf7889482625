"""The tests show that a sizing suffices, that fewer GPUs do not, and that a harder SLO never needs fewer GPUs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import ceil, comb
from typing import Any

import numpy as np
import pytest

from cluster.placement.capacity import check_capacity
from cluster.placement.planner import plan
from cluster.sizing.fit import GIB, Fit, Slo
from cluster.sizing.gpus import GB, GPUS, Gpu, gpu_of
from cluster.sizing.known_models import known_config, known_models
from cluster.sizing.model_sizes import model_sizes
from cluster.sizing.sizing import Sizing, size
from cluster.sizing.step_time import StepCosts, shards_of_token, touched_experts, unique_shards, wire_of
from cluster.sizing.weight_formats import DTYPES, Dtype
from cluster.topology import LayerSpec, Shard
from model.configs.expert_memory import pinned_bytes
from tests.cluster.sizing.test_model_sizes import TINY

H200 = GPUS["h200"]
SLOW = Slo(itl_ms=10_000.0)  # With so much time between tokens, memory alone decides.
NUM_HOMES = 2


def fleet_of(sizing: Sizing) -> list[Shard]:
    return [
        Shard(
            *(f"s{i}", "", f"node-{i}", "experts", "cuda", ""),
            memory_budget=sizing.shard_memory_bytes,
            host_budget=sizing.shard_host_bytes,
        )
        for i in range(sizing.expert_gpus)
    ]


def layers_of(config: dict[str, Any], dtype: Dtype) -> tuple[LayerSpec, ...]:
    return model_sizes(config).layer_specs(dtype)


def every_sizing(gpus: tuple[str, ...], slo: Slo = SLOW) -> list[tuple[str, Sizing]]:
    return [
        (name, size(known_config(name), GPUS[gpu], dtype, slo))
        for name, gpu, dtype in product(known_models(), gpus, DTYPES)
    ]


# The wire


@pytest.mark.parametrize(
    ("num_shards", "nemotron", "deepseek", "qwen", "nano"),
    [
        (2, 2.00, 1.99, 2.00, 1.97),
        (4, 3.99, 3.61, 3.78, 3.32),
        (8, 7.60, 5.29, 5.92, 4.47),
        (16, 12.25, 6.52, 7.66, 5.22),
        (32, 16.32, 7.27, 8.77, 5.65),
        (64, 19.07, 7.68, 9.40, 5.88),
    ],
)
def test_a_token_goes_to_as_many_shards_as_uniform_picks_do(
    num_shards: int, nemotron: float, deepseek: float, qwen: float, nano: float
) -> None:
    shapes = {(512, 22): nemotron, (256, 8): deepseek, (512, 10): qwen, (128, 6): nano}
    for (num_experts, top_k), expected in shapes.items():
        assert unique_shards(num_experts, top_k, num_shards) == pytest.approx(expected, abs=0.005)


def test_unequal_shares_are_counted_one_by_one() -> None:
    """Check the case of 7 experts on 3 shards (3, 2 and 2) and 2 picks by counting all pairs."""
    shard_of = [0, 0, 0, 1, 1, 2, 2]
    pairs = [(a, b) for a in range(7) for b in range(a)]
    mean = sum(len({shard_of[a], shard_of[b]}) for a, b in pairs) / comb(7, 2)
    assert unique_shards(7, 2, 3) == pytest.approx(mean)
    assert unique_shards(7, 2, 50) == pytest.approx(2)  # There are more shards than experts.


@pytest.mark.parametrize("num_shards", [7, 8, 16])
def test_groups_limit_a_token_to_the_shards_that_the_planner_gives_them(num_shards: int) -> None:
    """Check DeepSeek's router (8 of 256 experts, from 4 of 8 groups) on the planner's own placement."""
    nbytes, rng = 1000, np.random.default_rng(1)
    memory = 256 * nbytes // num_shards + 3 * nbytes  # The experts have one home each, as in large fleets.
    shards = [Shard(f"s{i}", "", f"node-{i}", "experts", "cuda", "", memory_budget=memory) for i in range(num_shards)]
    homes = plan((LayerSpec(0, 256, nbytes, 8),), shards, None, {}).homes[0]
    found = []
    for _ in range(3000):
        groups = rng.choice(8, 4, replace=False)
        picks = rng.choice(np.concatenate([np.arange(32) + 32 * group for group in groups]), 8, replace=False)
        found.append(len({homes[int(expert)][0] for expert in picks}))
    assert unique_shards(256, 8, num_shards, 8, 4) == pytest.approx(float(np.mean(found)), rel=0.01)
    assert unique_shards(256, 8, num_shards, 8, 4) > unique_shards(256, 8, num_shards)
    deepseek = model_sizes(known_config("deepseek-v3"))
    assert shards_of_token(deepseek, num_shards) == unique_shards(256, 8, num_shards, 8, 4)


def test_a_batch_touches_as_many_experts_as_random_ones_do() -> None:
    rng = np.random.default_rng(1)
    found = [len({e for _ in range(32) for e in rng.choice(512, 22, replace=False)}) for _ in range(40)]
    assert touched_experts(512, 22, 32) == pytest.approx(float(np.mean(found)), rel=0.01)
    assert touched_experts(512, 22, 1) == pytest.approx(22)


@pytest.mark.parametrize(
    ("name", "row_and_sum_bf16"),
    [("super", 4096), ("ultra", 8192), ("deepseek-v3", 28_672), ("qwen3-coder-next", 8192), ("nano", 10_752)],
)
def test_the_wire_carries_a_row_and_a_sum_for_each_shard(name: str, row_and_sum_bf16: int) -> None:
    """Check the bytes of a token on the wire.

    Each number of a sum takes 4 bytes on the wire, so that the order of additions cannot change a token. The figures in
    `row_and_sum_bf16` count only 2 bytes.
    """
    sizes = model_sizes(known_config(name))
    assert 2 * 2 * sizes.experts.input_dim == row_and_sum_bf16
    wire, shards = wire_of(sizes, 8), shards_of_token(sizes, 8)
    num_layers, row = len(sizes.main_layers), row_and_sum_bf16 // 2
    picks = 12 * sizes.experts.top_k
    assert wire.out == pytest.approx(num_layers * (shards * (row + 2) + picks), abs=1)
    assert wire.back == pytest.approx(num_layers * shards * 2 * row, abs=1)
    assert wire.total == wire.out + wire.back


# Memory


@pytest.mark.parametrize("gpu", ["l40s", "h100", "h200", "b200"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", known_models())
def test_what_is_sized_fits(name: str, dtype: Dtype, gpu: str) -> None:
    config, slo = known_config(name), Slo(itl_ms=60_000.0)
    if ("Ultra" in name, gpu) == (True, "l40s"):
        with pytest.raises(ValueError, match="a backbone is one GPU"):
            size(config, GPUS[gpu], dtype, slo)
        return
    sizing = size(config, GPUS[gpu], dtype, slo)
    memory, layers = GPUS[gpu].memory_bytes, layers_of(config, dtype)
    assert sizing.backbone_weight_bytes + sizing.state_memory_bytes <= memory
    per_request = sizing.kv_bytes_per_request + sizing.state_bytes_per_request + sizing.draft_bytes_per_request
    assert sizing.requests_per_backbone * per_request <= 0.75 * sizing.state_memory_bytes
    assert sizing.backbone_gpus * sizing.requests_per_backbone >= slo.num_requests
    assert sizing.shard_memory_bytes <= memory
    check_capacity(layers, fleet_of(sizing), NUM_HOMES)
    check_capacity(layers, fleet_of(sizing)[1:], NUM_HOMES)  # One shard is lost.


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_one_shard_less_would_be_too_few(gpu: str) -> None:
    """Check that a fleet with one shard less would have too little memory.

    Either the experts would not fit after the loss of one more shard, or the fleet would have less memory than 1.1
    times the experts' size, and so too little for additional homes of hot experts. The second reason applies to large
    fleets, of which one shard is a small part.
    """
    for name, sizing in every_sizing((gpu,), Slo(num_requests=1, itl_ms=60_000.0, context_len=1)):
        layers = layers_of(known_config(name), sizing.dtype)
        left = len(fleet_of(sizing)) - 2  # One shard less, and one shard lost.
        largest = max(spec.on_device("cuda") for spec in layers)
        holds_less = left * (sizing.shard_memory_bytes - 2 * largest) < sizing.experts_bytes
        assert holds_less or (left + 1) * sizing.shard_memory_bytes < 1.1 * sizing.experts_bytes


LARGE = {  # With few and large experts (60.1 GB in 96 experts), the planner needs little time.
    **TINY,
    "hidden_size": 1024,
    "hybrid_override_pattern": "MEMEMEMEMEME",
    "num_hidden_layers": 12,
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "moe_latent_size": 8192,
    "moe_intermediate_size": 19_100,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize("gpu", ["l4", "l40s", "h100"])
def test_the_planner_finds_two_homes_and_one_after_any_loss(gpu: str) -> None:
    sizing = size(LARGE, GPUS[gpu], slo=SLOW)
    layers, shards = layers_of(LARGE, "bf16"), fleet_of(sizing)
    assert (sizing.device_homes, sizing.expert_gpus) == {"l4": (1, 4), "l40s": (1, 3), "h100": (2, 2)}[gpu]
    plans = [plan(layers, shards, None, {})]
    plans += [plan(layers, shards[:lost] + shards[lost + 1 :], None, {}) for lost in range(len(shards))]
    for planned, num_live in zip(plans, [len(shards)] + len(shards) * [len(shards) - 1], strict=True):
        assert planned.cover_after == min(NUM_HOMES, num_live)
        assert all(ids for homes in planned.homes.values() for ids in homes)  # Every expert has a home on a device.
    has_standby = any(ids for planned in plans for homes in planned.standby.values() for ids in homes)
    assert has_standby == (sizing.device_homes == 1)


def test_second_homes_are_in_host_memory_where_gpus_lack_the_room() -> None:
    sizing = size(known_config("super"), H200, "bf16", SLOW)
    assert (sizing.backbone_gpus, sizing.expert_gpus, sizing.device_homes) == (1, 3, 1)
    assert sizing.experts_bytes == 41 * 512 * 11_010_048
    assert sizing.host_homes_bytes == 41 * 512 * pinned_bytes([11_010_048]) <= 1.001 * sizing.experts_bytes
    assert sizing.shard_host_bytes == 119 * GIB  # 1.1 times half of the experts: two shards are left when one is lost.
    assert sizing.shard_pod_memory_bytes == sizing.shard_host_bytes + 16 * GIB
    roomy = size(known_config("super"), replace(H200, memory_bytes=400 * GB), "bf16", SLOW)
    assert (roomy.expert_gpus, roomy.device_homes, roomy.shard_host_bytes) == (2, 2, 0)


@pytest.mark.parametrize("name", known_models())
def test_on_gpus_quantized_weights_take_the_memory_and_the_time_of_bf16(name: str) -> None:
    """Check that only the checkpoint and the standbys in host memory are smaller in FP8 and NVFP4."""
    plain, fp8, nvfp4 = (size(known_config(name), H200, dtype, SLOW) for dtype in DTYPES)
    for quantized in (fp8, nvfp4):
        assert quantized.checkpoint_bytes < plain.checkpoint_bytes
        assert quantized.shard_host_bytes <= plain.shard_host_bytes
        smaller = ("dtype", "checkpoint_bytes", "shard_host_bytes", "host_homes_bytes", "shard_pod_memory_bytes")
        read = ("volume_bytes", "backbone_read_bytes", "shard_read_bytes", "start_bytes_per_s")
        same = {field: getattr(plain, field) for field in (*smaller, *read, "reasons")}
        assert replace(quantized, **same) == plain
    assert not nvfp4.shard_host_bytes or nvfp4.shard_host_bytes < plain.shard_host_bytes


def test_memory_alone_asks_for_a_second_backbone() -> None:
    fit = Fit(model_sizes(known_config("super")), H200, "bf16", SLOW)
    most = fit.max_requests
    for num_requests, expected in ((most, 1), (most + 1, 2), (2 * most, 2), (2 * most + 1, 3)):
        slo = replace(SLOW, num_requests=num_requests, itl_ms=100_000.0)
        sizing = size(known_config("super"), H200, "bf16", slo)
        assert sizing.backbone_gpus == expected
    assert sizing.reasons[0].startswith("Backbones: memory decides.")


def test_a_backbone_that_does_not_fit_is_one_sentence_with_gpus_that_do() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        size(known_config("ultra"), GPUS["l40s"], "bf16", SLOW)
    assert str(caught.value) == (
        "a backbone is one GPU: 69.2 GB of bf16 weights and one request of 8,192 tokens need 70.3 GB, and l40s has "
        "42.9 GB for them; a100 or h100 or h200 or b200 is enough"
    )
    size(known_config("ultra"), GPUS["a100"], "bf16", SLOW)
    with pytest.raises(ValueError, match=r"none of l4, .*, b200 is enough$"):
        size({**known_config("ultra"), "hidden_size": 10**6}, GPUS["l40s"], "bf16", SLOW)


# Step time


def test_a_fleet_is_as_fast_as_wanted_and_one_gpu_less_is_not() -> None:
    for name, num_requests, itl_ms in product(("super", "deepseek-v3"), (1, 40, 200), (70.0, 100.0, 300.0)):
        fit = Fit(model_sizes(known_config(name)), H200, "fp8", Slo(num_requests=num_requests, itl_ms=itl_ms))
        assert fit.fleet is not None
        assert fit.is_fast(*fit.fleet)
        total = sum(fit.fleet)
        for num_backbones in range(fit.fewest_backbones, total):
            num_shards = total - 1 - num_backbones
            assert num_shards < (fit.fewest_shards or 0) or not fit.is_fast(num_backbones, num_shards)


def test_a_step_reads_what_it_must() -> None:
    """Check the time of a step with one request to the Nano model on an H200.

    The step reads the backbone's weights once, six experts in each of 23 layers, and the state and the context of a
    request.
    """
    costs = StepCosts(model_sizes(known_config("nano")), H200, "bf16", call_ms=0.5)
    assert costs.calls_ms == 11.5
    backbone = 4.422e9 - 131_072 * 2688 * 2 + 1000 * 6144 + 2 * 49_082_368
    assert costs.backbone_ms(1, 1000) == pytest.approx(1e3 * backbone / (0.6 * 4.8e12), rel=0.001)
    experts = 23 * 6 * 19_955_712 / (0.8 * 2)
    assert costs.experts_ms(1, 1, 2) == pytest.approx(1e3 * experts / (0.6 * 4.8e12), rel=0.001)
    assert costs.experts_ms(3, 1, 2) == pytest.approx(3 * costs.experts_ms(1, 1, 2))
    one = 23 * 19_955_712  # The busiest shard reads at least one expert of each layer, even with many shards.
    assert costs.experts_ms(1, 1, 500) == pytest.approx(1e3 * one / (0.6 * 4.8e12), rel=0.001)
    assert costs.experts_ms(1, 1, 7) == pytest.approx(6 / 5.6 * costs.experts_ms(1, 1, 500))
    assert costs.experts_ms(4, 9, costs.max_useful_shards(4, 9)) == pytest.approx(costs.experts_ms(1, 1, 500))
    many = 2 * 100_000 * 6 * 9_977_856 * 23 / (0.8 * 2)  # Multiplying takes longer than reading here.
    assert costs.experts_ms(1, 100_000, 2) == pytest.approx(1e3 * many / (0.4 * 989e12), rel=0.001)


def test_what_no_number_of_gpus_can_do_is_one_sentence() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        size(known_config("super"), H200, "bf16", Slo(itl_ms=10.0))
    sentence = str(caught.value)
    assert sentence.startswith("no number of h200 decodes a token every 10 ms in bf16: the fastest fleet would take ")
    assert sentence.endswith("with 40 calls to shards of 0.4 ms; none of l4, l40s, a100, h100, h200, b200 is enough")
    fastest = float(sentence.split("would take ")[1].split(" ms")[0])
    size(known_config("super"), H200, "bf16", Slo(itl_ms=fastest + 0.1))
    with pytest.raises(ValueError, match="no number of h200"):
        size(known_config("super"), H200, "bf16", Slo(itl_ms=fastest - 0.1))


def numbers(sizing: Sizing) -> tuple[int, int]:
    return (
        sizing.num_gpus,
        sizing.backbone_gpus * sizing.backbone_weight_bytes + sizing.expert_gpus * sizing.shard_memory_bytes,
    )


@pytest.mark.parametrize("name", known_models())
def test_asking_for_more_never_takes_fewer_gpus(name: str) -> None:
    config, base = known_config(name), Slo(num_requests=32, itl_ms=200.0)
    harder: list[list[Slo]] = [
        [replace(base, num_requests=num) for num in (1, 2, 7, 32, 33, 100, 257, 1000, 20_000)],
        [replace(base, context_len=num) for num in (1, 100, 1024, 8192, 30_000, 131_072)],
        [replace(base, itl_ms=ms) for ms in (2000.0, 500.0, 200.0, 150.0, 120.0)],
        [replace(base, min_backbones=num) for num in (1, 2, 3, 8)],
        [replace(base, call_ms=ms) for ms in (0.0, 0.2, 0.4, 0.8)],
    ]
    for slos in harder:
        totals = [size(config, GPUS["b200"], "fp8", slo).num_gpus for slo in slos]
        assert totals == sorted(totals)


@pytest.mark.parametrize("name", known_models())
def test_a_better_gpu_never_takes_more(name: str) -> None:
    gpus = [
        replace(H200, memory_bytes=memory * GB, bytes_per_s=speed * 1e12)
        for memory, speed in ((100, 3.0), (141, 3.0), (141, 4.8), (200, 4.8), (200, 9.0))
    ]
    totals = [size(known_config(name), gpu, "fp8", Slo(itl_ms=200.0)).num_gpus for gpu in gpus]
    assert totals == sorted(totals, reverse=True)


def test_two_backbones_can_be_asked_for() -> None:
    sizing = size(known_config("super"), H200, "nvfp4", Slo(min_backbones=2))
    assert (sizing.backbone_gpus, sizing.requests_per_backbone) == (2, 32)
    assert sizing.reasons[0].startswith("Backbones: 2 were asked for, memory alone would need 1.")


def test_the_network_follows_from_the_tokens() -> None:
    sizing = size(known_config("super"), H200, "bf16", Slo(itl_ms=100.0))
    tokens_per_s = 64 / sizing.backbone_gpus / 0.1
    assert sizing.backbone_bits_per_s == pytest.approx(8 * tokens_per_s * sizing.wire_bytes_per_token, rel=1e-6)
    assert sizing.backbone_link_bits_per_s == pytest.approx(5 * sizing.backbone_bits_per_s, rel=1e-6)
    assert sizing.shard_bits_per_s == pytest.approx(sizing.backbone_bits_per_s / sizing.expert_gpus / 0.8, rel=1e-6)


def test_deepseeks_bytes_are_those_of_a_calculation_by_hand() -> None:
    """Check DeepSeek-V3 on 19 shards: 58 layers, 8 picks from 4 of 8 groups, rows of 7168 numbers, experts in FP8.

    Of the 128 experts of a token's groups, 14 shards hold 7 and 5 shards hold 6.
    """
    sizing = size(known_config("deepseek-v3"), H200, "fp8", Slo(min_backbones=2))
    assert (sizing.backbone_gpus, sizing.expert_gpus) == (2, 19)
    touched = 19 - (14 * comb(121, 8) + 5 * comb(122, 8)) / comb(128, 8)
    assert sizing.out_bytes_per_token == pytest.approx(58 * (touched * (7168 * 2 + 2) + 8 * 12), abs=1)
    assert sizing.back_bytes_per_token == pytest.approx(58 * touched * 7168 * 4, abs=1)
    both = sizing.out_bytes_per_token + sizing.back_bytes_per_token
    assert sizing.backbone_link_bits_per_s == pytest.approx(8 * both * 320 / 0.2, abs=1)  # 32 requests, 100 ms a token
    assert sizing.shard_link_bits_per_s == pytest.approx(8 * both * 640 / 19 / 0.8 / 0.2, abs=1)
    experts = 59 * 256 * (3 * 7168 * 2048 + 3 * 16 * 56 * 4)  # also the MTP layer's; a scale for 128 × 128 numbers
    assert sizing.shard_read_bytes == ceil(2 * experts / 19)
    copies = 2 * 129_280 * 7168 * 2
    assert sizing.backbone_read_bytes == sizing.checkpoint_bytes - experts - copies
    assert sizing.start_bytes_per_s == ceil((2 * sizing.backbone_read_bytes + 2 * experts) / 600)
    assert sizing.volume_bytes == 770 * GIB  # 1.2 times 688.6 GB are 769.5 GiB


def test_qwens_bytes_are_those_of_a_calculation_by_hand() -> None:
    """Check Qwen3-Coder-Next on 3 shards: 48 layers, 10 picks, rows of 2048 numbers, experts in FP8.

    Two shards hold 171 experts of a layer, and one shard holds 170.
    """
    sizing = size(known_config("qwen3-coder-next"), H200, "fp8", Slo())
    assert (sizing.backbone_gpus, sizing.expert_gpus) == (1, 3)
    touched = 3 - (2 * comb(341, 10) + comb(342, 10)) / comb(512, 10)
    assert sizing.out_bytes_per_token == pytest.approx(48 * (touched * (2048 * 2 + 2) + 10 * 12), abs=1)
    assert sizing.back_bytes_per_token == pytest.approx(48 * touched * 2048 * 4, abs=1)
    experts = 48 * 512 * (3 * 2048 * 512 + 3 * 4 * 16 * 4)
    assert sizing.shard_read_bytes == ceil(2 * experts / 3)
    assert sizing.backbone_read_bytes == sizing.checkpoint_bytes - experts
    assert sizing.start_bytes_per_s == ceil((sizing.backbone_read_bytes + 2 * experts) / 600)
    assert sizing.volume_bytes == 90 * GIB
    assert "a shard reads 51.6 GB" in sizing.reasons[5]
    assert "A shard that reads 2 GB/s needs 26 s." in sizing.reasons[5]


# Reasons and messages


def test_each_number_has_its_reason() -> None:
    for name, sizing in every_sizing(("h200",), Slo()):
        starts = [reason.split(":")[0].split(" (")[0] for reason in sizing.reasons]
        widening = [] if sizing.dtype == "bf16" else ["Widening"]
        assert starts == ["Backbones", "Expert GPUs", "Homes", "Step time", "Network", "Volume", *widening], name
        assert all(reason.endswith(".") for reason in sizing.reasons)
    sizing = size(known_config("nano"), GPUS["a100"], "fp8")
    assert "two, so that one may be lost" in sizing.reasons[1]


def test_the_checkpoints_own_dtype_is_taken() -> None:
    assert size(known_config("deepseek-v3"), H200).dtype == "fp8"
    assert size(known_config("super"), H200).dtype == "bf16"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"num_requests": 0}, "0 requests cannot be sized for; allowed are 1 to 100,000"),
        ({"num_requests": 100_001}, "100001 requests cannot be sized for; allowed are 1 to 100,000"),
        ({"context_len": 0}, "a context of 0 tokens cannot be sized for; allowed is 1 or more"),
        ({"itl_ms": 0.0}, "0 ms between tokens cannot be sized for; allowed is a positive number"),
        ({"itl_ms": float("nan")}, "nan ms between tokens cannot be sized for; allowed is a positive number"),
        ({"call_ms": -1.0}, "-1 ms for a call cannot be sized for; allowed is a number from 0 up"),
        (
            {"num_requests": 2, "min_backbones": 3},
            "at least 3 backbones for 2 requests cannot be sized for; allowed is ",
        ),
    ],
)
def test_a_wish_that_makes_no_sense_is_one_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
        Slo(**wrong)
    assert str(caught.value).startswith(sentence)


def test_a_context_over_the_models_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the context is 262145 tokens; the model allows up to 262144$"):
        size(known_config("super"), H200, slo=Slo(context_len=262_145))


def test_a_gpu_is_known_by_name() -> None:
    assert gpu_of("H200") is H200
    with pytest.raises(ValueError, match=r"^there is no GPU 'v100' to size for; allowed are l4, .*, b200$"):
        gpu_of("v100")


def test_experts_that_are_too_large_are_one_sentence() -> None:
    tiny, one = Gpu("tiny", 4 * GB, 1e12, 1e12), replace(SLOW, num_requests=1, context_len=1)
    with pytest.raises(ValueError, match=r"^an expert takes 2\.0 GB, and tiny has no memory for three experts; l4 or "):
        size({**LARGE, "moe_intermediate_size": 60_000}, tiny, slo=one)
