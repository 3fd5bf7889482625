"""The gRPC options in this file apply to all connections between Expertmesh processes."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 64 << 20
KEEPALIVE = (  # so that the client and the server each notice when the other host is gone
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without this option, a ping may take a minute despite keepalive_timeout_ms
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    *KEEPALIVE,
    ("grpc.use_local_subchannel_pool", 1),  # so that a reconnect does not wait for the backoff of an earlier channel
)
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    *KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # otherwise two servers could listen on one port and silently share its connections
)
