"""Runs a folder of small scripts that each exit 0 where etpo is right, and prints a line for each.

    python tests/run_cases.py FOLDER [NAME …]

NAME is the beginning of a script's name; without one all `NN-*.py` and `N_*.py` are run. `ETPO_BIN` names the
folder of the python and etpo to try (default: this interpreter's). The exit code is the number of scripts
that failed. A script may import a module by the name that it had before the folders of `engine` and `envs`.
"""

import importlib
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

FORMER_NAMES = {
    "etpo.engine.actions": "etpo.engine.replay",
    "etpo.engine.attention": "etpo.engine.models.attention",
    "etpo.engine.language_model": "etpo.engine.models.language_model",
    "etpo.engine.learner": "etpo.engine.learners.etpo",
    "etpo.engine.lora": "etpo.engine.models.lora",
    "etpo.engine.roles": "etpo.engine.models.roles",
    "etpo.engine.sampler": "etpo.engine.models.sampler",
    "etpo.engine.sequences": "etpo.engine.models.sequences",
    "etpo.envs.datasets_catalog": "etpo.envs.datasets.catalog",
    "etpo.envs.datasets_home": "etpo.envs.datasets.home",
    "etpo.envs.datasets_twins": "etpo.envs.datasets.twins",
    "etpo.envs.prompts_extract": "etpo.engine.models.prompt_extract",
    "etpo.envs.prompts_forms": "etpo.engine.models.prompt_form",
    "etpo.envs.standalone": "etpo.envs.best_program",
}
INSIDE = "--inside"
LIMIT_S = 580


class _FormerNames:
    """Finds a module under the name that it had."""

    def find_spec(self, name, path=None, target=None):
        if name not in FORMER_NAMES:
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        return importlib.import_module(FORMER_NAMES[spec.name])

    def exec_module(self, module):
        """The module has run already, under its name."""


def main(folder: Path, wanted: list[str]) -> int:
    """Run the scripts one after another; returns how many failed."""
    home = Path(os.environ.get("ETPO_BIN") or Path(sys.executable).parent)
    failed = 0
    scripts = [path for path in sorted(folder.glob("*.py")) if re.match(r"\d+[-_]", path.name)]
    for script in scripts:
        if wanted and not script.name.startswith(tuple(wanted)):
            continue
        began = time.monotonic()
        try:
            done = subprocess.run(
                [home / "python", Path(__file__).resolve(), INSIDE, script],
                capture_output=True, text=True, timeout=LIMIT_S,
                env={**os.environ, "ETPO_BIN": str(home)},
            )  # fmt: skip
            code, said = done.returncode, (done.stdout.strip() or done.stderr.strip()).splitlines()
        except subprocess.TimeoutExpired:
            code, said = -1, [f"no end after {LIMIT_S} s"]
        failed += code != 0
        word = "FAULT" if code else "right"
        print(
            f"{word}  {script.stem:42} {time.monotonic() - began:5.1f} s  {(said or [''])[-1][:300]}",
            flush=True,
        )
    print(f"{failed} of {len(scripts)} failed")
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == [INSIDE]:
        script = sys.argv[2]
        sys.meta_path.insert(0, _FormerNames())
        sys.argv, sys.path[0] = [script], str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
    else:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
