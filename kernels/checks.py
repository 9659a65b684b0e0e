"""What a sweep takes and what it refuses: checks at the edge, autocast, and the problem they leave."""

import operator
import os
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from etpo.kernels.plan import Q, R
from etpo.kernels.shards import share_gradient, vocabulary_of
from etpo.kernels.streams import Lora, Problem, Source, Stream, VocabShard

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)
# Logits are multiplied by nothing larger.
MAX_FACTOR = torch.finfo(torch.float32).max
# The functions without targets ignore no row.
NO_INDEX = -100


class Rows(NamedTuple):
    """What a caller says of the rows: a token or K tokens of each, which count (mask), and their weights."""

    targets: Tensor | None = None
    ignore_index: int = NO_INDEX
    mask: Tensor | None = None
    weights: Tensor | None = None


ALL_ROWS = Rows()


def build_problem(
    policy: Stream | None,
    critic: Stream | None,
    reference: Stream | None,
    *,
    rows: Rows = ALL_ROWS,
    mix: tuple[float, float] = (1.0, 1.0),
    prefixes: tuple[str, str, str] = ("policy.", "critic.", "reference."),
) -> tuple[Problem, torch.Size]:
    """Checks every input and flattens it. Returns the problem and the shape of one statistic.

    prefixes: what stands before "hidden", "weight", … in the caller's names of a stream's parts. Raises
    ValueError for a shape, dtype, device or value that a sweep cannot take.
    """
    parts = Parts()
    streams = {
        k: (name, check_stream(name, stream, parts))
        for k, (name, stream) in enumerate(zip(prefixes, (policy, critic, reference), strict=True))
        if stream is not None
    }
    if not streams:
        raise ValueError("policy: expected at least one stream, got None for each of them")
    (first_name, first), *others = streams.values()
    shard = first.shard
    for name, stream in others:
        check_beside(name, stream, first_name, first)
    sources = {k: Source(_flat(stream.hidden), *stream[1:6]) for k, (_, stream) in streams.items()}
    problem, shape = problem_of(sources, None, check_mix(mix), NO_INDEX), first.hidden.shape[:-1]
    return _with_rows(problem._replace(shard=shard), shape, rows), shape


def build_logits_problem(
    named: dict[int, tuple[str, Tensor]],
    *,
    temperature: float = 1.0,
    rows: Rows = ALL_ROWS,
    mix: tuple[float, float] = (1.0, 1.0),
) -> tuple[Problem, torch.Size]:
    """As `build_problem`, of logits [N, V] or [B, T, V] by stream, each with the caller's name of them."""
    temperature = check_positive("temperature", temperature)
    first_name, first = next(iter(named.values()))
    if not isinstance(first, Tensor) or first.dim() not in (2, 3) or first.shape[-1] < 1:
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(f"{first_name}: expected shape [N, V] or [B, T, V] with V ≥ 1, got {got}")
    sources = {}
    for k, (name, tensor) in named.items():
        check_tensor(name, tensor, tuple(first.shape), first.device)
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise ValueError(f"{name}: float64 does not mix with {first.dtype}, got {tensor.dtype}")
        sources[k] = Source(_flat(usable(tensor)), None, temperature=temperature)
    shape = first.shape[:-1]
    return _with_rows(problem_of(sources, None, check_mix(mix), NO_INDEX), shape, rows), shape


def _with_rows(problem: Problem, shape: torch.Size, rows: Rows) -> Problem:
    """`problem` with what the caller says of its rows, checked."""
    targets, ignore_index, mask, weights = rows
    ignore_index = check_index("ignore_index", ignore_index)
    if targets is not None:
        n_vocab = problem.n_vocab
        if problem.shard is not None:
            n_vocab = vocabulary_of(problem.shard, n_vocab, problem.device)
        targets = check_targets(targets, shape, n_vocab, problem.device, ignore_index)
    if mask is not None:
        mask = check_vector("mask", mask, shape, problem.device, (torch.bool,))
    if weights is not None:
        weights = check_vector("weights", weights, shape, problem.device, FLOAT_DTYPES).to(problem.dtype)
        if weights.requires_grad:
            raise ValueError("weights: expected a tensor that asks for no gradient, got one that does")
        mask = weights != 0 if mask is None else mask & (weights != 0)
    if mask is not None:
        # A row without a target does not count, whatever else is asked of it.
        targets = torch.where(mask, 0, ignore_index)
    return problem._replace(targets=targets, ignore_index=ignore_index, weights=weights)


