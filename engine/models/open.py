"""Opening a model as a configuration says: device, dtype, and the roles that stand on it."""

from typing import Any

import torch

from etpo.engine.config import Config
from etpo.engine.models.language_model import LanguageModel, load_language_model
from etpo.engine.models.roles import FullRoles, LoraRoles, Role

LORA_ABOVE_PARAMETERS = 100_000_000


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


def make_roles(config: Config, model: LanguageModel, moves: tuple[Role, ...]) -> FullRoles | LoraRoles:
    """The four roles, all starting as `model`; those in `moves` get weights or an adapter of their own."""
    torch.manual_seed(config.seed)
    if moves and roles_form(config, model) == "lora":
        return LoraRoles(model, config.lora_rank, moves)
    return FullRoles(model, moves)


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
    return torch.float32 if config.dtype == "float32" else torch.bfloat16
