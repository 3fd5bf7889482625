"""`CONTEXT` starts processes of tests as forks of one process that has imported all modules.

Tests start many backbones and shards, and the imports would take two seconds of processor time in each.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.services.expert.shard_process",
        "tests.services.gateway.backbones.backbone_process",
        "torch._dynamo",  # torch imports it only when a model is made
    ]
)
