"""The benchmark compares the planner with EPLB, and the client's choice of homes with the best possible choice.

The benchmark prints balance, moved experts, cover and speed. How to read the output:

Each layer has E experts, whose popularity w is lognormal (σ = 1.1). The popularity drifts from one plan to the next:
w' = w · exp(drift · N(0, 1)). Our planner and EPLB have E + R device slots in total on G shards, so that R slots can
hold additional copies. Our planner may also use standbys in host memory. "moved" is the share of device slots that hold
another expert than before. If EPLB puts several copies of an expert on one shard, they count once. Balance is the mean
of the shards' rows divided by the maximum of the shards' rows. The benchmark computes the balance of each layer and
prints the mean over the layers, for three ways to split an expert's rows over the expert's homes:

- `split`: the expected rows are split in the best way, as the client splits rows. **The bars apply to `split`.**
- `even`: the expected rows are split evenly, as EPLB assumes.
- `batch`: batches of 256 rows are drawn from the drifted popularity. `choose_homes` splits the rows with a cost model
  in which only rows take time. For each planner, `batch` is lower than `split`, because a batch is noisier than its
  mean.

"keep" is the balance of our running placement after the drift and before the next plan. Printed times are medians; the
compared functions run alternately in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks import eplb
from benchmarks.home_choice import CallCost, choose_homes
from cluster.dispatch.routing import HomeTable
from cluster.load import ExpectedLoad
from cluster.placement.balance import busy_times
from cluster.placement.plan import Plan, PlanPolicy
from cluster.placement.planner import plan
from cluster.topology import CostModel, Homes, LayerSpec, Placement, Shard
from tests.cluster.placement.split_oracle import least_maximum

SIGMA = 1.1
SIZE = 11 * 2**20  # bytes of one of Nemotron 3 Super's experts in bf16
SHAPES = ((256, 32, 32, 8), (512, 32, 32, 22), (512, 8, 16, 22))  # (experts, shards, additional slots, top-k)
DRIFTS = (0.02, 0.1, 0.3)
POLICY = PlanPolicy(headroom=0, rows_per_step=256)  # no headroom, because EPLB leaves no slot free
ROWS_ONLY = CallCost(expert=0.0, row=1.0, message=0.0)

Floats = NDArray[np.float64]


def make_fleet(num_shards: int, slots: int) -> list[Shard]:
    """Return shards with `slots` device slots each and host memory for all standbys, 8 shards per node.

    In the cost model of the shards, only rows take time.
    """
    return [
        Shard(
            *(f"s{i:04}", "", f"n{i // 8}", "gpu", "gpu", "1", slots * SIZE),
            host_budget=10**15,
            cost_model=CostModel(0.0, 0.0, 1.0),
        )
        for i in range(num_shards)
    ]


def balance_of(homes: Homes, load_E: Floats, num_shards: int, is_even: bool = False) -> float:
    """Return a layer's balance: the mean of the shards' rows divided by the maximum of the shards' rows.

    If `is_even`, each expert's rows are split evenly over its homes. Otherwise the rows are split in the best way.
    """
    homes_EH = np.full((len(homes), max(map(len, homes))), -1, np.int64)
    for expert, ids in enumerate(homes):
        homes_EH[expert, : len(ids)] = [int(id[1:]) for id in ids]
    num_E = np.array([len(ids) for ids in homes])
    if is_even:
        busy_S = np.zeros(num_shards)
        for homes_H, num, load in zip(homes_EH, num_E, load_E, strict=True):
            busy_S[homes_H[:num]] += load / num
    else:
        work_EC = np.stack([np.zeros_like(load_E), load_E], axis=1)
        cost_SP = np.tile([0.0, 0.0, 1.0], (num_shards, 1))
        busy_S = busy_times(work_EC, cost_SP, homes_EH, num_E, np.full(len(homes), -1))
    return float(busy_S.mean() / busy_S.max())


def draw_batch(rng: np.random.Generator, load_E: Floats, num_rows: int, top_k: int) -> NDArray[np.int64]:
    """Draw and return the experts that `num_rows` rows pick, `top_k` different experts for each row."""
    keys_TE = np.log(load_E) + rng.gumbel(size=(num_rows, len(load_E)))
    return np.argpartition(-keys_TE, top_k, axis=1)[:, :top_k].reshape(-1)


def batch_balance(homes: Homes, batches: Sequence[NDArray[np.int64]], num_shards: int) -> float:
    """Return the mean balance of batches; `choose_homes` splits each batch over the homes as the client does."""
    table = HomeTable(homes)
    rows = [np.bincount(choose_homes(ids, table, {}, cost=ROWS_ONLY), minlength=num_shards) for ids in batches]
    return float(np.mean([len(ids) / num_shards / rows_S.max() for ids, rows_S in zip(batches, rows, strict=True)]))


def eplb_homes(load_LE: Floats, num_slots: int, num_shards: int) -> tuple[list[Homes], NDArray[np.int64]]:
    """Run EPLB; return the homes of each layer, and the number of wasted slots of each layer.

    A slot is wasted if another slot of the same shard already has the same expert.
    """
    expert_LN, shard_LN = eplb.rebalance(load_LE, num_slots, num_shards)
    layers = []
    for expert_N, shard_N in zip(expert_LN.tolist(), shard_LN.tolist(), strict=True):
        held: list[set[int]] = [set() for _ in range(load_LE.shape[1])]
        for expert, shard in zip(expert_N, shard_N, strict=True):
            held[expert].add(shard)
        layers.append(tuple(tuple(f"s{shard:04}" for shard in sorted(shards)) for shards in held))
    kept = np.array([sum(map(len, homes)) for homes in layers])
    return layers, num_slots - kept


def num_moved(before: Homes, after: Homes) -> int:
    return sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))


def running(of: Plan) -> Placement:
    return Placement(1, of.homes, {}, "", of.standby)


def planned(layers: Sequence[LayerSpec], shards: Sequence[Shard], of: Plan | None, load_LE: Floats) -> Plan:
    load = {layer: ExpectedLoad.steady(load_E) for layer, load_E in enumerate(load_LE)}
    return plan(layers, shards, running(of) if of else None, load, POLICY)


def compare(num_layers: int, num_rounds: int) -> None:
    """Print the balance and the moved experts of our planner and of EPLB. The popularity drifts before every round."""
    print(
        f"\n{num_layers} layers, {num_rounds} rounds of drift. Balance: split / even / batch. Moved: % of device slots."
    )
    print(
        "E G R, drift     keep   ours                   EPLB                   ratio   moved: ours  EPLB  fewer  double"
    )
    for num_experts, num_shards, spare, top_k in SHAPES:
        slots = (num_experts + spare) // num_shards
        layers = [LayerSpec(layer, num_experts, SIZE, top_k) for layer in range(num_layers)]
        shards = make_fleet(num_shards, slots * num_layers)
        for drift in DRIFTS:
            rng = np.random.default_rng(0)
            load_LE = rng.lognormal(0, SIGMA, (num_layers, num_experts))
            ours = planned(layers, shards, None, load_LE)
            eplb_layers, _ = eplb_homes(load_LE, num_experts + spare, num_shards)
            rows, blasts = [], 0.0
            for _ in range(num_rounds):
                load_LE = load_LE * np.exp(drift * rng.normal(size=load_LE.shape))
                before, ours = ours, planned(layers, shards, ours, load_LE)
                eplb_before, (eplb_layers, doubles_L) = (
                    eplb_layers,
                    eplb_homes(load_LE, num_experts + spare, num_shards),
                )
                blasts = max(blasts, *ours.blast_radius_after.values())
                for layer, load_E in enumerate(load_LE):
                    batches = [draw_batch(rng, load_E, 256, top_k) for _ in range(4)]
                    row = [balance_of(before.homes[layer], load_E, num_shards)]
                    for homes in (ours.homes[layer], eplb_layers[layer]):
                        row.append(balance_of(homes, load_E, num_shards))
                        row.append(balance_of(homes, load_E, num_shards, is_even=True))
                        row.append(batch_balance(homes, batches, num_shards))
                    row.append(num_moved(before.homes[layer], ours.homes[layer]) / (num_experts + spare))
                    row.append(num_moved(eplb_before[layer], eplb_layers[layer]) / (num_experts + spare))
                    row.append(float(doubles_L[layer]))
                    rows.append(row)
            keep, *balances, moved, eplb_moved, doubles = np.mean(rows, axis=0)
            fewer = f"{eplb_moved / moved:5.0f}x" if moved else "  none"
            own, other = (" / ".join(f"{one:.3f}" for one in three) for three in (balances[:3], balances[3:]))
            print(
                f"{num_experts:3} {num_shards:2} {spare:2}, {drift:4.0%}  {keep:.3f}  {own}  {other}  "
                f"{balances[0] / balances[3]:.3f}          {moved:6.2%} {eplb_moved:5.1%} {fewer}     {doubles:.2f}"
            )
            assert blasts == 0, "an expert had no live home after the loss of one shard"
    print("Ours: no shard has an expert twice (Placement asserts it); after any one loss, every pick has a live home.")


def median_s(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Run each function once per round; return the median time of each function in seconds."""
    times = []
    for _ in range(rounds):
        times.append([])
        for run in runs:
            start = time.perf_counter()
            run()
            times[-1].append(time.perf_counter() - start)
    return np.median(times, axis=0).tolist()


