"""`etpo bench gpu`: all that only a GPU can show, in one call and within a time limit.

Correctness of every function against float64, tiles and routes, all peers in one process, and the engine on a
7B-shaped random model, in this order; what is there is written after every case, so that a run that ends
early, or is ended, leaves what it has. On a CPU the same steps run on tiny shapes, but for the tiles.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from etpo.bench import tune
from etpo.bench.kernels import measure, output, peers
from etpo.bench.kernels.cases import FUNCTIONS, Case, Function, Inputs, Shape, make_inputs
from etpo.engine.config import Config
from etpo.engine.learners.etpo import EtpoLearner
from etpo.engine.models.language_model import LanguageModel
from etpo.engine.models.roles import LoraRoles
from etpo.engine.models.sampler import sample_actions
from etpo.engine.replay import Action
from etpo.kernels.triton.sizes import Tile
from etpo.kernels.triton.tile import target_of

Tell = Callable[[str], None]
Save = Callable[[str], None]
# Largest errors in the relative 2-norm, against float64 of the same rounded inputs: of results, of gradients.
LIMITS = {torch.bfloat16: (1e-4, 3e-3), torch.float32: (1e-4, 1e-4)}


# Minutes on a CPU, whatever the shape.
SLOW_TO_COMPILE = ("torch.compile", "cut-cross-entropy")


class Sizes(NamedTuple):
    """Shape and tokens, of correctness and of times; layers, width, vocabulary, actions, lengths."""

    right: Shape
    right_tokens: int
    timed: Shape
    timed_tokens: int
    layers: int
    width: int
    vocabulary: int
    actions: int
    prompt: int
    answer: int


ON_A_GPU = Sizes(
    Shape("right", 32016, 1024), 256, Shape("llama-3-8b", 128256, 4096), 8192, 32, 4096, 32000, 32, 512, 128
)
ON_A_CPU = Sizes(Shape("tiny", 67, 16), 8, Shape("tiny", 67, 16), 8, 2, 32, 97, 4, 6, 4)


@dataclass
class Found:
    """What a run has found so far; `skipped` names the steps that the time did not allow."""

    environment: dict[str, Any]
    minutes: float
    correctness: list[dict[str, Any]] = field(default_factory=list)
    tiles: dict[str, Tile] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    rows: list[measure.Row] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """True where every function was as exact as it has to be."""
        return all(entry["right"] for entry in self.correctness)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | {"is_right": self.is_right}, indent=1) + "\n"


def run(minutes: float, device: torch.device, tell: Tell, save: Save) -> Found:
    """All steps within `minutes`; `save` gets the JSON of what there is after every case."""
    on_gpu = device.type == "cuda"
    sizes = ON_A_GPU if on_gpu else ON_A_CPU
    start = time.monotonic()
    found = Found(output.environment(device), minutes)

    def keep() -> None:
        save(found.to_json())

    def clock(share: float) -> float:
        return start + 60.0 * minutes * share

    for entry in correctness(sizes, device):
        found.correctness.append(entry)
        told = "right" if entry["right"] else "WRONG"
        tell(f"{entry['function']}, {entry['heads']}, {entry['dtype']}, {entry['backend']}: {told}")
        keep()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if on_gpu:

        def keep_tiles(tiles: dict[str, Tile]) -> None:
            found.tiles = tiles
            keep()

        tune.tune_tiles(target_of(device), clock(0.4), tell, keep_tiles)
    n_rounds = tune.REPEATS if on_gpu else 1
    shape = sizes.timed
    found.routes = tune.tune_routes(shape, sizes.timed_tokens, device, dtype, clock(0.5), tell, n_rounds)
    keep()
    for case in timed_cases(sizes, device, dtype):
        if time.monotonic() > clock(0.85):
            found.skipped.append(f"times of {case.name}")
            continue
        everyone = [c for c in peers.CONTESTANTS.values() if on_gpu or c.name not in SLOW_TO_COMPILE]
        found.rows += measure.measure([case], everyone, n_rounds, tell)
        keep()
    if time.monotonic() < clock(1.0):
        found.engine = engine_times(sizes, device, tell)
    else:
        found.skipped.append("engine")
    keep()
    return found


def correctness(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """Every function, frozen and trained, in bf16 and float32, on the backends that run there."""
    on_gpu = device.type == "cuda"
    for function in FUNCTIONS.values():
        for dtype, limits in LIMITS.items():
            for trained in (False,) if function.from_logits else (False, True):
                case = Case(function, sizes.right, sizes.right_tokens, trained, device, dtype)
                inputs = make_inputs(case)
                for backend in ("auto", "triton", "chunked") if on_gpu else ("auto", "chunked"):
                    entry: dict[str, Any] = {
                        "function": function.name, "heads": "trained" if trained else "frozen",
                        "dtype": str(dtype).removeprefix("torch."), "backend": backend, "right": False,
                    }  # fmt: skip
                    try:
                        call = partial(_call, function, backend)
                        errors = measure.errors_of(case, call, inputs, is_mean=False)
                    except Exception as error:
                        entry["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                        yield entry
                        continue
                    assert errors is not None
                    entry |= {"error_value": errors[0], "error_gradient": errors[1]}
                    entry["right"] = errors[0] <= limits[0] and errors[1] <= limits[1]
                    yield entry


def _call(function: Function, backend: str, inputs: Inputs) -> list[torch.Tensor]:
    return function.run(inputs, backend)


def timed_cases(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The functions of the goals first."""
    names = ("linear_logprob_alone", "linear_kl", "soft_policy_kl", "linear_logprob", "vocab_stats")
    for trained in (False, True):
        for name in names:
            yield Case(FUNCTIONS[name], sizes.timed, sizes.timed_tokens, trained, device, dtype)


