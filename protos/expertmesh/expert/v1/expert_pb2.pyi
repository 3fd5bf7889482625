from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_BF16: _ClassVar[Dtype]
    DTYPE_FP32: _ClassVar[Dtype]

class StoredFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STORED_FORMAT_UNSPECIFIED: _ClassVar[StoredFormat]
    STORED_FORMAT_BF16: _ClassVar[StoredFormat]
    STORED_FORMAT_FP32: _ClassVar[StoredFormat]
    STORED_FORMAT_FP8: _ClassVar[StoredFormat]
    STORED_FORMAT_FP8_BLOCKS: _ClassVar[StoredFormat]
    STORED_FORMAT_NVFP4: _ClassVar[StoredFormat]
DTYPE_UNSPECIFIED: Dtype
DTYPE_BF16: Dtype
DTYPE_FP32: Dtype
STORED_FORMAT_UNSPECIFIED: StoredFormat
STORED_FORMAT_BF16: StoredFormat
STORED_FORMAT_FP32: StoredFormat
STORED_FORMAT_FP8: StoredFormat
STORED_FORMAT_FP8_BLOCKS: StoredFormat
STORED_FORMAT_NVFP4: StoredFormat

class ComputeRequest(_message.Message):
    __slots__ = ("id", "layer", "epoch", "num_rows", "dtype", "rows", "grid", "pick_rows", "pick_experts", "pick_weights", "timeout_us", "traceparent", "checksum")
    ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    PICK_ROWS_FIELD_NUMBER: _ClassVar[int]
    PICK_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    PICK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_US_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    id: int
    layer: int
    epoch: int
    num_rows: int
    dtype: Dtype
    rows: bytes
    grid: bytes
    pick_rows: bytes
    pick_experts: bytes
    pick_weights: bytes
    timeout_us: int
    traceparent: str
    checksum: int
    def __init__(self, id: _Optional[int] = ..., layer: _Optional[int] = ..., epoch: _Optional[int] = ..., num_rows: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., rows: _Optional[bytes] = ..., grid: _Optional[bytes] = ..., pick_rows: _Optional[bytes] = ..., pick_experts: _Optional[bytes] = ..., pick_weights: _Optional[bytes] = ..., timeout_us: _Optional[int] = ..., traceparent: _Optional[str] = ..., checksum: _Optional[int] = ...) -> None: ...

