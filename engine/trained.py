"""A trained run, or a plain model, to draw programs from and to export."""

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from etpo.engine.checkpoint import CheckpointError, latest_checkpoint, load_roles
from etpo.engine.config import Config, resolve
from etpo.engine.drawing import draw_texts
from etpo.engine.environments import settings_for
from etpo.engine.learners import learner_class
from etpo.engine.models.digest import digest_of_base
from etpo.engine.models.language_model import LanguageModel
from etpo.engine.models.open import make_roles, open_model
from etpo.engine.models.places import model_path
from etpo.engine.models.prompt_form import PromptForm
from etpo.engine.models.roles import FullRoles, LoraRoles, Role
from etpo.engine.permissions import honour_umask
from etpo.engine.progress import check_digests
from etpo.engine.run_folder import RunFolder
from etpo.envs import answers
from etpo.envs.datasets import load_dataset
from etpo.envs.prompts import task_prompt
from etpo.envs.vector import make_env


@dataclass
class Trained:
    """The models of a run as its newest checkpoint left them.

    Attributes:
        config: the run's configuration.
        folder: the run's folder.
        step: programs executed up to the checkpoint.
        best_action: the best program so far as it was drawn, or None.
        roles: policy, critic, target and reference.
        tokenizer: the model's own.
        digests: of the `table` and the `base` that the run began with, where known.
        notes: one line for each newer checkpoint that is damaged.
    """

    config: Config
    folder: RunFolder
    step: int
    best_action: str | None
    roles: FullRoles | LoraRoles
    tokenizer: Any
    digests: dict[str, str | None]
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        """The policy as a Hugging Face model; for adapters, the base with the policy's adapter in force."""
        model: nn.Module = self.roles.hand_over("policy").hf
        return model

    def sample(
        self,
        prompt: str | None = None,
        n: int = 1,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        role: Role = "policy",
    ) -> list[str]:
        """Draw n actions behind one prompt.

        Args:
            prompt: a text state, such as the task prompt of a data set; None: the first state of the run.
            n: how many, at least 1.
            seed: decides every draw.
            temperature: > 0; 1 draws from the role itself.
            role: whose: `policy` as trained, or `reference` as it was before.

        Raises:
            ValueError: n, the temperature or the role is out of range.
        """
        if role not in ("policy", "reference"):
            raise ValueError(f"role: expected policy or reference, got {role!r}")
        if prompt is None:
            prompt, _ = first_state(self.config)
        with self.roles.acting(role) as model:
            return draw(
                model, self.tokenizer, prompt, n, seed=seed, temperature=temperature,
                max_new_tokens=self.config.max_new_tokens, form=self.config.prompt_form,
            )  # fmt: skip

    def export(self, out: Path, role: Role = "policy", *, merge: bool = False) -> None:
        """Write a role with its tokenizer to a folder that `from_pretrained` loads.

        Full weights become a model folder; an adapter becomes a PEFT adapter, or with `merge` a model folder.
        With `merge` this object is used up.

        Raises:
            ValueError: no such role, or the reference's adapter, which there is none of.
        """
        if role not in get_args(Role):
            raise ValueError(f"role: expected one of {', '.join(get_args(Role))}, got {role!r}")
        is_adapter = isinstance(self.roles, LoraRoles)
        if is_adapter and role == "reference":
            raise ValueError(f"role: the reference is {self.config.model} itself and has no adapter; "
                             "expected policy, critic or target")  # fmt: skip
        if is_adapter and not merge:
            self.roles.save(role, out, base_name(self.config.model))
        else:
            whole: Any = self.roles.merged(role)
            whole.save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        honour_umask(Path(out))


def load(path: str | Path, device: str = "auto") -> Trained:
    """Load a run: its newest whole checkpoint on the base that it was trained from.

    Args:
        path: the run's folder.
        device: `auto`, `cpu`, `cuda`, …; where the run was trained does not matter.

    Raises:
        RunFolderError: no run there.
        CheckpointError: no usable checkpoint in it, or the base is not the one that the run began with.
        ModelError: the base is absent or unreadable.
    """
    folder = RunFolder.existing(Path(path))
    config = replace(resolve({}, folder.config_file), device=device)
    if config.agent is not None:
        raise ValueError(f"{path}: expected a run of a model, got one of --agent {config.agent}, which has "
                         "no weights here; see programs.jsonl for what it wrote")  # fmt: skip
    checkpoint, notes = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        found = "; ".join(notes) or "none was saved yet"
        raise CheckpointError(f"{path}: expected a run with a checkpoint, got none ({found})")
    base = str(folder.reference) if folder.reference.is_dir() else config.model
    as_trained = replace(config, roles=checkpoint.state["form"])
    digests = checkpoint.state.get("digests", {})
    check_digests(digests, {"base": digest_of_base(base)}, folder.path)
    model, tokenizer = open_model(as_trained, base)
    roles = make_roles(as_trained, model, learner_class(config.algo).moves)
    load_roles(roles, checkpoint.tensors)
    best = checkpoint.state["best"]
    action = best["action"] if best else None
    return Trained(config, folder, checkpoint.step, action, roles, tokenizer, digests, notes)


def first_state(config: Config) -> tuple[str, str]:
    """The first prompt of a run's environment, and a note for what is shown of it: ` (synthetic)` or nothing.

    Raises:
        DatasetError, ValueError: absent or unreadable data, no such environment.
    """
    if config.env is not None:
        env = make_env(config.env, **settings_for(config))
        prompt = answers.reset(env, seed=config.seed)
        env.close()
        return prompt, ""
    data = load_dataset(config.dataset, config.target, config.protocol)
    n_rows, n_features = data.x.shape
    prompt = task_prompt(data.name, n_rows, n_features, len(data.class_names))
    return prompt, " (synthetic)" if data.synthetic else ""


def draw(
    model: LanguageModel,
    tokenizer: Any,
    prompt: str,
    n: int,
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    form: str = "auto",
) -> list[str]:
    """Draw n actions in one state; its oldest tokens are cut where the context leaves no room.

    Args:
        form: how the state is put to the model (see `PromptForm`).

    Raises:
        ValueError: n below 1, a temperature that is not positive, or a form that the tokenizer lacks.
    """
    if n < 1 or not temperature > 0:
        raise ValueError(f"expected n ≥ 1 and a temperature > 0, got {n} and {temperature}")
    return draw_texts(
        model, PromptForm(tokenizer, form, model.end_tokens), [prompt] * n,
        torch.Generator(device=model.device).manual_seed(seed), max_new_tokens=max_new_tokens,
        temperature=temperature,
    )  # fmt: skip


def base_name(model: str) -> str:
    """How an adapter names its base, so that it is found from any folder: a hub name, or an absolute path."""
    path = model_path(model)
    return str(path.resolve()) if path.is_dir() else model


def quiet_transformers() -> None:
    """No progress bars and no advice from transformers and the hub: what matters is said in our own lines."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
