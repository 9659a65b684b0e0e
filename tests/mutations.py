"""Breaks the trainer in a copy of the tree, a line at a time, and says which test notices.

    .venv/bin/python -P tests/mutations.py          all of them
    .venv/bin/python -P tests/mutations.py WORD     those whose description holds WORD

It ends with 1 where one goes unnoticed. Run it on a tree whose tests pass; not part of a test run. The
kernels have tests/kernels/mutate.py.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "docs", "__pycache__", ".*_cache", "shared")

RESUME, TRAIN, ERRORS = "tests/engine/test_resume.py", "tests/cli/test_train.py", "tests/cli/test_errors.py"


class Mutation(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; `tests` is what pytest is given."""

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation("an interrupt is not saved", "engine/loop.py",
             "        run.save(whole=run.step % per_iteration == 0)\n", "", f"{RESUME} -k interrupt"),
    Mutation("without a usable checkpoint the records are wiped", "engine/progress.py",
             '        found = "; ".join(damaged)',
             '        folder.rewind({"metrics": 0, "programs": 0}, 0)\n        found = "; ".join(damaged)',
             f"{RESUME} -k usable"),
    Mutation("the sampler's random state is not restored", "engine/run.py",
             '        self.generator.set_state(checkpoint.tensors["random/generator"])\n', "",
             f"{RESUME} -k uninterrupted"),
    Mutation("the minibatches' random state is not restored", "engine/learners/etpo.py",
             '        self.rng.bit_generator.state = state["rng"]\n', "", f"{RESUME} -k uninterrupted"),
    Mutation("replayed programs are not restored", "engine/learners/etpo.py",
             '        self.replay.restore(packed, state["replay"])\n', "", f"{RESUME} -k uninterrupted"),
    Mutation("an optimiser's moments are not restored", "engine/optim.py",
             '            own["state"].setdefault(index_of[name], {})[key] = tensor\n', "            pass\n",
             f"{RESUME} -k uninterrupted"),
    Mutation("weights are not restored", "engine/checkpoint.py",
             "            parameter.copy_(kept)\n", "", f"{RESUME} -k uninterrupted"),
    Mutation("records behind the checkpoint stay", "engine/progress.py",
             '        self.folder.rewind(state["sizes"], self.step)\n', "", f"{RESUME} -k uninterrupted"),
    Mutation("a run goes on from inside an iteration", "engine/progress.py",
             "latest_checkpoint(folder.checkpoints, whole=True)", "latest_checkpoint(folder.checkpoints)",
             f"{RESUME} -k uninterrupted"),
    Mutation("a damaged checkpoint passes", "engine/checkpoint.py",
             'if hashlib.sha256(raw).hexdigest() != meta["sha256"]:', "if False:", f"{RESUME} -k damaged"),
    Mutation("a cut iteration drops the whole checkpoint before it", "engine/checkpoint.py",
             'if checkpoint.state.get("whole", True):', "if True:", f"{RESUME} -k again"),
    Mutation("a million steps sort before ten", "engine/checkpoint.py",
             "key=lambda path: (len(path.name), path.name)", "key=lambda path: path.name",
             f"{RESUME} -k just_written"),
    Mutation("a checkpoint of another model is taken", "engine/checkpoint.py",
             "            if kept is None or kept.shape != parameter.shape:",
             "            if False:",
             f"{RESUME} -k another_model"),
    Mutation("an environment without a state goes on in its old episode", "engine/progress.py",
             "                self.episode_of[row] += 1\n", "", f"{RESUME} -k without_a_state"),
    Mutation("a checkpoint is written in place", "engine/checkpoint.py",
             'partial = folder / f".partial-{os.getpid()}"', "partial = final", f"{RESUME} -k killed"),
    Mutation("a second Ctrl-C waits too", "engine/interrupt.py",
             "            raise KeyboardInterrupt\n", "            return\n",
             "tests/engine/test_interrupt.py"),
    Mutation("handlers of signals stay behind", "engine/interrupt.py",
             "            signal.signal(number, handler)\n", "            pass\n",
             "tests/engine/test_interrupt.py"),
    Mutation("the folder is not locked", "engine/run_folder.py",
             "                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "                pass\n",
             f"{TRAIN} tests/engine/test_opening.py -k writ"),
    Mutation("config.toml is not rewritten", "engine/opening.py",
             "            _rewrite_config(config, folder)\n", "            pass\n", f"{TRAIN} -k rewrites"),
    Mutation("an unused folder stays", "engine/opening.py",
             "                folder.discard_if_unused()\n", "                pass\n",
             "tests/engine/test_opening.py"),
    Mutation("a folder with files in it is taken", "engine/run_folder.py",
             "if path.is_dir() and any(path.iterdir()):", "if False:", f"{ERRORS} -k files_in_it"),
    Mutation("a full disk is any error", "engine/opening.py",
             "            if is_disk_full(error):", "            if False:", f"{TRAIN} -k full_disk"),
    Mutation("any option may stand beside --resume", "cli/train.py",
             "    if others:\n", "    if False:\n", f"{ERRORS} -k resume_with"),
    Mutation("bounds are not checked", "engine/options.py",
             "        if not is_inside:", "        if False:", "tests/cli/test_options.py"),
    Mutation("an unknown key of a file passes", "engine/config.py",
             "        if key not in OPTIONS:", "        if False:", f"{ERRORS} -k unknown_key"),
    Mutation("flags go before nothing", "engine/config.py",
             "**from_file, **flags", "**flags, **from_file", f"{TRAIN} -k flag_before"),
    Mutation("more new tokens than the context holds pass", "engine/run.py",
             "if config.max_new_tokens > model.context - LEAST_ROOM:", "if False:", f"{RESUME} -k context"),
    Mutation("an unknown data set is a failure", "envs/datasets/catalog.py",
             "    exit_code = 2\n", "", f"{ERRORS} -k exit_codes"),
    Mutation("an interrupted run ends with 0", "cli/train.py",
             "        ctx.exit(INTERRUPTED)\n", "", f"{TRAIN} -k ctrl_c"),
    Mutation("a traceback is shown", "cli/errors.py",
             "            if self.debug:\n", "            if True:\n", f"{ERRORS} -k script_says"),
    Mutation("a page of options that is out of date", "engine/config.py",
             '"Rank of the adapters."', '"Rank of adapters."', "tests/cli/test_options.py -k page"),
    Mutation("an environment is not registered", "envs/__init__.py",
             'id=f"etpo/{_name}-v0"', 'id=f"etpo/{_name}-v1"', "tests/envs/test_environments.py"),
    Mutation("the step is not bounded", "engine/step.py",
             "            if kl <= bound:", "            if True:", "tests/golden -k grid"),
    Mutation("the target network stands still", "engine/learners/etpo.py",
             "        polyak(roles, config.tau)\n", "", "tests/golden -k grid"),
    Mutation("v takes the gradient of the prefix", "engine/learners/etpo.py",
             "at_critic.detach() - targets.at_ref", "at_critic - targets.at_ref", "tests/golden -k grid"),
]  # fmt: skip


def broken_copy(mutation: Mutation, folder: Path) -> None:
    """A copy of the tree in `folder`, with the mutation made."""
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT, symlinks=True, dirs_exist_ok=True)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("results"))
    file = folder / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file}: expected once {mutation.old!r}, got {text.count(mutation.old)}")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def first_failure(mutation: Mutation) -> str:
    """The test that notices the mutation, or an empty string."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tree"
        broken_copy(mutation, folder)
        environment = os.environ | {
            "PYTHONPATH": str(folder / "typings"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        command = [sys.executable, "-P", "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
        done = subprocess.run(
            [*command, *mutation.tests.split()], cwd=folder, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"{mutation.what}: pytest ended with {done.returncode}:\n{done.stdout[-500:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split("::")[-1].split(" - ")[0] if lines else ""


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    unnoticed = 0
    for mutation in MUTATIONS:
        if word in mutation.what:
            found = first_failure(mutation)
            unnoticed += not found
            print(f"{mutation.what}: {found or 'NOT NOTICED'}", flush=True)
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
