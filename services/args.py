"""The class `AppArgs` holds the application's arguments, from a Serve config or from the command line.

`AppArgs.check` validates the arguments.
"""

import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, field_validator

from cluster.control.load_store import LoadStore
from cluster.control.registry import Registry, connect, key_prefix
from cluster.control.scaling import PoolPolicy
from cluster.placement.capacity import check_capacity
from cluster.placement.plan import PlanPolicy
from cluster.topology import Shard
from model import kernels
from model.blocks.expert_bank import memory_of_all
from model.demo import DEMO
from model.families.registry import load_family
from model.family import ModelFamily
from services.controller.controller import layer_specs
from services.engine.contract.sampling_defaults import SamplingDefaults
from services.engine.drafting.draft_depth import DEFAULT_DRAFT_TOKENS
from services.engine.drafting.drafter import bytes_per_request
from services.engine.scheduling.memory import MemoryPlan, plan_memory
from services.gateway.limits import GatewayLimits
from services.hub import Repository, Say, model_directory
from services.logs import LogFormat

log = logging.getLogger(__name__)

MIN_MODEL_LEN = 2  # tokens of the shortest request: one of its prompt and one of its answer
MIN_HIDDEN_FOR_THREADS = 1024  # hidden size from which a backbone on a CPU uses several threads
# The further ahead a token is drafted, the more rarely it is accepted. 16 drafts in a row were never accepted.
MAX_DRAFT_TOKENS = 16
NUM_HOMES = 2  # number of homes of every expert, on different shards
SHARE_MARGIN = 1.1  # memory of a shard, as a multiple of its even share: whole experts rarely divide evenly
DEFAULT_STATE_MEMORY = 1 << 30  # bytes
CHECKPOINT_SHARE = 0.25  # largest share of the state memory for the state checkpoints of the prefix cache
LOG_PERIOD_S = 30.0  # seconds between two log lines about the download of a model
NO_END = (
    "Warning: neither the configs nor the tokenizer name an end-of-sequence token (eos_token_id, eos_token), so "
    "answers end only at max_tokens and stop strings. To let the model end its answers, set eos_token_id in "
    "generation_config.json."
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Labels = dict[str, str]


def _name_of(model: str) -> str:
    """Return the name of `model`: of a repository, the id; of a directory, the name of the directory.

    A model in the cache of Hugging Face has the directory `models--org--name/snapshots/commit` and the name `org/name`.
    """
    if named := Repository.parse(model):
        return named.id
    path = Path(model).resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def _secret_of_environment(name: str) -> SecretStr | None:
    secret = os.environ.get(name, "")
    return SecretStr(secret) if secret else None


def _redis_url_of_environment() -> str:
    return os.environ.get("EXPERTMESH_REDIS_URL") or "redis://127.0.0.1:6379"


def _gpus(asked: float | None, device: str) -> float:
    return float(device == "cuda") if asked is None else asked


def _check_gpus(gpus: float, device: str, name: str) -> None:
    """Raise ValueError if `device` is cuda but no GPU is reserved.

    `name` is the name of the argument that reserves GPUs, for the message.
    """
    if device == "cuda" and not gpus:
        raise ValueError(f"{name} is 0, but the device is cuda; {name} must be above 0 and at most 1, or be left out")


class PoolArgs(BaseModel):
    """`PoolArgs` are the arguments of one pool of expert shards: one entry of `pools:` in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    name: str = "experts-cpu"
    shards: int = Field(3, ge=1, description="number of shards that the pool starts with")
    min_shards: int | None = Field(None, ge=1, description="minimum number of shards; default: `shards`")
    max_shards: int | None = Field(
        None, ge=1, description="maximum number of shards; default: `shards`. Without both bounds, the size is fixed."
    )
    target_busy: float = Field(0.6, gt=0, le=1, description="share of time that the busiest shard may spend computing")
    upscale_delay_s: float = Field(
        5, ge=0, description="seconds for which the load must need more shards before the pool grows"
    )
    downscale_delay_s: float = Field(
        120, ge=0, description="seconds for which one shard less must suffice before the pool shrinks"
    )
    device: Literal["cpu", "cuda"] = "cpu"
    num_cpus: float = Field(1, ge=0)
    num_gpus: float | None = Field(
        None, ge=0, le=1, description="GPUs of one shard; if left out, 1 on cuda and 0 on cpu"
    )
    memory_budget: ByteSize | None = Field(
        None, gt=0, description="bytes of experts on a shard's device; default: AppArgs.shard_memory"
    )
    host_budget: ByteSize | None = Field(
        None, ge=0, description="bytes of standbys in a shard's host memory; default: AppArgs.shard_host_memory"
    )
    host: str = Field(
        "127.0.0.1", description="address that a shard listens on; auto: the node's own address, for clusters"
    )
    labels: Labels = Field(default_factory=dict, description="labels of the Ray nodes for shards; empty: any node")

    @property
    def least_shards(self) -> int:
        return self.min_shards or self.shards

    @property
    def most_shards(self) -> int:
        return self.max_shards or self.shards

    @property
    def gpus(self) -> float:
        return _gpus(self.num_gpus, self.device)

    def check(self) -> None:
        """Raise ValueError if the pool starts with too few or too many shards, or runs on cuda without a GPU."""
        _check_gpus(self.gpus, self.device, f"num_gpus of pool {self.name}")
        if not self.least_shards <= self.shards <= self.most_shards:
            raise ValueError(
                f"pool {self.name} starts with {self.shards} shards; the number must be from min_shards = "
                f"{self.least_shards} to max_shards = {self.most_shards}"
            )

    @property
    def is_elastic(self) -> bool:
        return self.least_shards < self.most_shards

    @property
    def scaling(self) -> PoolPolicy:
        return PoolPolicy(
            self.least_shards,
            self.most_shards,
            self.target_busy,
            upscale_delay_s=self.upscale_delay_s,
            downscale_delay_s=self.downscale_delay_s,
        )


class PlacementArgs(BaseModel):
    """`PlacementArgs` are the arguments of the planner: the entry `placement:` in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    keep_groups: bool = Field(
        False, description="keep the experts of a router's group on few shards, so that a token goes to fewer shards"
    )

    @property
    def policy(self) -> PlanPolicy:
        return PlanPolicy(keep_groups=self.keep_groups)


class AppArgs(BaseModel):
    """`AppArgs` are the arguments of the application: the value of `args:` in a Serve config."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(str(DEMO), description="model directory, or ORG/NAME or ORG/NAME@REVISION on Hugging Face's hub")
    model_name: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    experts: Literal["remote", "local"] = Field(
        "remote", description="local: no shards, the backbone computes the experts"
    )
    redis_url: str = Field(default_factory=_redis_url_of_environment, repr=False)
    redis_password: SecretStr | None = Field(
        default_factory=partial(_secret_of_environment, "EXPERTMESH_REDIS_PASSWORD"),
        description="password, if redis_url has none; set it in the environment rather than in a config",
    )
    pools: list[PoolArgs] = Field(default_factory=lambda: [PoolArgs()], min_length=1)
    placement: PlacementArgs = PlacementArgs()
    max_model_len: int | None = Field(None, ge=MIN_MODEL_LEN)
    max_requests: int = Field(64, ge=1, description="maximum number of requests in one step, if the memory suffices")
    max_waiting: int = Field(
        256, ge=1, description="maximum number of waiting requests; more are refused with Retry-After"
    )
    draft_tokens: int | None = Field(
        None, ge=0, le=MAX_DRAFT_TOKENS, description="maximum number of draft tokens per request and step"
    )
    prefix_cache: bool = True
    generation_config: bool = Field(
        True, description="use the sampling parameters of the model's generation_config.json where a client sets none"
    )
    max_batch_tokens: int = Field(2048, ge=64)
    state_memory: ByteSize | None = Field(None, gt=0, description="bytes for KV pages and recurrent state")
    backbone_replicas: int = Field(1, ge=1)
    backbone_gpus: float | None = Field(
        None, ge=0, le=1, description="GPUs of one backbone; if left out, 1 on cuda and 0 on cpu"
    )
    backbone_threads: int | None = Field(None, ge=1, description="CPU threads of one backbone; see AppArgs.threads")
    gateway_replicas: int = Field(1, ge=1)
    controller_replicas: int = Field(
        1, ge=1, description="number of controllers; if the leader dies, another controller leads within seconds"
    )
    log_format: LogFormat = "json"
    labels: Labels = Field(
        default_factory=dict,
        description="labels of the Ray nodes that may run gateways, backbones and controllers; empty: any node",
    )
    host: str = Field(
        "127.0.0.1",
        description="address that backbones and gateways listen on; auto: the node's own address, for clusters",
    )
    http_port: int | None = Field(None, ge=1, le=65535, description="REST port of the gateways, besides Serve's proxy")
    grpc_port: int | None = Field(None, ge=1, le=65535, description="gRPC port of the gateways, besides Serve's proxy")
    linger_s: float = Field(
        0, ge=0, description="seconds for which a stopping gateway accepts requests, but reports that it is not ready"
    )
    drain_s: float = Field(1, ge=0, description="seconds that open streams have to end when their gateway stops")
    admin_key: SecretStr | None = Field(
        default_factory=partial(_secret_of_environment, "EXPERTMESH_ADMIN_KEY"),
        min_length=8,
        validate_default=True,
        description="key of the admin API, which is closed without a key",
    )
    keep_alive_s: float = Field(5, gt=0, description="seconds for which the gateway keeps an idle connection open")
    allowed_origins: list[str] = Field(
        default_factory=list, description="origins whose web pages may call the REST API (CORS); empty: none"
    )
    limits: GatewayLimits = GatewayLimits()

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                form = "scheme://host or scheme://host:port without a path, such as https://chat.example.org, or *"
                raise ValueError(f"each origin must be {form}")
        return origins

    @property
    def name(self) -> str:
        return self.model_name or ("demo" if self.model == str(DEMO) else _name_of(self.model))

    def resolved(self, say: Say | None = None) -> Self:
        """Return a copy with a directory of this machine as the model, under the same name.

        A repository's files are downloaded unless the cache has them; `say`, or else the log, is told the progress.
        Raises ValueError with one sentence if the files cannot be downloaded.
        """
        directory = model_directory(self.model, say) if say else model_directory(self.model, log.info, LOG_PERIOD_S)
        return self.model_copy(update={"model": directory, "model_name": self.name})

    def without_idle_shards(self, family: ModelFamily) -> Self:
        """Return a copy without shards if the model has no routed experts, because the shards would hold nothing."""
        return self if family.expert_shapes else self.model_copy(update={"experts": "local"})

    def pinned(self, resolved: Self) -> Self:
        """Return a copy whose model, if it is a repository, has the commit that `resolved` has found as its revision.

        Replicas on other nodes then read the same commit, even if the repository's branch has moved.
        """
        repository = Repository.parse(self.model)
        model = self.model if repository is None else f"{repository.id}@{Path(resolved.model).name}"
        return self.model_copy(update={"model": model})

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype of the weights and the computation.

        `auto` means bf16 on a GPU, where bf16 is fast, and fp32 on a CPU, where fp32 is exact.
        """
        return (
            DTYPES["bfloat16" if self.device == "cuda" else "float32"] if self.dtype == "auto" else DTYPES[self.dtype]
        )

    def context(self, family: ModelFamily) -> int:
        """Return the maximum number of tokens of a request.

        Raise ValueError if `max_model_len` is too large, or if the model is too short for any request.
        """
        longest = family.config.max_position_embeddings
        if longest < MIN_MODEL_LEN:
            reason = "a request needs a token of its prompt and a token of its answer"
            raise ValueError(f"config.json has max_position_embeddings = {longest}; allowed is 2 or more: {reason}")
        if self.max_model_len and self.max_model_len > longest:
            raise ValueError(f"max_model_len is {self.max_model_len}; the model allows up to {longest}")
        return self.max_model_len or longest

    def threads(self, family: ModelFamily) -> int:
        """Return the number of threads of a backbone: by default 1 for a small model, or else one for each core.

        The matrix products of a small model take less time than the wake-up of a second thread. The demo is 1.8 times
        faster with one thread.
        """
        is_small = family.config.hidden_size < MIN_HIDDEN_FOR_THREADS
        return self.backbone_threads or (1 if is_small else os.cpu_count() or 1)

    @property
    def gpus(self) -> float:
        return _gpus(self.backbone_gpus, self.device)

    @property
    def num_shards(self) -> dict[str, int]:
        """Return a dict from the name of each pool to the pool's minimum number of shards."""
        return {pool.name: pool.least_shards for pool in self.pools}

    def shard_memory(self, pool: PoolArgs, family: ModelFamily) -> int:
        """Return how many bytes of experts a shard of `pool` may hold on its device.

        By default, all homes still fit after the loss of one shard, even if every pool has only `min_shards` shards.
        """
        whole = memory_of_all(family.expert_shapes, self.torch_dtype, pool.device).device
        num_left = max(1, sum(self.num_shards.values()) - 1)
        return int(pool.memory_budget or min(whole, SHARE_MARGIN * NUM_HOMES * whole / num_left))

    def shard_host_memory(self, pool: PoolArgs, family: ModelFamily) -> int:
        """Return how many bytes of standbys a shard of `pool` may keep in host memory.

        By default, a shard on a GPU may keep its even share of all experts, because reading from disk is slow. A shard
        on a CPU keeps no standbys in host memory, because the host's memory already serves as its device memory. The
        operating system uses free host memory to cache the checkpoint's files.
        """
        if pool.host_budget is not None:
            return int(pool.host_budget)
        whole = memory_of_all(family.expert_shapes, self.torch_dtype, pool.device).host
        share = SHARE_MARGIN * whole / sum(self.num_shards.values())
        return int(share) if pool.device == "cuda" else 0

    def memory_plan(self, family: ModelFamily) -> MemoryPlan:
        """Return how the state memory is divided. Raise ValueError if one request of maximum length does not fit."""
        spec, longest = family.config.state_spec, self.context(family)
        num_drafts = DEFAULT_DRAFT_TOKENS if self.draft_tokens is None else self.draft_tokens
        draft_bytes = bytes_per_request(family.config, num_drafts) if family.has_mtp else 0
        slot, block = spec.bytes_per_slot(self.torch_dtype), spec.bytes_per_block(self.torch_dtype)
        longest_bytes = slot + draft_bytes + spec.num_blocks(longest) * block
        return plan_memory(
            spec,
            self.torch_dtype,
            budget=self.state_memory or max(DEFAULT_STATE_MEMORY, longest_bytes),
            max_model_len=longest,
            max_requests=self.max_requests,
            checkpoint_share=CHECKPOINT_SHARE if self.prefix_cache else 0.0,
            bytes_per_request=draft_bytes,
        )

    def sampling_defaults(self, family: ModelFamily) -> SamplingDefaults:
        """Return the values of sampling parameters that a client leaves out. Raise ValueError if one is not allowed."""
        return SamplingDefaults.of_model(family.checkpoint.generation_config if self.generation_config else {})

    def notes(self, family: ModelFamily) -> list[str]:
        """Return sentences about the model that whoever starts it should know."""
        from services.gateway.chat.tokenizer import Tokenizer

        notes = Tokenizer(self.model).template.notes
        if not family.expert_shapes:
            notes.append("The model has no routed experts, so it is served without expert shards.")
        defaults = self.sampling_defaults(family)
        if defaults.values:
            notes.append(f"Sampling defaults of generation_config.json: {defaults}.")
        if limit := defaults.max_new_tokens:
            notes.append(
                f"Every answer ends after {limit} tokens: generation_config.json has max_new_tokens = {limit}."
            )
        if not family.eos_token_ids:
            notes.append(NO_END)
        return [*notes, *family.plain_notes(self.device), *family.checkpoint.notes]

    def arithmetic(self) -> list[str]:
        """Return one sentence about the backbone's kernels, and one for each pool whose device is of another kind."""
        pools = self.pools if self.experts == "remote" else []
        others = [pool for pool in pools if pool.device != self.device]
        return [
            kernels.describe(self.device),
            *(f"experts of pool {pool.name} on {pool.device}: {kernels.describe(pool.device)}" for pool in others),
        ]

    def check(self) -> ModelFamily:
        """Return the model's family. Raise ValueError with one sentence if the model or an argument is wrong.

        No weights are read.
        """
        from services.gateway.chat.tokenizer import Tokenizer

        family = load_family(self.model)
        family.check()
        Tokenizer(self.model)
        self.sampling_defaults(family)
        try:
            key_prefix(self.name)
        except ValueError as error:
            sentence = "choose another with --model-name (model_name in a Serve config)"
            raise ValueError(f"{str(error).rstrip('.')}; {sentence}.") from None
        if len(self.num_shards) < len(self.pools):
            raise ValueError(f"the pools are named {[pool.name for pool in self.pools]}; each needs a name of its own")
        _check_gpus(self.gpus, self.device, "backbone_gpus")
        for pool in self.pools:
            pool.check()
        self.memory_plan(family)
        if self.experts == "remote":
            check_capacity(layer_specs(family.expert_shapes, self.torch_dtype), self._fleet(family), NUM_HOMES)
        return family

    def _fleet(self, family: ModelFamily) -> list[Shard]:
        """Return the shards with which the application starts; fields that the planner does not need are empty."""
        return [
            Shard(
                f"{pool.name}-{i}",
                "",
                f"node-{i}",
                pool.name,
                pool.device,
                "",
                self.shard_memory(pool, family),
                host_budget=self.shard_host_memory(pool, family),
            )
            for pool in self.pools
            for i in range(pool.shards)
        ]

    @property
    def shown_redis_url(self) -> str:
        """Return the store's URL without the user and the password."""
        scheme, _, rest = self.redis_url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def _password(self) -> str | None:
        return self.redis_password.get_secret_value() if self.redis_password else None

    def registry(self) -> Registry:
        return Registry(connect(self.redis_url, self._password), self.name)

    def loads(self) -> LoadStore:
        return LoadStore(connect(self.redis_url, self._password), self.name)
