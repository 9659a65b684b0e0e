"""One run's parts, put together and taken apart: models, environments, buffers, random states.

`Run.state` and `Run.restore` are inverse: what a checkpoint holds is everything that decides the next
iteration.
"""

import dataclasses
import hashlib
import os
import resource
import time
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etpo.engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    flatten_optimizer,
    restore_optimizer,
    save_checkpoint,
)
from etpo.engine.config import Config
from etpo.engine.learners.etpo import Learner
from etpo.engine.models.language_model import LanguageModel, load_language_model
from etpo.engine.models.prompt_form import LEAST_ROOM, PromptForm
from etpo.engine.models.roles import TRAINED, FullRoles, LoraRoles, Role
from etpo.engine.models.sampler import Sampling
from etpo.engine.replay import Replay
from etpo.engine.run_folder import RunFolder
from etpo.envs.data_science import DataScience
from etpo.envs.vector import VectorRunner, make_env, takes

LORA_ABOVE_PARAMETERS = 100_000_000
MOVING: tuple[Role, ...] = ("policy", "critic", "target")


@dataclasses.dataclass(frozen=True)
class Best:
    """The best program so far."""

    step: int
    action: str
    auc_mean: float
    auc_std: float | None


class Progress:
    """How far a run has come, whoever acts in it: what its records are made from, and its checkpoints.

    Attributes:
        step: programs executed so far.
        saved_step: `step` at the newest checkpoint.
        wall_s: seconds so far, over all resumptions.
        recent: the last 100 programs' texts, for the distinct share.
        observations: the state that each environment waits in.
        episode_of, t_of: of each environment, its episode and its next time step.
    """

    def __init__(self, config: Config, folder: RunFolder, environments: VectorRunner) -> None:
        self.config, self.folder, self.environments = config, folder, environments
        self.step = 0
        self.saved_step = -1
        self.wall_s = 0.0
        self.best: Best | None = None
        self.recent: deque[str] = deque(maxlen=100)
        self.observations = environments.reset(config.seed)
        self.episode_of = [0] * config.envs
        self.t_of = [0] * config.envs

    def save(self, *, whole: bool = True) -> None:
        """Write a checkpoint of this moment, once."""
        if self.saved_step != self.step:
            save_checkpoint(self.folder.checkpoints, Checkpoint(self.step, self.tensors(), self.state(whole)))
            self.saved_step = self.step

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of a checkpoint, by name."""
        return {}

    def state(self, whole: bool) -> dict[str, Any]:
        """Everything else of a checkpoint, as JSON; `whole` says that it ends a whole iteration."""
        return {
            "whole": whole,
            "step": self.step,
            "wall_s": self.wall_s,
            "best": dataclasses.asdict(self.best) if self.best else None,
            "recent": list(self.recent),
            "observations": self.observations,
            "episode_of": self.episode_of,
            "t_of": self.t_of,
            "environments": self.environments.state_dict(),
            "sizes": self.folder.sizes(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; records written after it are dropped.

        An environment that keeps no state of its own starts a new episode.
        """
        state = checkpoint.state
        self.step = self.saved_step = state["step"]
        self.wall_s = state["wall_s"]
        self.best = Best(**state["best"]) if state["best"] else None
        self.recent.extend(state["recent"])
        self.observations = self.environments.load_state_dict(state["environments"])
        self.episode_of, self.t_of = state["episode_of"], state["t_of"]
        for row, kept in enumerate(state["environments"]["envs"]):
            if kept is None and self.t_of[row]:
                self.episode_of[row] += 1
                self.t_of[row] = 0
        self.folder.rewind(state["sizes"], self.step)


