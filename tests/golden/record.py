"""Short reference trajectories of the training loop; as a script, records them anew.

    .venv/bin/python -P tests/golden/record.py [NAME …]

Record anew only where arithmetic was changed on purpose, and say so in the commit: these files are what holds
every other change to the numbers that were there before.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from etpo.engine.config import Config
from etpo.engine.loop import train
from etpo.engine.run_folder import RunFolder, read_records

FOLDER = Path(__file__).parent
# What the clock and the machine decide, and what is long and held by its hash.
LEFT_OUT = ("wall_s", "tokens_per_s", "rss_mib", "prompt")
SHORT = {
    "seed": 3, "threads": 1, "device": "cpu", "envs": 4, "rollout_steps": 2, "minibatch": 8,
    "updates_per_batch": 2, "replay_capacity": 12, "checkpoint_every": 1000,
}  # fmt: skip
GRID = {"env": "etpo/GridWorld-v0", "max_new_tokens": 6, "steps": 32}
CASES: dict[str, dict[str, Any]] = {
    "etpo": {"steps": 16, "max_new_tokens": 48},
    "full": {"algo": "etpo-q", "steps": 16, "max_new_tokens": 48},
    "lora": {"algo": "etpo-q", "steps": 16, "max_new_tokens": 48, "roles": "lora", "lora_rank": 4},
    "reflection": {"steps": 16, "max_new_tokens": 48, "algo": "reflection"},
    "grid-etpo": GRID,
    "grid-ppo-kl": {**GRID, "algo": "ppo-kl"},
    "grid-rloo": {**GRID, "algo": "rloo"},
    "grid-grpo": {**GRID, "algo": "grpo", "grpo": "gspo"},
    "grid": {**GRID, "algo": "etpo-q"},
    "grid-residual-expected": {
        **GRID,
        "algo": "etpo-q",
        "q_form": "residual",
        "backup": "expected",
        "lam": 0.9,
    },
    "grid-logits-lion": {
        **GRID,
        "algo": "etpo-q",
        "q_form": "logits",
        "optimizer": "lion",
        "replay_weight": "none",
        "lam": 0.0,
    },
    "repair": {"algo": "etpo-q", "env": "etpo/ProgramRepair-v0", "steps": 8, "max_new_tokens": 48},
}


def trajectory(name: str) -> dict[str, Any]:
    """Run one case, and return its records with what they were made on."""
    config = Config(**(SHORT | CASES[name]))
    with tempfile.TemporaryDirectory() as parent:
        folder = RunFolder.create(Path(parent) / "run", config)
        train(config, folder)
        files = {"metrics": folder.metrics_file, "programs": folder.programs_file}
        records = {key: [_kept(line) for line in read_records(file)] for key, file in files.items()}
    return {"made_on": made_on(), **records}


def made_on() -> dict[str, str]:
    """What decides the last bits of a float: the build of torch, and the processor that it chose code for."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "code": torch.backends.cpu.get_cpu_capability(),
        "processor": names[0] if names else platform.machine(),
    }


def _kept(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in LEFT_OUT}


def write(name: str) -> None:
    """Record one case in its file, a line for each record."""
    found = trajectory(name)
    parts = [f'"made_on": {json.dumps(found["made_on"])}']
    for key in ("metrics", "programs"):
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in found[key])
        parts.append(f'"{key}": [\n{lines}\n]')
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        write(case)
        print(f"recorded {case}")
