"""The functions in this file show a `Sizing` as tables for a terminal of 80 columns.

A GB is 10**9 bytes; a GiB is 2**30 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.table import Table

from cluster.sizing.fit import GIB, Slo
from cluster.sizing.gpus import GB, MB
from cluster.sizing.model_sizes import ModelSizes
from cluster.sizing.sizing import Sizing
from cluster.sizing.weight_formats import Dtype

MIB = 2**20
LEGEND = (
    "GB: size of the checkpoint. GPUs: backbones + expert shards. homes: homes of an expert on GPUs + standbys in host "
    "memory. host: GiB of each shard's host memory for standbys. KV, state: MiB of one request. wire: MB of one "
    "token. Gbit/s: network card of a backbone / of a shard."
)
PART_NAMES = {
    "mixers": "attention, Mamba-2, DeltaNet",
    "latent": "latent projections",
    "shared": "shared experts",
    "dense": "dense layers",
    "routed": "routed experts",
    "mtp backbone": "MTP, without its experts",
    "mtp routed": "MTP, routed experts",
    "mtp copies": "MTP, copies (not loaded)",
}


def size_tables(name: str, model: ModelSizes, made: Sizing, slo: Slo) -> Iterator[Table]:
    """Yield three tables for one model.

    The tables show the weights of the model's parts, the deployment, and the costs of a request and of a token.
    """
    parts = Table(title=f"{name} in {made.dtype}", box=None, padding=(0, 2, 0, 0))
    parts.add_column("weights")
    for column in ("parameters", "GB"):
        parts.add_column(column, justify="right")
    stored, params = model.stored(made.dtype), model.params
    for part, num_bytes in stored.items():
        parts.add_row(PART_NAMES.get(part, part), f"{params[part]:,}", f"{num_bytes / GB:.3f}")
    parts.add_row("all", f"{sum(params.values()):,}", f"{made.checkpoint_bytes / GB:.3f}")
    yield parts
    fleet = Table(title=_title(made.gpu, slo), box=None, padding=(0, 2, 0, 0))
    fleet.add_column("")
    for column in ("backbone", "expert shard"):
        fleet.add_column(column, justify="right")
    for row in _fleet(made):
        fleet.add_row(*row)
    yield fleet
    one = Table(title="Of one request and one token", box=None, padding=(0, 2, 0, 0), show_header=False)
    one.add_column()
    one.add_column(justify="right")
    for name_and_number in _one(made):
        one.add_row(*name_and_number)
    yield one


def _fleet(made: Sizing) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the deployment's table: (name of a quantity, value for a backbone, value for a shard)."""
    yield "GPUs", str(made.backbone_gpus), str(made.expert_gpus)
    yield "requests on each", str(made.requests_per_backbone), ""
    yield "weights on each, GB", f"{made.backbone_weight_bytes / GB:.1f}", ""
    yield "one home of every expert, GB in all", "", f"{made.experts_bytes / GB:.1f}"
    yield "homes of an expert on GPUs", "", str(made.device_homes)
    yield "state_memory", _gib(made.state_memory_bytes), ""
    yield "memory_budget", "", _gib(made.shard_memory_bytes)
    yield "host_budget (second homes)", "", _gib(made.shard_host_bytes)
    yield "memory of a pod", _gib(made.backbone_pod_memory_bytes), _gib(made.shard_pod_memory_bytes)
    num_shards, out, back = made.expert_gpus, made.out_bytes_per_token, made.back_bytes_per_token
    yield "sends for a token, bytes", f"{out:,}", f"{back / num_shards:,.0f}"
    yield "receives for a token, bytes", f"{back:,}", f"{out / num_shards:,.0f}"
    yield "network on average, Gbit/s", f"{made.backbone_bits_per_s / GB:.2f}", f"{made.shard_bits_per_s / GB:.2f}"
    links = made.backbone_link_bits_per_s, made.shard_link_bits_per_s
    yield "network card, Gbit/s", f"{links[0] / GB:.2f}", f"{links[1] / GB:.2f}"
    yield "reads at the start, GB", f"{made.backbone_read_bytes / GB:.1f}", f"{made.shard_read_bytes / GB:.1f}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes // GIB} GiB"


def _one(made: Sizing) -> Iterator[tuple[str, str]]:
    yield "KV of a token, bytes", f"{made.kv_bytes_per_token:,}"
    yield "KV of a request, MiB", f"{made.kv_bytes_per_request / MIB:,.1f}"
    yield "recurrent state of a request, MiB", f"{made.state_bytes_per_request / MIB:,.1f}"
    if made.draft_bytes_per_request:
        yield "for its drafts, MiB", f"{made.draft_bytes_per_request / MIB:,.1f}"
    yield "shards that a token goes to in a layer", f"{made.unique_shards:.2f}"
    yield "on the wire for a token, bytes", f"{made.wire_bytes_per_token:,}"


def all_table(gpu: str, slo: Slo, rows: Iterable[tuple[str, Dtype, Sizing | str]]) -> Table:
    """Return a table with one line for each model and dtype; a model that cannot be sized has dashes in its line."""
    table = Table(title=_title(gpu, slo), box=None, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    table.add_column("in", no_wrap=True)
    names = ("GB", "GPUs", "homes", "host", "KV", "state", "wire", "Gbit/s")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for name, dtype, made in rows:
        shown, last = "" if name == last else name.removeprefix("NVIDIA-"), name
        table.add_row(shown, dtype, *(("–",) * len(names) if isinstance(made, str) else _cells(made)))
    return table


def _title(gpu: str, slo: Slo) -> str:
    return f"On {gpu}: {slo.num_requests:,} requests of {slo.context_len:,} tokens, {slo.itl_ms:g} ms a token"


def _cells(made: Sizing) -> tuple[str, ...]:
    return (
        f"{made.checkpoint_bytes / GB:.1f}",
        f"{made.backbone_gpus}+{made.expert_gpus}",
        f"{made.device_homes}+{2 - made.device_homes}",
        str(made.shard_host_bytes // GIB),
        f"{made.kv_bytes_per_request / MIB:.0f}",
        f"{made.state_bytes_per_request / MIB:.0f}",
        f"{made.wire_bytes_per_token / MB:.2f}",
        f"{made.backbone_link_bits_per_s / GB:.0f}/{made.shard_link_bits_per_s / GB:.0f}",
    )