def speed(rounds: int) -> None:
    """Print the time of one plan for 58 layers × 256 experts × 32 shards, for our planner and for EPLB."""
    num_layers, num_experts, num_shards, spare = 58, 256, 32, 32
    slots = (num_experts + spare) // num_shards
    layers = [LayerSpec(layer, num_experts, SIZE, 8) for layer in range(num_layers)]
    shards = make_fleet(num_shards, slots * num_layers)
    rng = np.random.default_rng(0)
    load_LE = rng.lognormal(0, SIGMA, (num_layers, num_experts))
    first = planned(layers, shards, None, load_LE)
    print("\n58 layers × 256 experts × 32 shards, ms; EPLB: tensors as published / lists / all layers at once in numpy")
    for drift in (0.0, *DRIFTS):
        new_LE = load_LE * np.exp(drift * rng.normal(size=load_LE.shape))
        published, lists, together, ours = median_s(
            [
                lambda load=new_LE: eplb.rebalance(load, num_experts + spare, num_shards, eplb.pack_tensors),
                lambda load=new_LE: eplb.rebalance(load, num_experts + spare, num_shards, eplb.pack_lists),
                lambda load=new_LE: eplb.rebalance(load, num_experts + spare, num_shards, eplb.pack_together),
                lambda load=new_LE: planned(layers, shards, first, load),
            ],
            rounds,
        )  # fmt: skip
        print(
            f"drift {drift:4.0%}: plan() {1e3 * ours:6.1f}   EPLB {1e3 * published:6.0f} / {1e3 * lists:5.0f} / "
            f"{1e3 * together:4.0f}   {published / ours:.1f}x / {lists / ours:.1f}x / {together / ours:.2f}x"
        )


