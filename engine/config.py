"""The configuration of a run: one frozen dataclass, its presets, its TOML form.

Precedence is flag, then `--config` file, then `--preset`, then default; unknown keys are refused with the
nearest name. A new option is one field here: the checks, the command line with its help, the TOML file and
docs/options.md are made from it.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from etpo.engine.learners import ALGORITHMS
from etpo.engine.options import declared, nearest, one_of, setting
from etpo.engine.rates import LEARNING_RATES

__all__ = ["OPTIONS", "PRESETS", "Config", "nearest", "read_toml", "resolve", "to_toml"]

PRESETS: dict[str, dict[str, Any]] = {
    # The authors' setting, on the paper's update: one batch on policy, one step of Lion, one-step backup.
    "paper": {
        "algo": "etpo-q", "beta": 0.01, "gamma": 0.99, "lam": 0.0, "q_form": "logits", "backup": "expected",
        "tau": 0.995, "huber_delta": 10.0, "clip_norm": 10.0, "optimizer": "lion", "lr": 1e-6,
        "critic_lr": 1e-6, "envs": 8, "rollout_steps": 2, "max_new_tokens": 256, "max_episode_steps": 5,
        "replay_capacity": 16, "replay_weight": "none", "minibatch": 16, "updates_per_batch": 1,
        "protocol": "paper",
    },
}  # fmt: skip

# Options that mean something to etpo-q alone.
OF_THE_CRITIC = (
    "q_form", "backup", "critic_lr", "value_lr", "huber_delta", "tau", "replay_capacity", "replay_weight",
    "minibatch",
)  # fmt: skip

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")

# The headings of the help, in their order.
TASK = "What is learned, and on what"
ROLLOUT = "Writing programs"
AGENT = "A model behind an HTTP API in the place of --model"
OBJECTIVE = "What the update aims at"
UPDATE = "How the update steps"
ENVIRONMENT = "Running programs"
MACHINE = "Machine and folder"


def _by_optimizer(rate: str) -> str:
    """What a step size is where it is not given."""
    return ", ".join(f"{getattr(rates, rate):g} for {name}" for name, rates in LEARNING_RATES.items())


def _by_algorithm(name: str) -> str:
    """What a number is for each algorithm that trains, where it is not given."""
    return ", ".join(f"{getattr(one, name):g} for {algo}" for algo, one in ALGORITHMS.items() if one.lr)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; docs/options.md explains each option.

    Raises:
        ValueError: a value of the wrong type or outside its bounds; the message names the option, what was
            expected and what came.
    """

    dataset: str = setting(
        "tic-tac-toe", TASK, "Data set by name (see `etpo data list`), or the path of a CSV file."
    )
    target: str | None = setting(None, TASK, "The target's column; needed for a CSV file.")
    env: str | None = setting(
        None,
        TASK,
        "Another environment in the data set's place: a gymnasium id, module:Class, gem:ID, "
        "reasoning-gym:TASK or textarena:ID.",
    )
    env_arg: str | None = setting(
        None, TASK, "Arguments of that environment's constructor: key=value, several parted by commas."
    )
    model: str = setting(
        "etpo-nano",
        TASK,
        "Model folder, GGUF file, hub name (owner/name), the bundled etpo-nano, or smollm2-135m from its "
        "package (etpo[smol]).",
    )
    algo: str = setting(
        "etpo", TASK, "; ".join(f"{name} {algorithm.help}" for name, algorithm in ALGORITHMS.items())
        + ". Where none is named, an option of the critic network makes it etpo-q.",
        choices=tuple(ALGORITHMS),
    )  # fmt: skip
    # `resolve` merges the preset in; of itself the field sets nothing, it only keeps the name.
    preset: str | None = setting(
        None, TASK, "A named set of options; flags and --config override it.", choices=tuple(PRESETS)
    )
    steps: int = setting(
        500, TASK, "Programs executed in all, counted over all environments.", unit="programs", low=1,
        resumable=True,
    )  # fmt: skip
    seed: int = setting(0, TASK, "Seed of every random draw.", low=0, high=2**63 - 1)

    envs: int = setting(8, ROLLOUT, "Environments that are stepped together.", low=1, high=1024)
    rollout_steps: int = setting(
        2, ROLLOUT, "Programs that each environment executes between two updates.", unit="programs", low=1
    )
    max_new_tokens: int = setting(
        256, ROLLOUT, "Longest program; a longer one is executed as it stands.", unit="tokens", low=1
    )
    temperature: float = setting(1.0, ROLLOUT, "Of sampling; 1 draws from the policy itself.", above=0)
    top_k: int = setting(0, ROLLOUT, "Draw from the k likeliest tokens; 0: from all.", low=0)
    top_p: float = setting(
        1.0, ROLLOUT, "Draw from the likeliest tokens that make up this probability; 1: from all.", above=0,
        high=1,
    )  # fmt: skip
    max_episode_steps: int = setting(
        5, ROLLOUT, "Failed programs after which an episode starts anew.", unit="programs", low=1
    )
    prompt_form: Literal["auto", "completion", "infill", "chat"] = setting(
        "auto", ROLLOUT,
        "How the task is put to the model; auto: as its tokenizer asks for (docs/prompts.md).",
    )  # fmt: skip
    reflection: bool = setting(
        True, ROLLOUT,
        "Show a failed program and its error in the next prompt; without, each attempt is fresh.",
    )  # fmt: skip

    agent: str | None = setting(
        None, AGENT,
        "openai:MODEL behind an OpenAI-compatible HTTP API, for --algo reflection; key: OPENAI_API_KEY.",
    )  # fmt: skip
    base_url: str | None = setting(None, AGENT, "Where that API is.", unset="https://api.openai.com/v1")
    agent_timeout_s: float = setting(
        120.0, AGENT, "Time that the API may take for one answer.", unit="seconds", above=0
    )
    agent_retries: int = setting(
        6, AGENT, "Further tries where the API is busy, fails or does not answer.", low=0
    )
    prompt_price: float = setting(
        0.0, AGENT, "Price of what is sent to the API, to count the cost.",
        unit="US dollars a million tokens", low=0,
    )  # fmt: skip
    completion_price: float = setting(
        0.0, AGENT, "Price of what the API writes.", unit="US dollars a million tokens", low=0
    )

    beta: float = setting(0.1, OBJECTIVE, "Weight β of the KL to the reference.", unit="reward", above=0)
    gamma: float = setting(
        0.99, OBJECTIVE, "Discount γ from one program to the next (inside a program it is 1).", low=0, high=1
    )
    lam: float | None = setting(
        None, OBJECTIVE, "λ of the traces: 0 looks one token ahead (of ppo-kl: one program), 1 to the end.",
        low=0, high=1, unset=_by_algorithm("lam"),
    )  # fmt: skip
    q_form: Literal["logits", "residual", "normalised"] = setting(
        "normalised", OBJECTIVE, "How Q is read from the critic's logits."
    )
    backup: Literal["expected", "soft"] = setting(
        "soft", OBJECTIVE, "Value of the next state: expected under the policy, or soft (log-sum-exp)."
    )

    clip_low: float = setting(
        0.2,
        OBJECTIVE,
        "How far a ratio π/μ may fall below 1 and still count (ppo-kl, rloo, grpo).",
        low=0,
        high=1,
    )
    clip_high: float = setting(
        0.2, OBJECTIVE, "How far a ratio π/μ may rise above 1 and still count (ppo-kl, rloo, grpo).", low=0
    )
    grpo: Literal["grpo", "dapo", "dr", "gspo"] = setting(
        "grpo", OBJECTIVE, "Which form of GRPO: as published, or with the corrections of that name."
    )

    roles: Literal["auto", "full", "lora"] = setting(
        "auto", UPDATE,
        "Separate weights (full), adapters on one base (lora), or by size (auto: lora above 100 million "
        "parameters).",
    )  # fmt: skip
    lora_rank: int = setting(16, UPDATE, "Rank of the adapters.", low=1)
    optimizer: Literal["auto", "sgd", "adamw", "lion"] = setting(
        "auto", UPDATE,
        "Optimiser of policy and critic; auto: momentum SGD.",
    )  # fmt: skip
    lr: float | None = setting(
        None, UPDATE, "Step size of the policy.", above=0, unset=_by_optimizer("policy")
    )
    critic_lr: float | None = setting(
        None, UPDATE, "Step size of the critic.", above=0, unset=_by_optimizer("critic")
    )
    value_lr: float | None = setting(
        None, UPDATE, "Step size of the critic's scalar head.", above=0, unset=_by_optimizer("value")
    )
    clip_norm: float = setting(1.0, UPDATE, "Largest norm of a gradient.", above=0)
    huber_delta: float = setting(
        10.0, UPDATE, "Where the critic's loss turns from square to linear.", unit="reward", above=0
    )
    tau: float = setting(
        0.9, UPDATE, "Share of itself that the target network keeps at each step.", low=0, high=1
    )
    max_kl_update: float | None = setting(
        None, UPDATE, "Bound on the KL by which one update may move the policy.", unit="nat a token", above=0,
        unset=_by_algorithm("max_kl"),
    )  # fmt: skip
    replay_capacity: int = setting(512, UPDATE, "Programs kept for later updates.", unit="programs", low=1)
    replay_weight: Literal["auto", "none", "truncated"] = setting(
        "auto", UPDATE,
        "Of a replayed program in the critic's loss; truncated: its min(1, π/μ); none: 1; auto: truncated "
        "for --q-form normalised.",
    )  # fmt: skip
    minibatch: int = setting(32, UPDATE, "Programs in one gradient step.", unit="programs", low=1)
    updates_per_batch: int = setting(5, UPDATE, "Gradient steps between two rollouts.", low=1)

    protocol: Literal["default", "paper"] = setting(
        "default", ENVIRONMENT, "How the data set is prepared; paper does as the authors' code does."
    )
    sandbox: Literal["strict", "default", "off"] = setting(
        "default", ENVIRONMENT,
        "strict refuses to run with fewer than all layers (see `etpo doctor`); off asks twice.",
    )  # fmt: skip
    runner: str = setting(
        "local", ENVIRONMENT,
        "Where programs run: local, docker:IMAGE or podman:IMAGE (the image has etpo), or machines with "
        "`etpo serve-sandbox`: http://HOST:PORT, several parted by commas (their own --sandbox counts).",
    )  # fmt: skip
    timeout_s: float = setting(
        10.0, ENVIRONMENT,
        "Processor time that a program may take on one of its five splits; of wall-clock time twice as much.",
        unit="seconds", above=0,
    )  # fmt: skip
    audit_share: float = setting(
        0.02, ENVIRONMENT,
        "Share of the programs that are audited for labels they were not given, besides each new best one; "
        "0: none is (docs/sandbox.md).",
        low=0, high=1,
    )  # fmt: skip

    device: str = setting("auto", MACHINE, "auto, cpu, cuda or cuda:N.", resumable=True)
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", MACHINE, "Of the weights; auto: bfloat16 for adapters on a GPU, else float32."
    )
    threads: int = setting(0, MACHINE, "CPU threads; 0: one for each core.", low=0, high=1024, resumable=True)
    checkpoint_every: int = setting(
        80, MACHINE, "Programs between two checkpoints.", unit="programs", low=1, resumable=True
    )
    log: str = setting(
        "tensorboard", MACHINE,
        "Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio, mlflow, several parted by "
        "commas; or none.",
        resumable=True,
    )  # fmt: skip
    out: str | None = setting(
        None, MACHINE, "The run's folder, new or empty.", unset="runs/<dataset>-<algo>-s<seed>-<time>"
    )

    def __post_init__(self) -> None:
        for name, one in OPTIONS.items():
            object.__setattr__(self, name, one.checked(getattr(self, name)))
        if self.agent is not None and self.algo != "reflection":
            raise ValueError(f"--agent: expected --algo reflection beside it (an API cannot be "
                             f"trained), got --algo {self.algo}")  # fmt: skip

        log_names(self.log)

    @property
    def lam_in_force(self) -> float:
        """λ as given, or what suits the algorithm."""
        return ALGORITHMS[self.algo].lam if self.lam is None else self.lam

    @property
    def max_kl_in_force(self) -> float:
        """The bound on an update's KL as given, or what suits the algorithm."""
        return ALGORITHMS[self.algo].max_kl if self.max_kl_update is None else self.max_kl_update


