"""What goes into a vocabulary sweep and what comes out: streams, statistics, and the checks at the edge."""

import operator
import os
from typing import NamedTuple

import torch
from torch import Tensor

Lora = tuple[Tensor, Tensor, float]

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)
# Logits are multiplied by nothing larger.
MAX_FACTOR = torch.finfo(torch.float32).max


class Stream(NamedTuple):
    """One language-model head and the hidden states it reads.

        z = softcap · tanh((h·Wᵀ + scale·(h·Aᵀ)·Bᵀ + bias) / softcap) / temperature

    hidden: [N, D] or [B, T, D]; weight: [V, D], of the dtype of hidden; bias: [V]; lora: (A [R, D], B [V, R],
    scale), a low-rank change of the head; temperature > 0; softcap > 0, or None. Dtypes are float64 (all
    tensors, or none), float32, bfloat16 and float16; bias and lora may differ in dtype from weight.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    lora: Lora | None = None
    temperature: float = 1.0
    softcap: float | None = None


class VocabStats(NamedTuple):
    """Statistics of the vocabulary at each token, [N] or [B, T]; None where a stream or targets are absent.

    lse_*: log-sum-exp of the logits of the policy p, critic q, reference r, and of u = a·z_r + b·z_q.
    e_pr = E_p[z_p − z_r], e_pu = E_p[z_p − u], e_pp = E_p[z_p − lse_p] (minus the entropy), e_q = E_p[z_q].
    at_*: the logit of the target token. Float32; float64 for float64 inputs.
    """

    lse_p: Tensor | None
    lse_q: Tensor | None
    lse_r: Tensor | None
    lse_u: Tensor | None
    e_pr: Tensor | None
    e_pu: Tensor | None
    e_pp: Tensor | None
    e_q: Tensor | None
    at_p: Tensor | None
    at_q: Tensor | None
    at_r: Tensor | None


class Source(NamedTuple):
    """A checked stream, flat: hidden [N, D] and its head, or, with weight None, logits [N, V] in `hidden`."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None = None
    lora: Lora | None = None
    temperature: float = 1.0
    softcap: float | None = None

    @property
    def n_vocab(self) -> int:
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]