def large() -> None:
    """Print the time of our planner's plans for 1,000 shards × 512 experts × 88 layers."""
    layers = [LayerSpec(layer, 512, SIZE, 22) for layer in range(88)]
    shards = make_fleet(1000, 88)
    rng = np.random.default_rng(0)
    load_LE = rng.lognormal(0, SIGMA, (88, 512))
    start = time.perf_counter()
    of = planned(layers, shards, None, load_LE)
    print(f"\n1,000 shards × 512 experts × 88 layers: first placement {time.perf_counter() - start:.1f} s")
    for drift in DRIFTS:
        new_LE = load_LE * np.exp(drift * rng.normal(size=load_LE.shape))
        start = time.perf_counter()
        later = planned(layers, shards, of, new_LE)
        print(f"drift {drift:4.0%}: {time.perf_counter() - start:.1f} s, {later.num_bytes / SIZE:,.0f} experts to move")
    start = time.perf_counter()
    later = planned(layers, shards[:500] + shards[501:], of, load_LE)
    print(f"a shard lost: {time.perf_counter() - start:.1f} s, {later.num_bytes / SIZE:,.0f} experts to move")


def routing(num_seeds: int) -> None:
    """Print how well the client balances batches over shards, and the best balance that a linear programme finds."""
    print(
        "\nBatches: balance of the even split, `choose_homes` and the linear programme rounded up to whole rows; ratio"
    )
    for num_experts, num_shards, spare, top_k in SHAPES:
        shards = make_fleet(num_shards, (num_experts + spare) // num_shards)
        for drift in (0.0, 0.2):
            for num_rows in (32, 256, 2048):
                rows = []
                for seed in range(num_seeds):
                    rng = np.random.default_rng(seed)
                    load_E = rng.lognormal(0, SIGMA, num_experts)
                    homes = planned([LayerSpec(0, num_experts, SIZE, top_k)], shards, None, load_E[None]).homes[0]
                    load_E = load_E * np.exp(drift * rng.normal(size=num_experts))
                    ids = draw_batch(rng, load_E, num_rows, top_k)
                    counts_E = np.bincount(ids, minlength=num_experts).astype(np.float64)
                    numbers = [[int(id[1:]) for id in of] for of in homes]
                    best = np.ceil(least_maximum(numbers, counts_E[:, None], num_shards) - 1e-6)
                    even, own = balance_of(homes, counts_E, num_shards, True), batch_balance(homes, [ids], num_shards)
                    rows.append((even, own, len(ids) / num_shards / best))
                even, own, best = np.mean(rows, axis=0)
                shape = f"{num_experts:3} {num_shards:2} {spare:2} top {top_k:2}, drift {drift:3.0%}, {num_rows:4} rows"
                print(f"{shape}: {even:.3f}  {own:.3f}  {best:.3f}  {own / best:.4f}")


class GroupRouter:
    """A `GroupRouter` draws picks as DeepSeek-V3's router makes them: 8 experts from the 4 best of 8 groups of 32.

    A token and an expert are random directions in 16 dimensions. The expert's score is the sigmoid of three terms: what
    the two have in common, noise, and the expert's offset. A group is as good as the sum of its two best scores.
    `sigma` is the spread of the offsets; 0 gives an even load, and 0.43 gives loads whose logarithms have a spread of
    about 1.1.
    """

    NUM_EXPERTS, NUM_GROUPS, TOP_GROUPS, TOP_K, DIM, COMMON = 256, 8, 4, 8, 16, 0.6

    def __init__(self, rng: np.random.Generator, sigma: float) -> None:
        self._rng, direction_DE = rng, rng.normal(size=(self.DIM, self.NUM_EXPERTS))
        self._direction_DE = direction_DE / np.linalg.norm(direction_DE, axis=0)
        self.offset_E = sigma * rng.normal(size=self.NUM_EXPERTS)

    def draw(self, num_rows: int) -> NDArray[np.int64]:
        """Return the experts of each row: (num_rows, TOP_K)."""
        shape = num_rows, self.NUM_EXPERTS
        common_NE = self._rng.normal(size=(num_rows, self.DIM)) @ self._direction_DE
        noise_NE = self._rng.normal(size=shape)
        logits_NE = np.sqrt(self.COMMON) * common_NE + np.sqrt(1 - self.COMMON) * noise_NE + self.offset_E
        score_NGE = (1 / (1 + np.exp(-logits_NE))).reshape(num_rows, self.NUM_GROUPS, -1)
        best_NG = np.argsort(-np.sort(score_NGE, axis=-1)[..., -2:].sum(-1), axis=1)[:, : self.TOP_GROUPS]
        mask_NG = np.full((num_rows, self.NUM_GROUPS), -np.inf)
        np.put_along_axis(mask_NG, best_NG, 0.0, axis=1)
        allowed_NE = (score_NGE + mask_NG[..., None]).reshape(shape)
        return np.argpartition(-allowed_NE, self.TOP_K, axis=1)[:, : self.TOP_K]

    def load(self) -> dict[int, ExpectedLoad]:
        rows_E = np.bincount(self.draw(20_000).reshape(-1), minlength=self.NUM_EXPERTS) + 1.0
        return {0: ExpectedLoad.steady(rows_E)}


def groups(num_seeds: int) -> None:
    """Print what `PlanPolicy.keep_groups` saves and costs, in the first placement and after three rounds of drift.

    "shards" is the mean number of shards to which a token goes, in batches of 256 rows. "slots" are device slots per
    expert. "batch" is the balance of these batches. "moved" is the share of device slots that three plans change.
    """
    print(
        "\nGroups of experts, without / with keep_groups: shards of a token; balance split, batch; after drift; moved"
    )
    keeping, router_of = replace(POLICY, keep_groups=True), GroupRouter
    for sigma in (0.0, 0.43):
        for num_shards, per_expert in ((4, 1.0), (7, 1.0), (8, 1.0), (16, 1.15), (19, 1.0), (19, 1.8)):
            slots = int(-(-router_of.NUM_EXPERTS * per_expert // num_shards))
            layer = LayerSpec(0, router_of.NUM_EXPERTS, SIZE, router_of.TOP_K, num_groups=8, top_groups=4)
            shards, rows = make_fleet(num_shards, slots), []
            for seed in range(num_seeds):
                for policy in (POLICY, keeping):
                    router = router_of(np.random.default_rng(seed), sigma)
                    of = plan([layer], shards, None, router.load(), policy)
                    row, moved = group_figures(of.homes[0], router, num_shards), 0
                    for _ in range(3):
                        router.offset_E += 0.04 * np.random.default_rng(seed).normal(size=len(router.offset_E))
                        before, of = of, plan([layer], shards, running(of), router.load(), policy)
                        moved += num_moved(before.homes[0], of.homes[0])
                    rows.append([*row, *group_figures(of.homes[0], router, num_shards), moved / (num_shards * slots)])
            off, on = np.array(rows).reshape(num_seeds, 2, -1).mean(axis=0)
            pairs = zip((".2f", ".3f", ".3f", ".2f", ".3f", ".3f", ".1%"), off, on, strict=True)
            words = [f"{without:{form}} / {with_groups:{form}}" for form, without, with_groups in pairs]
            print(f"sigma {sigma}, {num_shards:2} shards, {per_expert:.2f} slots: " + "   ".join(words))


def group_figures(homes: Homes, router: GroupRouter, num_shards: int) -> tuple[float, float, float]:
    """Return the mean number of shards of a token, the balance of the expected rows, and the balance of batches."""
    table, counts, batches = HomeTable(homes), [], []
    for _ in range(16):
        ids_NK = router.draw(256)
        homes_NK = choose_homes(ids_NK.reshape(-1), table, {}, cost=ROWS_ONLY).reshape(ids_NK.shape)
        counts += [len(set(row)) for row in homes_NK.tolist()]
        batches.append(ids_NK.size / num_shards / np.bincount(homes_NK.reshape(-1), minlength=num_shards).max())
    load_E = router.load()[0].mean_E
    return float(np.mean(counts)), balance_of(homes, load_E, num_shards), float(np.mean(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of the comparison, each with its own seed")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of drift")
    parser.add_argument("--skip-large", action="store_true", help="skip 1,000 shards, which take a minute")
    parser.add_argument("--only-groups", action="store_true", help="measure only what keeping groups together saves")
    arguments = parser.parse_args()
    groups(3)
    if arguments.only_groups:
        return
    compare(arguments.layers, arguments.rounds)
    routing(6)
    speed(7)
    if not arguments.skip_large:
        large()


if __name__ == "__main__":
    main()