def check_vector(
    name: str, value: object, shape: torch.Size, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """`value` flat, [N]; raises ValueError unless it is a tensor of one number a token."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a tensor of {' or '.join(map(str, dtypes))}, got {got}")
    if value.shape != shape or value.device != device:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} on {device}, got {tuple(value.shape)} on {value.device}"
        )
    refuse_distributed(name, value)
    return usable(value).reshape(-1).contiguous()


def problem_of(
    sources: dict[int, Source],
    targets: Tensor | None,
    mix: tuple[float, float],
    ignore_index: int,
    weights: Tensor | None = None,
) -> Problem:
    """The problem of checked sources by stream; at least one."""
    first = next(iter(sources.values()))
    table, given_logits = first.weight, first.weight is None
    return Problem(
        sources=(sources.get(0), sources.get(1), sources.get(2)),
        streams=sources,
        targets=targets,
        weights=weights,
        mix=mix,
        mixed=frozenset(k for k, share in ((R, mix[0]), (Q, mix[1])) if share != 0),
        ignore_index=ignore_index,
        n_rows=first.hidden.shape[0],
        n_vocab=first.hidden.shape[1] if table is None else table.shape[0],
        dtype=torch.float64 if first.hidden.dtype == torch.float64 else torch.float32,
        device=first.hidden.device,
        given_logits=given_logits,
        shard=None,
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def check_mix(mix: tuple[float, float]) -> tuple[float, float]:
    """`mix` as two floats; raises ValueError unless float32 holds both."""
    try:
        a, b = (float(coefficient) for coefficient in mix)
    except (TypeError, ValueError):
        raise ValueError(f"mix: expected two numbers (a, b), got {mix!r}") from None
    if not (abs(a) < MAX_FACTOR and abs(b) < MAX_FACTOR):
        raise ValueError(f"mix: expected two numbers (a, b) in the range of float32, got {mix!r}")
    return a, b


def is_number(value: object) -> bool:
    """True for real numbers of any kind, NumPy's among them; not for True and False, not for tensors."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(name: str, value: float) -> float:
    """`value` as a float; raises ValueError unless float32 holds it and its inverse, both above 0."""
    if not is_number(value) or not 1.0 / MAX_FACTOR < value < MAX_FACTOR:
        raise ValueError(f"{name}: expected a number above 0 in the range of float32, got {value!r}")
    return float(value)


def check_index(name: str, value: int) -> int:
    """`value` as an int; raises ValueError for what is not a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None


def check_tensor(name: str, value: object, shape: tuple[int | None, ...], device: torch.device) -> Tensor:
    """`value` as a floating tensor of `shape` (None: any length) on `device`; raises ValueError otherwise."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name}: expected a floating dtype {FLOAT_DTYPES}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    fits = value.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        want_text = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{want_text}], got {tuple(value.shape)}")
    refuse_distributed(name, value)
    return value


def refuse_distributed(name: str, value: Tensor) -> None:
    """Raises ValueError for a DTensor, of which an operator would see neither the whole nor the placement."""
    if hasattr(value, "full_tensor"):
        raise ValueError(f"{name}: expected a plain tensor (x.full_tensor() makes one), got a DTensor")