class Run(Progress):
    """Everything that the loop works with. Build it with `open_run`; use it as a context manager."""

    def __init__(self, config: Config, folder: RunFolder, model: LanguageModel, tokenizer: Any,
                 environments: VectorRunner) -> None:  # fmt: skip
        if config.max_new_tokens > model.context - LEAST_ROOM:
            raise ValueError(
                f"--max-new-tokens: expected at most {model.context - LEAST_ROOM}, as the model's context is "
                f"{model.context} tokens, got {config.max_new_tokens}"
            )
        super().__init__(config, folder, environments)
        self.form = PromptForm(tokenizer, config.prompt_form)
        self.roles = make_roles(config, model)
        self.learner = Learner(self.roles, config)
        self.replay = Replay(config.replay_capacity)
        self.sampling = Sampling(config.temperature, config.top_k, config.top_p)
        self.generator = torch.Generator(device=model.device).manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        self.context = model.context
        self._ids: dict[str, Tensor] = {}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.environments.close()
        self.folder.close()

    def encode(self, text: str) -> Tensor:
        """A state's tokens, int64; the oldest are cut where the model's context leaves no room to answer."""
        if text not in self._ids:
            if len(self._ids) > 4096:
                self._ids.clear()
            ids = encoded(self.form, text, self.context - self.config.max_new_tokens)
            self._ids[text] = torch.tensor(ids, dtype=torch.int64)
        return self._ids[text]

    def decode(self, state: str, tokens: Tensor) -> str:
        """The action that tokens drawn in a state are, without the stop token; see `PromptForm.decode`."""
        return self.form.decode(state, tokens)

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for role in MOVING:
            for name, parameter in self.roles.parameters(role).items():
                tensors[f"{role}/{name}"] = parameter
        for role in TRAINED:
            names = self.learner.optimized[role]
            tensors |= flatten_optimizer(f"optimizer.{role}", self.learner.optimizers[role], names)
        for name, packed in self.replay.state()[0].items():
            tensors[f"replay/{name}"] = packed
        tensors["random/generator"] = self.generator.get_state()
        return tensors

    def state(self, whole: bool) -> dict[str, Any]:
        return super().state(whole) | {
            "form": self.roles.form,
            "rng": self.rng.bit_generator.state,
            "replay": self.replay.state()[1],
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, bit for bit where the environments keep their state."""
        tensors, state = checkpoint.tensors, checkpoint.state
        load_roles(self.roles, tensors)
        for role in TRAINED:
            names = self.learner.optimized[role]
            restore_optimizer(f"optimizer.{role}", self.learner.optimizers[role], names, tensors)
        packed = {name[len("replay/") :]: t for name, t in tensors.items() if name.startswith("replay/")}
        self.replay.restore(packed, state["replay"])
        self.generator.set_state(tensors["random/generator"])
        self.rng.bit_generator.state = state["rng"]
        super().restore(checkpoint)


def open_run(config: Config, folder: RunFolder) -> Run:
    """Load the model, start the environments.

    Raises:
        ModelError, DatasetError, ValueError: one line each; nothing is left running.
    """
    set_threads(config.threads)
    environments = make_environments(config)
    try:
        own_copy = folder.reference.is_dir()
        name = str(folder.reference) if own_copy else config.model
        model, tokenizer = open_model(config, name)
        run = Run(config, folder, model, tokenizer, environments)
        if run.roles.form == "full" and not own_copy:
            partial = folder.path / ".reference.partial"
            model.hf.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(folder.reference)
        return run
    except BaseException:
        environments.close()
        raise


def make_environments(config: Config) -> VectorRunner:
    """`config.envs` environments of the configured kind; the data-science ones share one scorer.

    Raises:
        DatasetError: absent or unreadable data.
        ValueError: no such environment.
    """
    if config.env is not None:
        return VectorRunner([make_env(config.env, **settings_for(config)) for _ in range(config.envs)])
    first = DataScience(
        config.dataset,
        config.target,
        config.protocol,
        config.sandbox,
        config.timeout_s,
        config.max_episode_steps,
        reflection=config.reflection,
    )
    others = [
        DataScience(
            scorer=first.scorer, max_episode_steps=config.max_episode_steps, reflection=config.reflection
        )
        for _ in range(config.envs - 1)
    ]
    return VectorRunner([first, *others])


def settings_for(config: Config) -> dict[str, Any]:
    """What `--env` gets of the configuration: the settings that its constructor names.

    Raises:
        ValueError: `--no-reflection` for an environment that has no such parameter.
    """
    assert config.env is not None
    names = ("reflection", "max_episode_steps", "timeout_s", "sandbox")
    settings = {name: getattr(config, name) for name in names if takes(config.env, name)}
    if not config.reflection and "reflection" not in settings:
        raise ValueError(
            f"--no-reflection: expected an environment with a `reflection` parameter, got {config.env}"
        )
    return settings


def open_model(config: Config, name: str) -> tuple[LanguageModel, Any]:
    """Model and tokenizer, in the dtype that suits the roles.

    Raises:
        ModelError: absent or unreadable.
    """
    device, dtype = device_of(config), torch_dtype(config)
    model, tokenizer = load_language_model(name, dtype, device)
    if config.dtype == "auto" and dtype != torch.float32 and roles_form(config, model) == "full":
        # A bfloat16 weight has eight bits: most of an update's steps would round away.
        model, tokenizer = load_language_model(name, torch.float32, device)
    return model, tokenizer


def roles_form(config: Config, model: LanguageModel) -> str:
    """`full` for small models, `lora` above `LORA_ABOVE_PARAMETERS`, or as configured."""
    if config.roles != "auto":
        return config.roles
    n_parameters = sum(p.numel() for p in model.hf.parameters())
    return "lora" if n_parameters > LORA_ABOVE_PARAMETERS else "full"


def make_roles(config: Config, model: LanguageModel) -> FullRoles | LoraRoles:
    """The four roles, all starting as `model`."""
    torch.manual_seed(config.seed)
    if roles_form(config, model) == "lora":
        return LoraRoles(model, config.lora_rank)
    return FullRoles(model)


@torch.no_grad()
def load_roles(roles: FullRoles | LoraRoles, tensors: dict[str, Tensor]) -> None:
    """Put a checkpoint's weights into the roles that move.

    Raises:
        CheckpointError: it is of another model.
    """
    for role in MOVING:
        for name, parameter in roles.parameters(role).items():
            kept = tensors.get(f"{role}/{name}")
            if kept is None or kept.shape != parameter.shape:
                got = "none" if kept is None else f"one of shape {tuple(kept.shape)}"
                raise CheckpointError(
                    f"the checkpoint is of another model or form of roles: expected {role}/{name} of shape "
                    f"{tuple(parameter.shape)}, got {got}"
                )
            parameter.copy_(kept)


def encoded(form: PromptForm, state: str, room: int) -> list[int]:
    """A state's tokens, at least one: for an empty state without a start token, the stop token."""
    return form.encode(state, room) or [form.stop_token]


def device_of(config: Config) -> str:
    """`auto`: a GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError):
        found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise ValueError(
            f"--device: expected one of {', '.join(['auto', 'cpu', *found])}, got '{config.device}'"
        ) from None
    return config.device


def torch_dtype(config: Config) -> torch.dtype:
    """`auto`: bfloat16 on a GPU (but see `open_model`), float32 on a CPU."""
    if config.dtype == "auto":
        return torch.float32 if device_of(config) == "cpu" else torch.bfloat16
    return getattr(torch, config.dtype)


def set_threads(threads: int) -> None:
    """0: as many as the cores this process may use."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def rss_mib() -> float:
    """Largest resident set of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Stopwatch:
    """Seconds since the run began, kept over resumes by its start value."""

    def __init__(self, already_s: float = 0.0) -> None:
        self._start = time.monotonic() - already_s

    def __call__(self) -> float:
        return time.monotonic() - self._start