class Problem(NamedTuple):
    """A checked sweep, the argument of every backend; targets [N] are int64."""

    policy: Source | None
    critic: Source | None
    reference: Source | None
    targets: Tensor | None
    mix: tuple[float, float]
    ignore_index: int

    @property
    def sources(self) -> tuple[Source | None, Source | None, Source | None]:
        return self.policy, self.critic, self.reference

    @property
    def first(self) -> Source:
        return next(source for source in self.sources if source is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits and results."""
        return torch.float64 if self.first.hidden.dtype == torch.float64 else torch.float32

    @property
    def has_u(self) -> bool:
        """True where u exists: a coefficient is not 0, and the stream of each such coefficient is there."""
        pairs = ((self.mix[0], self.reference), (self.mix[1], self.critic))
        used = [stream for coefficient, stream in pairs if coefficient != 0]
        return bool(used) and all(stream is not None for stream in used)


KL_FIELDS = ("lse_p", "lse_u", "e_pu")
LOG_RATIO_FIELDS = ("lse_r", "lse_u")


def kl_of(stats: dict[str, Tensor]) -> Tensor:
    """KL(softmax z_p ‖ softmax u) from the statistics KL_FIELDS."""
    return stats["e_pu"] - stats["lse_p"] + stats["lse_u"]


def log_ratio_of(stats: dict[str, Tensor]) -> Tensor:
    """lse u − lse z_r from the statistics LOG_RATIO_FIELDS."""
    return stats["lse_u"] - stats["lse_r"]


def available_fields(problem: Problem) -> tuple[str, ...]:
    """Names of the statistics that the streams of `problem` define."""
    p, q, r = (stream is not None for stream in problem.sources)
    u, t = problem.has_u, problem.targets is not None
    present = {
        "lse_p": p,
        "lse_q": q,
        "lse_r": r,
        "lse_u": u,
        "e_pr": p and r,
        "e_pu": p and u,
        "e_pp": p,
        "e_q": p and q,
        "at_p": p and t,
        "at_q": q and t,
        "at_r": r and t,
    }
    return tuple(name for name in VocabStats._fields if present[name])


def build_problem(
    policy: Stream | None,
    critic: Stream | None,
    reference: Stream | None,
    *,
    targets: Tensor | None = None,
    mix: tuple[float, float] = (1.0, 1.0),
    ignore_index: int = -100,
    prefixes: tuple[str, str, str] = ("policy.", "critic.", "reference."),
) -> tuple[Problem, torch.Size]:
    """Checks every input and flattens it. Returns the problem and the shape of one statistic.

    prefixes: what stands before "hidden", "weight", … in the caller's names of a stream's parts. Raises
    ValueError for a shape, dtype, device or value that a sweep cannot take.
    """
    named = tuple(zip(prefixes, (policy, critic, reference), strict=True))
    casts: list[tuple[Tensor, Tensor]] = []
    streams = [None if stream is None else check_stream(name, stream, casts) for name, stream in named]
    present = [(name, stream) for (name, _), stream in zip(named, streams, strict=True) if stream is not None]
    if not present:
        raise ValueError("policy: expected at least one stream, got None for each of them")
    first_name, first = present[0]
    shape = first.hidden.shape[:-1]
    for name, stream in present[1:]:
        if stream.hidden.shape[:-1] != shape:
            raise ValueError(
                f"{name}hidden: expected leading shape {tuple(shape)} as {first_name}hidden, "
                f"got {tuple(stream.hidden.shape)}"
            )
        if stream.weight.shape[0] != first.weight.shape[0]:
            raise ValueError(
                f"{name}weight: expected V = {first.weight.shape[0]} rows as {first_name}weight, "
                f"got shape {tuple(stream.weight.shape)}"
            )
        if stream.hidden.device != first.hidden.device:
            raise ValueError(
                f"{name}hidden: expected device {first.hidden.device}, got {stream.hidden.device}"
            )
        if (stream.hidden.dtype == torch.float64) != (first.hidden.dtype == torch.float64):
            raise ValueError(
                f"{name}hidden: float64 does not mix with other dtypes, "
                f"got {stream.hidden.dtype} beside {first.hidden.dtype} of {first_name}hidden"
            )
    ignore_index = check_index("ignore_index", ignore_index)
    if targets is not None:
        targets = check_targets(targets, shape, first.weight.shape[0], first.hidden.device, ignore_index)
    flat = [None if stream is None else _flat(stream) for stream in streams]
    return Problem(flat[0], flat[1], flat[2], targets, check_mix(mix), ignore_index), shape


def _flat(stream: Stream) -> Source:
    hidden = stream.hidden
    if hidden.dim() == 3:
        hidden = hidden.reshape(-1, hidden.shape[-1])
    return Source(hidden, *stream[1:])


def check_mix(mix: tuple[float, float]) -> tuple[float, float]:
    try:
        a, b = (float(coefficient) for coefficient in mix)
    except (TypeError, ValueError):
        raise ValueError(f"mix: expected two numbers (a, b), got {mix!r}") from None
    if not (abs(a) < MAX_FACTOR and abs(b) < MAX_FACTOR):
        raise ValueError(f"mix: expected two numbers (a, b) in the range of float32, got {mix!r}")
    return a, b


def check_positive(name: str, value: float) -> float:
    """`value` as a float; raises ValueError unless float32 holds it and its inverse, both above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1.0 / MAX_FACTOR < value < MAX_FACTOR:
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
    return value


def check_stream(name: str, stream: Stream, casts: list[tuple[Tensor, Tensor]]) -> Stream:
    """`stream` with autocast's dtype applied; raises ValueError where its parts do not fit together.

    casts: what autocast has made of the tensors of other streams, so that a head they share stays one tensor.
    """
    if not isinstance(stream, Stream):
        raise ValueError(f"{name.rstrip('.')}: expected a Stream, got {type(stream).__name__}")
    hidden, weight, bias, lora, temperature, softcap = stream
    if not isinstance(hidden, Tensor) or hidden.dim() not in (2, 3):
        got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"{name}hidden: expected shape [N, D] or [B, T, D], got {got}")
    device = hidden.device
    d_model = hidden.shape[-1]
    check_tensor(f"{name}hidden", hidden, (None,) * hidden.dim(), device)
    check_tensor(f"{name}weight", weight, (None, d_model), device)
    n_vocab = weight.shape[0]
    if n_vocab < 1 or d_model < 1:
        raise ValueError(f"{name}weight: expected V ≥ 1 and D ≥ 1, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor(f"{name}bias", bias, (n_vocab,), device)
    if lora is not None:
        if not isinstance(lora, tuple | list) or len(lora) != 3:
            raise ValueError(f"{name}lora: expected (A [R, D], B [V, R], scale), got {type(lora).__name__}")
        check_tensor(f"{name}lora A", lora[0], (None, d_model), device)
        check_tensor(f"{name}lora B", lora[1], (n_vocab, lora[0].shape[0]), device)
        number = isinstance(lora[2], int | float) and not isinstance(lora[2], bool)
        if not number or not abs(lora[2]) < MAX_FACTOR:
            raise ValueError(f"{name}lora scale: expected a finite number, got {lora[2]!r}")
        lora = (lora[0], lora[1], float(lora[2]))
    temperature = check_positive(f"{name}temperature", temperature)
    softcap = None if softcap is None else check_positive(f"{name}softcap", softcap)
    stream = _autocast(Stream(hidden, weight, bias, lora, temperature, softcap), casts)
    _check_dtypes(name, stream)
    return stream


def _check_dtypes(name: str, stream: Stream) -> None:
    dtype = stream.hidden.dtype
    if stream.weight.dtype != dtype:
        raise ValueError(f"{name}weight: expected dtype {dtype} as {name}hidden, got {stream.weight.dtype}")
    others = [("bias", stream.bias)]
    if stream.lora is not None:
        others += [("lora A", stream.lora[0]), ("lora B", stream.lora[1])]
    for part, tensor in others:
        if tensor is not None and (tensor.dtype == torch.float64) != (dtype == torch.float64):
            raise ValueError(f"{name}{part}: float64 does not mix with {dtype}, got {tensor.dtype}")


def _autocast(stream: Stream, casts: list[tuple[Tensor, Tensor]]) -> Stream:
    """`stream` in autocast's dtype where that is on; float64 tensors stay, as in PyTorch's own autocast."""
    device_type = stream.hidden.device.type
    if not torch.is_autocast_enabled(device_type):
        return stream
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            return tensor
        for known, result in casts:
            if known is tensor:
                return result
        casts.append((tensor, tensor.to(dtype)))
        return casts[-1][1]

    return stream._replace(
        hidden=cast(stream.hidden),
        weight=cast(stream.weight),
        bias=None if stream.bias is None else cast(stream.bias),
        lora=None if stream.lora is None else (cast(stream.lora[0]), cast(stream.lora[1]), stream.lora[2]),
    )


def check_targets(
    targets: Tensor, shape: torch.Size, n_vocab: int, device: torch.device, ignore_index: int
) -> Tensor:
    """`targets` flat in int64; raises ValueError for a wrong shape, dtype, device, or token out of range."""
    if not isinstance(targets, Tensor) or targets.dtype not in INDEX_DTYPES:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets: expected an int64 or int32 tensor, got {got}")
    if targets.shape != shape:
        raise ValueError(f"targets: expected shape {tuple(shape)}, got {tuple(targets.shape)}")
    if targets.device != device:
        raise ValueError(f"targets: expected device {device}, got {targets.device}")
    flat = targets.reshape(-1).long()
    if _may_read_values(device) and flat.numel():
        real = torch.where(flat == ignore_index, 0, flat)
        low, high = (int(bound) for bound in torch.aminmax(real))
        if low < 0 or high >= n_vocab:
            bad = low if low < 0 else high
            raise ValueError(f"targets: expected tokens in [0, {n_vocab}) or {ignore_index}, got {bad}")
    return flat


def _may_read_values(device: torch.device) -> bool:
    """False where looking at a value would stop the device or break a compiled graph."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("ETPO_CHECK") == "1"
