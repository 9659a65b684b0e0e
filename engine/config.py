"""The configuration of a run: one frozen dataclass, its presets, its TOML form.

Precedence is flag, then `--config` file, then `--preset`, then default; unknown keys are refused with the
nearest name.
"""

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

# What the machine's numbers, its threads and its processes can take.
MOST = {"seed": 2**63 - 1, "threads": 1024, "envs": 1024}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Units stand in the names; β is in reward units.

    Attributes:
        preset: the preset that `resolve` merged in, for the record; of itself it sets nothing.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names the option, what was
            expected and what came.
    """

    # what is learned, and on what
    dataset: str = "tic-tac-toe"
    target: str | None = None
    env: str | None = None
    model: str = "etpo-nano"
    algo: Literal["etpo", "reflection"] = "etpo"
    preset: str | None = None
    steps: int = 500
    seed: int = 0
    # rollout
    envs: int = 8
    rollout_steps: int = 2
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_episode_steps: int = 5
    prompt_form: Literal["auto", "completion", "infill", "chat"] = "auto"
    reflection: bool = True
    # a model behind an HTTP API in the place of `model`
    agent: str | None = None
    base_url: str | None = None
    agent_timeout_s: float = 120.0
    agent_retries: int = 6
    prompt_price: float = 0.0
    completion_price: float = 0.0
    # the update
    beta: float = 0.1
    gamma: float = 0.99
    lam: float = 1.0
    q_form: Literal["logits", "residual", "normalised"] = "normalised"
    backup: Literal["expected", "soft"] = "soft"
    roles: Literal["auto", "full", "lora"] = "auto"
    lora_rank: int = 16
    optimizer: Literal["auto", "sgd", "adamw", "lion"] = "auto"
    lr: float | None = None
    critic_lr: float | None = None
    value_lr: float | None = None
    clip_norm: float = 1.0
    huber_delta: float = 10.0
    tau: float = 0.9
    max_kl_update: float = 0.02
    replay_capacity: int = 512
    replay_weight: Literal["auto", "none", "truncated"] = "auto"
    minibatch: int = 32
    updates_per_batch: int = 5
    # the environment
    protocol: Literal["default", "paper"] = "default"
    sandbox: Literal["strict", "default", "off"] = "default"
    timeout_s: float = 10.0
    # the machine
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 0
    checkpoint_every: int = 80
    out: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name)))
        for name, low in (
            ("steps", 1), ("envs", 1), ("rollout_steps", 1), ("max_new_tokens", 1), ("max_episode_steps", 1),
            ("top_k", 0), ("lora_rank", 1), ("replay_capacity", 1), ("minibatch", 1),
            ("updates_per_batch", 1), ("threads", 0), ("checkpoint_every", 1), ("seed", 0),
            ("agent_retries", 0), ("prompt_price", 0), ("completion_price", 0),
        ):  # fmt: skip
            value, high = getattr(self, name), MOST.get(name, float("inf"))
            if not low <= value <= high:
                upper = f" and ≤ {high}" if name in MOST else ""
                raise ValueError(f"{option(name)}: expected a number ≥ {low}{upper}, got {value}")
        for name in (
            "temperature", "beta", "lr", "critic_lr", "value_lr", "clip_norm", "huber_delta",
            "max_kl_update", "timeout_s", "agent_timeout_s",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{option(name)}: expected a finite number > 0, got {value}")
        for name in ("gamma", "lam", "tau", "top_p"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0 or (name == "top_p" and value == 0.0):
                raise ValueError(f"{option(name)}: expected a number from 0 to 1, got {value}")
        if self.agent is not None and self.algo != "reflection":
            raise ValueError(f"--agent: expected --algo reflection beside it (an API cannot be "
                             f"trained), got --algo {self.algo}")  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    # The authors' setting, on the paper's update: one batch on policy, one step of Lion, one-step backup.
    "paper": {
        "beta": 0.01, "gamma": 0.99, "lam": 0.0, "q_form": "logits", "backup": "expected", "tau": 0.995,
        "huber_delta": 10.0, "clip_norm": 10.0, "optimizer": "lion", "lr": 1e-6, "critic_lr": 1e-6,
        "envs": 8, "rollout_steps": 2, "max_new_tokens": 256, "max_episode_steps": 5,
        "replay_capacity": 16, "replay_weight": "none", "minibatch": 16, "updates_per_batch": 1,
        "protocol": "paper",
    },
}  # fmt: skip


def option(name: str) -> str:
    """The command-line spelling of a key: `max_kl_update` → `--max-kl-update`."""
    return "--" + name.replace("_", "-")


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def resolve(flags: dict[str, Any], file: Path | None = None, preset: str | None = None) -> Config:
    """Merge flags over a TOML file over a preset over the defaults.

    Args:
        flags: only the options that were really given.
        file: TOML file with the same keys, or None.
        preset: name of a preset, or None; a `preset` key in the file counts where no flag names one.

    Raises:
        ValueError: unknown key, unknown preset, or a value of the wrong type or range.
    """
    known = [field.name for field in dataclasses.fields(Config)]
    from_file = read_toml(file) if file else {}
    for key in from_file:
        if key not in known:
            raise ValueError(f"{file}: unknown key '{key}'{nearest(key, known)}")
    preset = preset or flags.get("preset") or from_file.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got '{preset}'"
                         f"{nearest(preset, list(PRESETS))}")  # fmt: skip
    merged = {**(PRESETS[preset] if preset else {}), **from_file, **flags, "preset": preset}
    return Config(**merged)


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a TOML file. Raises ValueError with one line where it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: expected a TOML file, got {type(error).__name__}: {error}") from None


def to_toml(config: Config) -> str:
    """The complete effective configuration; keys whose value is None are left out."""
    return tomli_w.dumps({k: v for k, v in dataclasses.asdict(config).items() if v is not None})


def _typed(key: str, value: Any) -> Any:
    """`value` as the field's type wants it; an int is welcome where a float is wanted."""
    hint = get_type_hints(Config)[key]
    options = get_args(hint) if get_origin(hint) is not Literal else ()
    if value is None and type(None) in options:
        return None
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            words = [str(word) for word in get_args(hint)]
            raise ValueError(f"{option(key)}: expected one of {', '.join(words)}, got '{value}'"
                             f"{nearest(str(value), words)}")  # fmt: skip
        return value
    kind = next((t for t in options if t is not type(None)), hint)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{option(key)}: expected {kind.__name__}, got {value!r}")
    return value
