"""The backbone's own numbers in Prometheus' format, asked from it when somebody asks us."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest

ENGINE = {
    "num_running": ("engine_requests_running", "Requests that the engine computes."),
    "num_waiting": ("num_requests_waiting", "Requests that wait for memory."),
    "num_slots_taken": ("state_slots_taken", "Recurrent-state slots in use."),
    "num_slots": ("state_slots", "Recurrent-state slots in all."),
    "num_blocks_taken": ("kv_blocks_taken", "KV pages in use."),
    "num_blocks": ("kv_blocks", "KV pages in all."),
    "num_preemptions": ("num_preemptions", "Requests put back and computed again since the start."),
    "num_steps": ("engine_steps", "Steps since the start."),
    "num_failed_steps": ("engine_failed_steps", "Steps that failed since the start."),
}
TRAFFIC = {
    "num_calls": ("expert_calls", "MoE layer calls to the expert tier since the start."),
    "num_rows": ("expert_rows", "Token rows in those calls."),
    "num_sent": ("expert_messages_sent", "Messages to shards since the start."),
    "sent_bytes": ("expert_sent_bytes", "Bytes sent to shards since the start."),
    "received_bytes": ("expert_received_bytes", "Bytes received from shards since the start."),
    "num_lost": ("expert_calls_lost", "Messages whose shard or stream was lost since the start."),
    "num_stalled": ("expert_calls_stalled", "Messages resent because a shard was silent since the start."),
}


def backbone_metrics(model: str, status: dict[str, Any]) -> bytes:
    """`status` as `Backbone.status` returns it."""
    registry = CollectorRegistry()

    def gauge(name: str, help_text: str, value: float) -> None:
        Gauge(f"expertmesh:{name}", help_text, ["model_name"], registry=registry).labels(model).set(value)

    for key, (name, help_text) in ENGINE.items():
        gauge(name, help_text, status["engine"][key])
    if "traffic" in status:
        for key, (name, help_text) in TRAFFIC.items():
            gauge(name, help_text, status["traffic"][key])
        gauge("placement_epoch", "Epoch of the placement in use.", status["epoch"])
        gauge(
            "placement_age_seconds", "Time since the placement was last read from the store.", status["placement_age_s"]
        )
        gauge("shards_down", "Shards of the placement that cannot be reached.", len(status["down"]))
    return generate_latest(registry)
