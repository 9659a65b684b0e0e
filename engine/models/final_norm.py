"""The norm before the LM head: where it stands in a model, and how its gain is scaled."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FinalNorm:
    """A model's last norm.

    Attributes:
        name: its path in the model, such as `model.norm`.
        module: with a `weight` [D], and a `bias` [D] or none.
        offset: what the gain is more than the weight: 1 in Gemma's norms, which keep the gain less 1, else 0.
    """

    name: str
    module: nn.Module
    offset: float

    @torch.no_grad()
    def scaled(self, factor_D: Tensor) -> dict[str, Tensor]:
        """Tensors of a norm that gives `factor` times what this one gives, by their names in the model."""
        tensors = {}
        for name, x in self.module.named_parameters():
            offset = self.offset if name == "weight" else 0.0
            tensors[f"{self.name}.{name}"] = ((x.float() + offset) * factor_D - offset).to(x.dtype)
        return tensors


def final_norm(hf: nn.Module, hidden_size: int) -> FinalNorm | None:
    """The last norm of the hidden states that is no part of a layer; None where a model has none."""
    found = None
    for name, module in hf.named_modules():
        weight = getattr(module, "weight", None)
        is_in_layer = any(map(str.isdigit, name.split(".")))
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and not is_in_layer:
            found = (name, module, weight) if weight.shape == (hidden_size,) else found
    return None if found is None else FinalNorm(found[0], found[1], _offset(found[1], found[2]))


@torch.no_grad()
def _offset(norm: nn.Module, weight: Tensor) -> float:
    signs = torch.ones_like(weight)
    signs[1::2] = -1.0  # of mean 0 and norm 1: norms of both kinds leave it as it is
    both = norm(torch.stack((signs, -signs))).float()
    gain = (both[0] - both[1]) / 2 * signs.float()
    return float(round((gain - weight.float()).mean().item()))