OPTIONS = declared(Config)
# For `help(etpo.Config)` and editors: what each option is for, from its declaration.
Config.__doc__ = f"{Config.__doc__}\n    Attributes:\n" + "\n".join(
    f"        {name}: {one.option.help}" for name, one in OPTIONS.items()
)


def log_names(log: str) -> list[str]:
    """The trackers that `--log` names; an empty list for `none`.

    Raises:
        ValueError: one that is not known.
    """
    if log.strip() == "none":
        return []
    return [one_of("--log", name.strip(), TRACKERS) for name in log.split(",")]


def resolve(flags: dict[str, Any], file: Path | None = None, preset: str | None = None) -> Config:
    """Merge flags over a TOML file over a preset over the defaults.

    Where no algorithm is named, an option that only a critic network has makes it etpo-q.

    Args:
        flags: only the options that were really given.
        file: TOML file with the same keys, or None.
        preset: name of a preset, or None; a `preset` key in the file counts where no flag names one.

    Raises:
        ValueError: unknown key, unknown preset, or a value of the wrong type or outside its bounds.
    """
    from_file = read_toml(file) if file else {}
    for key in from_file:
        if key not in OPTIONS:
            raise ValueError(f"{file}: unknown key '{key}'{nearest(key, list(OPTIONS))}")
    preset = preset or flags.get("preset") or from_file.get("preset")
    values = {} if preset is None else PRESETS[one_of("--preset", preset, list(PRESETS))]
    given = {**from_file, **flags}
    if given.get("algo", "etpo-q") != "etpo-q":  # a preset of the critic network, with another algorithm
        values = {name: value for name, value in values.items() if name not in OF_THE_CRITIC}
    merged = {**values, **given, "preset": preset}
    if "algo" not in merged and any(name in merged for name in OF_THE_CRITIC):
        merged["algo"] = "etpo-q"
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
