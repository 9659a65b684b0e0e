"""Whether a model of the Hugging Face hub can be had, asked before anything slow is tried. No torch here."""

import logging
import os
from pathlib import Path

from etpo import EtpoError

TIMEOUT_S = 8.0
CONFIG = "config.json"


class HubError(EtpoError):
    """The hub does not answer, or has no such model."""


def check_hub(name: str) -> None:
    """Say that a model is going to be fetched, or that it cannot be; one in the cache needs no network.

    Args:
        name: owner/name; anything else is left to whoever loads it.

    Raises:
        HubError: one line, within seconds.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, CONFIG), str):
        return
    folder = "or give the folder of a model that you have: --model FOLDER"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise HubError(
            f"--model {name}: expected a model in the hub's cache, since HF_HUB_OFFLINE is set, got none; "
            f"unset it, {folder}"
        )
    logging.getLogger(__name__).warning(f"fetching {name} from the Hugging Face hub …")
    try:
        HfApi().model_info(name, timeout=TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise HubError(f"--model {name}: expected a model of the Hugging Face hub, got none of that name "
                       f"(or one that needs a login); see its spelling, {folder}") from error  # fmt: skip
    except Exception as error:  # whatever the client of the day raises where there is no network
        raise HubError(
            f"--model {name}: expected the Hugging Face hub to answer, got {type(error).__name__}; "
            f"look at your network, {folder}"
        ) from error