def check_stream(name: str, stream: Stream, parts: "Parts") -> Stream:
    """`stream` as the sweeps take it; raises ValueError where its parts do not fit together."""
    if not isinstance(stream, Stream):
        raise ValueError(f"{name.rstrip('.')}: expected a Stream, got {type(stream).__name__}")
    hidden, weight, bias, lora, temperature, softcap, shard = stream = unsharded(name, stream)
    if not isinstance(hidden, Tensor) or hidden.dim() not in (2, 3):
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"{name}hidden: expected shape [N, D] or [B, T, D], got {got}")
    device, d_model = hidden.device, hidden.shape[-1]
    check_tensor(f"{name}hidden", hidden, (None,) * hidden.dim(), device)
    check_tensor(f"{name}weight", weight, (None, d_model), device)
    n_vocab = weight.shape[0]
    if n_vocab < 1 or d_model < 1:
        raise ValueError(f"{name}weight: expected V ≥ 1 and D ≥ 1, got shape {tuple(weight.shape)}")
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise ValueError(
            f"{name}weight: expected dtype {hidden.dtype} as {name}hidden, or float32, got {weight.dtype}"
        )
    others = {"weight": weight}
    if bias is not None:
        others["bias"] = check_tensor(f"{name}bias", bias, (n_vocab,), device)
    if lora is not None:
        a, b, scale = lora = check_lora(name, lora, weight)
        others |= {"lora A": a, "lora B": b}
    for part, tensor in others.items():
        if (tensor.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise ValueError(f"{name}{part}: float64 does not mix with {hidden.dtype}, got {tensor.dtype}")
    hidden = parts.read(hidden)
    if lora is not None:
        lora = parts.read(a), parts.read(b), scale
    if shard is not None:
        hidden = share_gradient(hidden, shard)
        lora = None if lora is None else (share_gradient(lora[0], shard), *lora[1:])
    return Stream(
        hidden,
        parts.read(weight),
        None if bias is None else parts.read(bias),
        lora,
        check_positive(f"{name}temperature", temperature),
        None if softcap is None else check_positive(f"{name}softcap", softcap),
        shard,
    )


def unsharded(name: str, stream: Stream) -> Stream:
    """`stream` with this rank's rows where its head is a DTensor sharded over the vocabulary."""
    weight, shard = stream.weight, stream.shard
    if shard is not None and not (isinstance(shard, VocabShard) and is_number(shard.start)):
        raise ValueError(f"{name}shard: expected a VocabShard, got {shard!r}")
    placements = getattr(weight, "placements", None)
    if placements is None:
        return stream
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    if shard is not None or mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{name}weight: expected a plain tensor (x.full_tensor() makes one), or a DTensor sharded on "
            f"dim 0 of one mesh dimension, got a DTensor with {placements}"
        )
    # As torch.chunk cuts.
    start = min(weight.shape[0], mesh.get_local_rank() * -(-weight.shape[0] // mesh.size()))
    bias = None if stream.bias is None else _local_rows(stream.bias)
    lora = None if stream.lora is None else (stream.lora[0], _local_rows(stream.lora[1]), stream.lora[2])
    shard = VocabShard(mesh.get_group(), start)
    return stream._replace(weight=_local_rows(weight), bias=bias, lora=lora, shard=shard)


def _local_rows(tensor: Tensor) -> Tensor:
    local: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return local


def check_lora(name: str, lora: Lora, weight: Tensor) -> Lora:
    """`lora` with its scale as a float; raises ValueError where it is no low-rank change of `weight`."""
    if not isinstance(lora, tuple | list) or len(lora) != 3:
        raise ValueError(f"{name}lora: expected (A [R, D], B [V, R], scale), got {type(lora).__name__}")
    a, b, scale = lora
    check_tensor(f"{name}lora A", a, (None, weight.shape[1]), weight.device)
    check_tensor(f"{name}lora B", b, (weight.shape[0], a.shape[0]), weight.device)
    if not is_number(scale) or not abs(scale) < MAX_FACTOR:
        raise ValueError(f"{name}lora scale: expected a finite number, got {scale!r}")
    return a, b, float(scale)


def check_beside(name: str, stream: Stream, first_name: str, first: Stream) -> None:
    """Raises ValueError where a stream does not fit the first one of a sweep."""
    if stream.hidden.shape[:-1] != first.hidden.shape[:-1]:
        raise ValueError(
            f"{name}hidden: expected leading shape {tuple(first.hidden.shape[:-1])} as {first_name}hidden, "
            f"got {tuple(stream.hidden.shape)}"
        )
    if stream.weight.shape[0] != first.weight.shape[0]:
        raise ValueError(
            f"{name}weight: expected V = {first.weight.shape[0]} rows as {first_name}weight, "
            f"got shape {tuple(stream.weight.shape)}"
        )
    if stream.shard != first.shard:
        raise ValueError(f"{name}weight: expected {first.shard} as {first_name}weight, got {stream.shard}")
    if stream.hidden.device != first.hidden.device:
        raise ValueError(f"{name}hidden: expected device {first.hidden.device}, got {stream.hidden.device}")
    if (stream.hidden.dtype == torch.float64) != (first.hidden.dtype == torch.float64):
        raise ValueError(
            f"{name}hidden: float64 does not mix with other dtypes, "
            f"got {stream.hidden.dtype} beside {first.hidden.dtype} of {first_name}hidden"
        )


class Parts:
    """The tensors of a call as the sweeps read them; what is one tensor to the caller stays one tensor.

    Under autocast a tensor is cast to its dtype (float64 stays, as in PyTorch's own autocast). Frozen tensors
    that are one view of one memory, as `weight.detach()` twice, become one tensor.
    """

    def __init__(self) -> None:
        self.known: list[tuple[Tensor, Tensor]] = []

    def read(self, tensor: Tensor) -> Tensor:
        """`tensor`, or what stands for it."""
        for known, result in self.known:
            if known is tensor or _are_one_frozen_view(known, tensor):
                return result
        result = usable(tensor)
        device_type = tensor.device.type
        if tensor.dtype != torch.float64 and device_type != "meta" and torch.is_autocast_enabled(device_type):
            result = result.to(torch.get_autocast_dtype(device_type))
        self.known.append((tensor, result))
        return result


def _are_one_frozen_view(one: Tensor, other: Tensor) -> bool:
    if torch.compiler.is_compiling() or one.requires_grad or other.requires_grad:
        return False
    return memory_of(one) == memory_of(other)


def usable(tensor: Tensor) -> Tensor:
    """`tensor`, or, of one made in inference mode, a tensor of the same memory that autograd may save."""
    if torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def memory_of(tensor: Tensor) -> object:
    """What tells tensors apart: equal for the same object, and for two views of one memory."""
    if not has_memory(tensor) or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, which would take products to its own dtype."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def has_memory(tensor: Tensor) -> bool:
    """True where a tensor has values: neither on the meta device nor made up by a tracer."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def check_targets(
    targets: Tensor, shape: torch.Size, n_vocab: int, device: torch.device, ignore_index: int
) -> Tensor:
    """`targets` flat in int64, [N], or [N·K] where each row has K of them.

    Raises ValueError for a wrong shape, dtype, device, or token out of range.
    """
    if not isinstance(targets, Tensor) or targets.dtype not in INDEX_DTYPES:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets: expected an int64 or int32 tensor, got {got}")
    if targets.shape != shape and targets.shape[:-1] != shape:
        raise ValueError(f"targets: expected shape {tuple(shape)} or (*, K), got {tuple(targets.shape)}")
    if targets.device != device:
        raise ValueError(f"targets: expected device {device}, got {targets.device}")
    refuse_distributed("targets", targets)
    flat = usable(targets).reshape(-1).long().contiguous()
    if _may_read_values(flat) and flat.numel():
        real = torch.where(flat == ignore_index, 0, flat)
        low, high = (int(bound) for bound in torch.aminmax(real))
        if low < 0 or high >= n_vocab:
            bad = low if low < 0 else high
            raise ValueError(f"targets: expected tokens in [0, {n_vocab}) or {ignore_index}, got {bad}")
    return flat


def _may_read_values(tensor: Tensor) -> bool:
    """False where looking at a value would stop the device or break a compiled graph."""
    if torch.compiler.is_compiling() or not has_memory(tensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("ETPO_CHECK") == "1"
