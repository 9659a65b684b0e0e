"""Writes trl_losses.json: the losses of TRL's own trainers on one small batch, and their gradients.

Run where `trl` is installed, as no test needs it: python tests/engine/record_trl.py
The trainers are made without their constructors, which want a model and data; `_compute_loss` is theirs.
"""

import importlib.metadata
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

OUT = Path(__file__).parent / "trl_losses.json"
LENGTHS = [3, 7, 5, 1]
LOW, HIGH, BETA, MAX_LENGTH = 0.2, 0.28, 0.04, 9
# Our form -> TRL's loss_type, and where it takes the ratio.
FORMS = {
    "grpo": ("grpo", "token"), "dapo": ("dapo", "token"), "dr": ("dr_grpo", "token"),
    "gspo": ("grpo", "sequence"),
}  # fmt: skip


class _Accelerator:
    num_processes = 1
    sync_gradients = True

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x


def trainer(kind: type, logprob_BT: torch.Tensor, **settings: Any) -> Any:
    """A trainer whose model gives these log-probabilities."""
    made = kind.__new__(kind)
    defaults = {
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "beta": BETA, "epsilon_low": LOW,
        "epsilon_high": HIGH, "use_vllm": False, "aux_loss_enabled": False, "_entropy_bonus_enabled": False,
        "max_completion_length": MAX_LENGTH, "current_gradient_accumulation_steps": 1,
        "accelerator": _Accelerator(),
        "use_adaptive_entropy": False, "tools": None,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "model": SimpleNamespace(training=True),
    }  # fmt: skip
    for name, value in (defaults | settings).items():
        object.__setattr__(made, name, value)
    object.__setattr__(
        made,
        "_get_per_token_logps_and_entropies",
        lambda *_, **__: (logprob_BT, torch.zeros_like(logprob_BT), None),
    )
    return made


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    width = max(LENGTHS)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).double()
    mu, ref = (-3 * torch.rand(len(LENGTHS), width, generator=generator).double() for _ in range(2))
    now = mu + 0.3 * torch.randn(len(LENGTHS), width, generator=generator).double()
    advantage = torch.randn(len(LENGTHS), generator=generator).double()
    ids = torch.ones(len(LENGTHS), width, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": advantage, "old_per_token_logps": mu, "ref_per_token_logps": ref,
        "old_logps": (mu * mask).sum(1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip

    def packed(x: torch.Tensor) -> list[float]:
        return x[mask.bool()].tolist()

    def result(kind: type, **settings: Any) -> dict[str, Any]:
        logprob = now.clone().requires_grad_()
        loss = trainer(kind, logprob, **settings)._compute_loss(None, inputs)
        loss.backward()
        assert logprob.grad is not None
        return {"loss": loss.item(), "gradient": packed(logprob.grad)}

    losses = {
        form: result(GRPOTrainer, loss_type=loss_type, importance_sampling_level=level)
        for form, (loss_type, level) in FORMS.items()
    }
    losses["rloo"] = result(RLOOTrainer)
    recorded = {
        "trl": importlib.metadata.version("trl"), "lengths": LENGTHS, "low": LOW, "high": HIGH, "beta": BETA,
        "max_length": MAX_LENGTH, "logprob": packed(now), "logprob_mu": packed(mu),
        "logprob_ref": packed(ref), "advantage": advantage.tolist(), "losses": losses,
    }  # fmt: skip
    OUT.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(*(f"{name}: {one['loss']:+.6f}" for name, one in losses.items()), sep="\n")


if __name__ == "__main__":
    main()
