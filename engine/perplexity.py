"""Perplexity of texts: how well a language model still predicts language after it learned to act."""

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from etpo import EtpoError
from etpo.engine.models.language_model import LanguageModel
from etpo.engine.models.sequences import Sequences
from etpo.engine.trained import Trained

OWN_TEXTS = {"English prose": "prose.txt", "Python code": "code.txt", "table description": "table.txt"}
LONGEST_CONTEXT = 2048


class TextError(EtpoError):
    """A text that cannot be read, or that holds nothing to predict."""

    exit_code = 1


@dataclass(frozen=True)
class Perplexity:
    """Of one text under one model.

    Attributes:
        n_tokens: tokens that were predicted.
        perplexity: exp of the mean negative log-probability of a token.
        bits_per_byte: the same information by bytes of UTF-8, which compares models of different tokenizers.
    """

    n_tokens: int
    perplexity: float
    bits_per_byte: float


def own_texts() -> dict[str, str]:
    """The three texts that come with the package, by name."""
    folder = files("etpo.engine") / "texts"
    return {name: (folder / file).read_text(encoding="utf-8") for name, file in OWN_TEXTS.items()}


def read_text(path: Path) -> str:
    """The text of a file. Raises TextError with one line where it is absent, no UTF-8, or blank."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"--text {path}: expected a text file, got: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"--text {path}: expected text in UTF-8, got byte {error.object[error.start]:#04x} at "
            f"{error.start}; convert it first"
        ) from error
    if not text.strip():
        raise TextError(f"--text {path}: expected a text with something to predict, got a blank one")
    return text


@torch.no_grad()
def perplexity(model: LanguageModel, tokenizer: Any, text: str) -> Perplexity:
    """Perplexity of a text, each token predicted from all before it, or from at least half a context.

    A model with a token that begins a text sees it first, and then predicts all tokens; another one does not
    predict the first.

    Raises:
        TextError: fewer than two tokens.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    if len(ids) < 2:
        raise TextError(f"expected a text of at least two tokens, got {len(ids)}")
    tokens = torch.tensor(ids, dtype=torch.int64)
    half = max(1, min(model.context, LONGEST_CONTEXT) // 2)
    total_nat = 0.0
    for start in range(0, len(ids) - 1, half):
        end = min(start + half, len(ids) - 1)
        hidden = Sequences([tokens[max(0, start - half) : start]], [tokens[start:end]]).hidden(model)
        targets = tokens[start + 1 : end + 1].to(hidden.device)
        total_nat += F.cross_entropy(model.logits(hidden), targets, reduction="sum").item()
    n_tokens = len(ids) - 1
    bits = total_nat / math.log(2)
    return Perplexity(n_tokens, math.exp(total_nat / n_tokens), bits / len(text.encode()))


def before_and_after(trained: Trained, texts: dict[str, str]) -> dict[str, dict[str, Perplexity]]:
    """Of each text, by name: the reference's perplexity and that of the policy as trained."""
    found: dict[str, dict[str, Perplexity]] = {name: {} for name in texts}
    for role in ("reference", "policy"):
        with trained.roles.acting("policy" if role == "policy" else "reference") as model:
            for name, text in texts.items():
                found[name][role] = perplexity(model, trained.tokenizer, text)
    return found