class ComputeReply(_message.Message):
    __slots__ = ("id", "sums", "refusal", "queue_us", "compute_us", "queue_depth", "checksum")
    ID_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    id: int
    sums: Sums
    refusal: Refusal
    queue_us: int
    compute_us: int
    queue_depth: int
    checksum: int
    def __init__(self, id: _Optional[int] = ..., sums: _Optional[_Union[Sums, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., queue_depth: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Sums(_message.Message):
    __slots__ = ("data", "width")
    DATA_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    width: int
    def __init__(self, data: _Optional[bytes] = ..., width: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "detail", "epoch", "missing")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CODE_UNSPECIFIED: _ClassVar[Refusal.Code]
        NOT_HOSTED: _ClassVar[Refusal.Code]
        STALE_EPOCH: _ClassVar[Refusal.Code]
        OVERLOADED: _ClassVar[Refusal.Code]
        DRAINING: _ClassVar[Refusal.Code]
        BAD_SHAPE: _ClassVar[Refusal.Code]
        DEADLINE: _ClassVar[Refusal.Code]
        FAILED: _ClassVar[Refusal.Code]
        CORRUPT: _ClassVar[Refusal.Code]
    CODE_UNSPECIFIED: Refusal.Code
    NOT_HOSTED: Refusal.Code
    STALE_EPOCH: Refusal.Code
    OVERLOADED: Refusal.Code
    DRAINING: Refusal.Code
    BAD_SHAPE: Refusal.Code
    DEADLINE: Refusal.Code
    FAILED: Refusal.Code
    CORRUPT: Refusal.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    code: Refusal.Code
    detail: str
    epoch: int
    missing: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, code: _Optional[_Union[Refusal.Code, str]] = ..., detail: _Optional[str] = ..., epoch: _Optional[int] = ..., missing: _Optional[_Iterable[int]] = ...) -> None: ...

class LayerExperts(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class LayerChecksums(_message.Message):
    __slots__ = ("layer", "experts", "checksums")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("endpoint", "experts")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    endpoint: str
    experts: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    def __init__(self, endpoint: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("experts", "epoch", "standby", "peers", "expected", "fencing")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    FENCING_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    epoch: int
    standby: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    expected: _containers.RepeatedCompositeFieldContainer[LayerChecksums]
    fencing: int
    def __init__(self, experts: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., epoch: _Optional[int] = ..., standby: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., expected: _Optional[_Iterable[_Union[LayerChecksums, _Mapping]]] = ..., fencing: _Optional[int] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("gains", "used_bytes", "memory_budget", "checksums")
    GAINS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    gains: _containers.RepeatedCompositeFieldContainer[LayerGain]
    used_bytes: int
    memory_budget: int
    checksums: _containers.RepeatedCompositeFieldContainer[LayerChecksums]
    def __init__(self, gains: _Optional[_Iterable[_Union[LayerGain, _Mapping]]] = ..., used_bytes: _Optional[int] = ..., memory_budget: _Optional[int] = ..., checksums: _Optional[_Iterable[_Union[LayerChecksums, _Mapping]]] = ...) -> None: ...

class LayerGain(_message.Message):
    __slots__ = ("layer", "exponent")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    exponent: int
    def __init__(self, layer: _Optional[int] = ..., exponent: _Optional[int] = ...) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("experts", "epoch", "standby", "fencing")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    FENCING_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    epoch: int
    standby: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    fencing: int
    def __init__(self, experts: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., epoch: _Optional[int] = ..., standby: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., fencing: _Optional[int] = ...) -> None: ...

class UnloadReply(_message.Message):
    __slots__ = ("used_bytes",)
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    used_bytes: int
    def __init__(self, used_bytes: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("layer", "experts", "matrices")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MATRICES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    matrices: _containers.RepeatedCompositeFieldContainer[MatrixFormat]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., matrices: _Optional[_Iterable[_Union[MatrixFormat, _Mapping]]] = ...) -> None: ...

class MatrixFormat(_message.Message):
    __slots__ = ("name", "rows", "columns", "format")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows: int
    columns: int
    format: StoredFormat
    def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., format: _Optional[_Union[StoredFormat, str]] = ...) -> None: ...

class FetchChunk(_message.Message):
    __slots__ = ("expert", "data", "is_last", "checksum", "gain_exponent", "seal")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    GAIN_EXPONENT_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    expert: int
    data: bytes
    is_last: bool
    checksum: int
    gain_exponent: int
    seal: int
    def __init__(self, expert: _Optional[int] = ..., data: _Optional[bytes] = ..., is_last: bool = ..., checksum: _Optional[int] = ..., gain_exponent: _Optional[int] = ..., seal: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("shard_id", "incarnation", "pid", "device", "memory_budget", "used_bytes", "held", "epoch", "draining", "queue_depth", "counters", "standby", "in_host_memory", "promoted", "host_budget", "host_used_bytes")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    IN_HOST_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    HOST_BUDGET_FIELD_NUMBER: _ClassVar[int]
    HOST_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    shard_id: str
    incarnation: str
    pid: int
    device: str
    memory_budget: int
    used_bytes: int
    held: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    epoch: int
    draining: bool
    queue_depth: int
    counters: Counters
    standby: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    in_host_memory: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    promoted: _containers.RepeatedCompositeFieldContainer[LayerExperts]
    host_budget: int
    host_used_bytes: int
    def __init__(self, shard_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., memory_budget: _Optional[int] = ..., used_bytes: _Optional[int] = ..., held: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., epoch: _Optional[int] = ..., draining: bool = ..., queue_depth: _Optional[int] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., standby: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., in_host_memory: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., promoted: _Optional[_Iterable[_Union[LayerExperts, _Mapping]]] = ..., host_budget: _Optional[int] = ..., host_used_bytes: _Optional[int] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("num_requests", "num_refusals", "num_rows", "num_picks", "received_bytes", "sent_bytes", "queue_us", "compute_us", "num_promotions", "promotion_us")
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSALS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_PICKS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMOTIONS_FIELD_NUMBER: _ClassVar[int]
    PROMOTION_US_FIELD_NUMBER: _ClassVar[int]
    num_requests: int
    num_refusals: int
    num_rows: int
    num_picks: int
    received_bytes: int
    sent_bytes: int
    queue_us: int
    compute_us: int
    num_promotions: int
    promotion_us: int
    def __init__(self, num_requests: _Optional[int] = ..., num_refusals: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_picks: _Optional[int] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., num_promotions: _Optional[int] = ..., promotion_us: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("keep_serving",)
    KEEP_SERVING_FIELD_NUMBER: _ClassVar[int]
    keep_serving: bool
    def __init__(self, keep_serving: bool = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("queue_depth",)
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    queue_depth: int
    def __init__(self, queue_depth: _Optional[int] = ...) -> None: ...
