"""One run's parts, put together and taken apart: models, environments, learner, random states.

`Run.state` and `Run.restore` are inverse: what a checkpoint holds is everything that decides the next
iteration.
"""

import os
from typing import Any

import torch
from torch import Tensor

from etpo.engine.checkpoint import Checkpoint, load_roles, role_tensors
from etpo.engine.config import Config
from etpo.engine.credit import CreditKeeper
from etpo.engine.environments import make_environments
from etpo.engine.learners import learner_class
from etpo.engine.models.digest import digest_of_base
from etpo.engine.models.language_model import LanguageModel
from etpo.engine.models.open import make_roles, open_model, roles_form
from etpo.engine.models.prompt_form import LEAST_ROOM, PromptForm, encoded
from etpo.engine.models.sampler import Sampling
from etpo.engine.permissions import honour_umask
from etpo.engine.progress import Progress, check_digests
from etpo.engine.run_folder import RunFolder
from etpo.envs.vector import VectorRunner


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
        algorithm = learner_class(config.algo)
        if config.critic_lr is not None and "critic" not in algorithm.moves:
            raise ValueError(
                f"--critic-lr: expected --algo etpo-q, whose critic is a language model, got {config.algo}; "
                "leave it out, or see --value-lr"
            )
        self.form = PromptForm(tokenizer, config.prompt_form, model.end_tokens)
        self.roles = make_roles(config, model, algorithm.moves)
        self.learner = algorithm(self.roles, config)
        self.sampling = Sampling(config.temperature, config.top_k, config.top_p)
        self.generator = torch.Generator(device=model.device).manual_seed(config.seed)
        self.context = model.context
        self.credit = CreditKeeper(folder, config.seed, self.form.texts)
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
        own = {"random/generator": self.generator.get_state()}
        return role_tensors(self.roles) | self.learner.tensors() | own

    def state(self, whole: bool) -> dict[str, Any]:
        return super().state(whole) | {"form": self.roles.form} | self.learner.state()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: bit for bit where the environments keep their state and the device is
        of the same kind."""
        check_digests(checkpoint.state.get("digests", {}), self.digests, self.folder.path)
        load_roles(self.roles, checkpoint.tensors)
        self.learner.restore(checkpoint.tensors, checkpoint.state)
        drawn_so_far = checkpoint.tensors["random/generator"]
        if len(drawn_so_far) == len(self.generator.get_state()):
            self.generator.set_state(drawn_so_far)
        else:  # of another kind of device, where the same draws cannot be had
            self.generator.manual_seed(self.config.seed + checkpoint.step)
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
        model, tokenizer = open_model(config, str(folder.reference) if own_copy else config.model)
        run = Run(config, folder, model, tokenizer, environments)
        if roles_form(config, model) == "full" and not own_copy:
            partial = folder.path / ".reference.partial"
            model.hf.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            honour_umask(partial)
            partial.rename(folder.reference)
        base = str(folder.reference) if folder.reference.is_dir() else config.model
        run.digests["base"] = digest_of_base(base)
        return run
    except BaseException:
        environments.close()
        raise


def set_threads(threads: int) -> None:
    """0: as many as the cores this process may use."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
