"""Low-rank adapters for several roles on one frozen base (LoRA: Hu 2021, arXiv:2106.09685).

Every linear layer of the base but the LM head gets, for each role, W + s·B·A with s = α/r. The base is never
changed; with no role in force a layer is the base itself, which is how the reference is had for nothing.
Saved in PEFT's format, so that PEFT, vLLM and others load an adapter.
"""

import json
from pathlib import Path
from typing import TypeGuard

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


class ActiveRole:
    """Which adapter the next forward uses; shared by all layers of one base.

    Attributes:
        name: of the role; None for the base.
        looks: True while the layers point their adapters at what they read (`RoleLinear.point_at`).
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.looks = False


class RoleLinear(nn.Module):
    """A frozen linear layer with one low-rank adapter a role.

    y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ for the role in force. A [r, in] starts random, B [out, r] at zero: every
    role starts as the base. Adapters are float32, whatever the base is.
    """

    def __init__(
        self, base: nn.Linear, roles: list[str], rank: int, scale: float, active: ActiveRole
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self._active = active
        device = base.weight.device
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
        for role in roles:
            self.lora_a[role] = nn.Parameter(torch.empty(rank, base.in_features, device=device))
            self.lora_b[role] = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        for a in self.lora_a.values():
            nn.init.kaiming_uniform_(a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self._active.looks:
            self.point_at(x.flatten(0, -2))
        role = self._active.name
        if role is None:
            return y
        a, b = self.lora_a[role].to(x.dtype), self.lora_b[role].to(x.dtype)
        return y + self.scale * F.linear(F.linear(x, a), b)

    @torch.no_grad()
    def point_at(self, x_ND: Tensor) -> None:
        """Turn every role's A to the directions in which the inputs x [N, in] are largest.

        The rows of A become the r leading right singular vectors of x, divided by s, for all roles alike. A
        gradient of W is a sum of δ·xᵀ: it lies where inputs are, and a step of B along it is then the step
        of W itself, as far as r directions hold it. Source: EVA, Paischer 2024, arXiv:2410.07170.
        """
        some_a = next(iter(self.lora_a.values()))
        every = -(-len(x_ND) // MOST_INPUTS)
        x = x_ND[::every].double()
        basis_rD = leading_directions(x, some_a)
        for a in self.lora_a.values():
            a.copy_(basis_rD / self.scale)


MOST_INPUTS = 1024


def leading_directions(x_ND: Tensor, fill_rD: Tensor) -> Tensor:
    """The r leading right singular vectors of x [N, D] as rows [r, D] float64, orthonormal.

    Where x has fewer than r directions, those of `fill` [r, D] make up the rest.
    """
    small = x_ND.T @ x_ND if len(x_ND) > x_ND.shape[1] else x_ND @ x_ND.T
    energy, vectors = torch.linalg.eigh(small)
    kept = energy > 1e-10 * energy[-1].clamp_min(1e-300)
    leading = vectors[:, kept].flip(1)[:, : len(fill_rD)]
    if len(x_ND) <= x_ND.shape[1]:
        leading = x_ND.T @ leading
    basis: Tensor = torch.linalg.qr(torch.cat((leading, fill_rD.double().T), dim=1))[0]
    return basis[:, : len(fill_rD)].T


def add_adapters(model: nn.Module, head: nn.Module, roles: list[str], rank: int) -> ActiveRole:
    """Freeze `model` and put a `RoleLinear` in the place of each of its linear layers but `head`.

    Raises:
        ValueError: it has none (GPT-2 keeps its matrices in layers of another kind).
    """
    active = ActiveRole()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_linear(child) and child is not head:
                setattr(parent, name, RoleLinear(child, roles, rank, scale=2.0, active=active))
    if not adapter_layers(model):
        raise ValueError(
            f"--roles: expected full for {type(model).__name__}, which has no linear layers for adapters, "
            "got lora"
        )
    return active


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True for a linear layer that does nothing else with its weight: some families' do, in groups."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def adapter_layers(model: nn.Module) -> dict[str, RoleLinear]:
    """Every adapted layer by its path in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoleLinear)}


def save_adapter(
    model: nn.Module, role: str, rank: int, base_name: str, folder: Path, whole: dict[str, Tensor]
) -> None:
    """Write one role's adapter in PEFT's format: adapter_config.json and adapter_model.safetensors.

    Args:
        whole: path in the model -> tensor, of what the role has in a form of its own (`modules_to_save`).
    """
    layers = adapter_layers(model)
    tensors = {f"base_model.model.{name}": x.detach().cpu().contiguous() for name, x in whole.items()}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_a[role].detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_b[role].detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def merge_adapter(model: nn.Module, role: str) -> None:
    """Add one role's adapter to the base in place: W ← W + s·B·A. For export; the other roles are lost."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RoleLinear):
                out_features, in_features = child.weight.shape
                merged = nn.Linear(in_features, out_features, bias=child.bias is not None, device="meta")
                delta = child.scale * child.lora_b[role] @ child.lora_a[role]
                merged.weight = nn.Parameter((child.weight.float() + delta).to(child.weight.dtype))
                merged.bias = child.bias
                setattr(parent, name, merged)