def engine_times(sizes: Sizes, device: torch.device, tell: Tell) -> dict[str, Any]:
    """Seconds of one decode of a batch of actions and of one update on them, by a random model's adapters."""
    tell(f"engine: {sizes.layers} layers of {sizes.width}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = max(2, sizes.width // 128)
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=sizes.vocabulary, hidden_size=sizes.width,
                intermediate_size=sizes.width * 43 // 16,
                num_hidden_layers=sizes.layers, num_attention_heads=heads, num_key_value_heads=heads,
                max_position_embeddings=4096,
            ),
            dtype=dtype,
        ).eval()  # fmt: skip
    roles = LoraRoles(LanguageModel(hf), 8, EtpoLearner.moves)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, sizes.vocabulary, (sizes.prompt,), generator=generator) for _ in range(sizes.actions)
    ]
    decode_s = []
    for _ in range(2):
        start = seconds(device)
        with roles.acting("policy") as model:
            drawn = sample_actions(
                model, prompts, max_new_tokens=sizes.answer, stop_token=2,
                generator=torch.Generator(device).manual_seed(0),
            )  # fmt: skip
        decode_s.append(seconds(device) - start)
    actions = [
        Action(p, s.tokens, s.logprob_mu, float(i % 2), True, None, i, 0, 0, hidden=s.hidden)
        for i, (p, s) in enumerate(zip(prompts, drawn, strict=True))
    ]
    config = Config(updates_per_batch=1, lora_rank=8, max_kl_update=1e3)
    learner = EtpoLearner(roles, config)
    start = seconds(device)
    learner.update(actions)
    n_tokens = sum(len(s.tokens) for s in drawn)
    return {
        "parameters": sum(p.numel() for p in hf.parameters()), "actions": sizes.actions,
        "prompt_tokens": sizes.prompt, "drawn_tokens": n_tokens, "decode_s": decode_s[-1],
        "tokens_per_s": n_tokens / decode_s[-1], "update_s": seconds(device) - start,
    }  # fmt: skip


def seconds(device: torch.device) -> float:
    """The clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
