"""Does showing the error help? Success after one reflection beside success of a fresh sample.

    python -m etpo.bench.reflection --json docs/results/reflection.json --markdown docs/results/reflection.md

Each episode begins with a fresh program. Where it fails, two second attempts are drawn: one behind the
reflection prompt, one behind the task prompt again. Their difference is what the reflection prompt is worth.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from etpo.engine.drawing import draw_texts
from etpo.engine.machine import machine
from etpo.engine.models.language_model import load_language_model
from etpo.engine.models.prompt_form import PromptForm
from etpo.envs.datasets import load_dataset
from etpo.envs.prompts import reflection_prompt, task_prompt
from etpo.envs.sandbox import Sandbox
from etpo.envs.scoring import Score, Scorer

Z_95 = 1.96


def measure(
    name: str, dataset: str, episodes: int, seed: int = 0, max_new_tokens: int = 256
) -> dict[str, Any]:
    """Play the episodes with a frozen model at temperature 1.

    Args:
        name: the model.
        dataset: a data set's name.
        episodes: how many.
        seed: decides every draw.

    Returns:
        the counts: `episodes`; `fresh` first programs that ran; `failed`; of the failed episodes' second
        attempts `reflected` that ran behind the reflection prompt and `fresh_again` behind the task prompt,
        and of their pairs `only_reflected` and `only_fresh`, in which one of the two ran; `repeated` programs
        that reflection wrote a second time as they were; mean AUC of those that ran, `auc_fresh` and
        `auc_reflected`.
    """
    model, tokenizer = load_language_model(name, torch.float32, "cpu")
    form = PromptForm(tokenizer, ends=model.end_tokens)
    data = load_dataset(dataset)
    task = task_prompt(data.name, len(data.x), data.x.shape[1], len(data.class_names))
    generator = torch.Generator().manual_seed(seed)

    def draw(states: list[str]) -> list[str]:
        return draw_texts(model, form, states, generator, max_new_tokens=max_new_tokens)

    with Sandbox() as sandbox:
        scorer = Scorer(data, sandbox)
        first = draw([task] * episodes)
        scores = scorer.score_many(first)
        failed = [(text, score.error) for text, score in zip(first, scores, strict=True) if score.error]
        second = draw([reflection_prompt(task, text, error) for text, error in failed])
        reflected = scorer.score_many(second)
        again = scorer.score_many(draw([task] * len(failed)))
    pairs = [(r.error is None, a.error is None) for r, a in zip(reflected, again, strict=True)]
    return {
        "model": name,
        "dataset": data.name,
        "synthetic": data.synthetic,
        "seed": seed,
        "episodes": episodes,
        "fresh": episodes - len(failed),
        "failed": len(failed),
        "reflected": sum(r for r, _ in pairs),
        "fresh_again": sum(a for _, a in pairs),
        "only_reflected": sum(r and not a for r, a in pairs),
        "only_fresh": sum(a and not r for r, a in pairs),
        "repeated": sum(a == b for (a, _), b in zip(failed, second, strict=True)),
        "auc_fresh": _mean_auc(scores),
        "auc_reflected": _mean_auc(reflected),
        **machine("torch"),
    }


def _mean_auc(scores: list[Score]) -> float | None:
    aucs = [score.auc_mean for score in scores if score.auc_mean is not None]
    return sum(aucs) / len(aucs) if aucs else None


def interval(k: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share k of n."""
    if n == 0:
        return 0.0, 1.0
    share, z = k / n, Z_95
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def to_markdown(found: dict[str, Any], command: str) -> str:
    """The table: shares with their intervals."""

    def row(what: str, k: int, n: int) -> str:
        low, high = interval(k, n)
        share = f"{k / n:.1%}" if n else "–"
        return f"| {what} | {k} of {n} | {share} | {low:.1%} – {high:.1%} |"

    note = " (synthetic)" if found["synthetic"] else ""
    n, failed = found["episodes"], found["failed"]
    begun = found["fresh"]
    lines = [
        "# Reflection",
        "",
        f"{found['model']}, not trained, on {found['dataset']}{note}: {n} episodes at temperature 1, seed "
        f"{found['seed']}. Each begins",
        "with a fresh program; where that fails, a second one is drawn behind the reflection prompt (the",
        "program and its error), and for comparison another behind the task prompt.",
        "",
        "| programs that run | | share | 95 % interval |",
        "|---|---|---|---|",
        row("fresh sample", begun, n),
        row("after one reflection, where the first failed", found["reflected"], failed),
        row("another fresh sample, where the first failed", found["fresh_again"], failed),
        row("episode, within two attempts, with reflection", begun + found["reflected"], n),
        row("the same without reflection", begun + found["fresh_again"], n),
        "",
        f"Of the {failed} pairs of second attempts, in {found['only_reflected']} only the reflected one "
        f"ran, in {found['only_fresh']}",
        f"only the fresh one. {found['repeated']} reflected programs repeat the failed one. Mean AUC",
        f"of those that ran: fresh {_number(found['auc_fresh'])}, reflected "
        f"{_number(found['auc_reflected'])}.",
        "",
        f"Made by `{command}`; PyTorch {found['torch']}, Python {found['python']}.",
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="etpo-nano", help="default etpo-nano")
    parser.add_argument("--dataset", default="tic-tac-toe", help="default tic-tac-toe")
    parser.add_argument("--episodes", type=int, default=500, help="default 500")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--json", type=Path, help="write the counts there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    options = parser.parse_args()
    found = measure(options.model, options.dataset, options.episodes, options.seed)
    command = (
        f"python -m etpo.bench.reflection --model {options.model} --dataset {options.dataset} "
        f"--episodes {options.episodes} --seed {options.seed}"
    )
    text = to_markdown(found, command)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
