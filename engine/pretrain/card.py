"""The model card of the bundled model: what its programs do before any learning, measured in the sandbox."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etpo.engine.drawing import draw_texts
from etpo.engine.models.language_model import load_language_model
from etpo.engine.models.prompt_form import PromptForm
from etpo.envs.datasets import load_dataset
from etpo.envs.prompts import reflection_prompt, task_prompt
from etpo.envs.sandbox import Sandbox
from etpo.envs.scoring import Score, Scorer

MAX_NEW_TOKENS = 256
BATCH = 64
CLASSIFIER = re.compile(r"\b(\w*(?:Classifier|ClassifierCV|NB|SVC|Regression|Analysis|Spreading))\(")


def measure_programs(folder: Path, dataset: str, n: int = 500, seed: int = 0) -> dict[str, Any]:
    """Draw `n` fresh programs for a data set, run them, and ask for one repair of each that failed.

    Args:
        folder: the model's.
        dataset: a data set's name.
        n: fresh programs.
        seed: decides every draw.

    Returns:
        `programs` drawn, `runnable_share`, `distinct_share`, `repaired_share` (of failed programs, how many
        ran at the second attempt); of those that ran: `families` (kinds of outermost classifier), `auc` (its
        0, 5, 25, 50, 75, 95 and 100 % quantiles), `auc_below_065`, `auc_above_099` (shares), `wall_s_mean`
        (of one program's splits together); counts by name: `error_kinds`, `family_counts`.
    """
    model, tokenizer = load_language_model(str(folder), torch.float32, "cpu")
    data = load_dataset(dataset)
    task = task_prompt(data.name, len(data.x), data.x.shape[1], len(data.class_names))
    generator = torch.Generator().manual_seed(seed)
    form = PromptForm(tokenizer, ends=model.end_tokens)

    def draw(states: list[str]) -> list[str]:
        return draw_texts(model, form, states, generator, max_new_tokens=MAX_NEW_TOKENS, rows=BATCH)

    fresh = draw([task] * n)
    with Sandbox() as sandbox:
        scorer = Scorer(data, sandbox)
        scores = scorer.score_many(fresh)
        failed = [
            (text, score.error) for text, score in zip(fresh, scores, strict=True) if score.outcome != "ok"
        ]
        prompts = [reflection_prompt(task, text, error or "") for text, error in failed]
        prompts = [p for p in prompts if len(tokenizer(p)["input_ids"]) + MAX_NEW_TOKENS <= model.context]
        repairs = scorer.score_many(draw(prompts)) if prompts else []
    return {"dataset": data.name, **_summary(fresh, scores), "repaired_share": _share_ok(repairs)}


def _summary(texts: list[str], scores: list[Score]) -> dict[str, Any]:
    ran = [(text, score) for text, score in zip(texts, scores, strict=True) if score.auc_mean is not None]
    auc = np.array([score.auc_mean for _, score in ran])
    families = Counter(found[1] for text, _ in ran if (found := CLASSIFIER.search(text)))
    kinds = Counter(
        re.sub(r"^line \d+: ", "", s.error or "").split(":")[0] for s in scores if s.outcome != "ok"
    )
    return {
        "programs": len(texts),
        "runnable_share": _share_ok(scores),
        "distinct_share": len(set(texts)) / len(texts),
        "families": len(families),
        "auc": [round(float(q), 4) for q in np.quantile(auc, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))]
        if ran
        else [],
        "auc_below_065": float((auc < 0.65).mean()) if ran else 0.0,
        "auc_above_099": float((auc > 0.99).mean()) if ran else 0.0,
        "wall_s_mean": float(np.mean([score.wall_s for _, score in ran])) if ran else 0.0,
        "error_kinds": dict(kinds.most_common()),
        "family_counts": dict(families.most_common()),
    }


def _share_ok(scores: list[Score]) -> float:
    return sum(score.outcome == "ok" for score in scores) / max(1, len(scores))


def model_card(numbers: dict[str, Any]) -> str:
    """README.md of the model's folder, from what `pretrain` measured."""
    measured = numbers["programs"]
    quantiles = ", ".join(f"{q:.3f}" for q in measured["auc"])
    fresh = f"fresh programs that run ({measured['programs']} on {measured['dataset']}, temperature 1)"
    rows = {
        "perplexity of held-out programs, per token": f"{numbers['perplexity']:.3f}",
        "the same in nats": f"{numbers['nats_per_token']:.3f}",
        "entropy of the grammar, in nats, at most": f"{numbers['grammar_nats_per_token']:.3f}",
        "held-out repairs, in nats per token": f"{numbers['repair_nats_per_token']:.3f}",
        "tokens per program": f"{numbers['tokens_per_program']:.0f}",
        fresh: f"{measured['runnable_share']:.1%}",
        "second attempts that run, after the error was shown": f"{measured['repaired_share']:.1%}",
        "distinct programs": f"{measured['distinct_share']:.1%}",
        "families of classifiers among those that ran": str(measured["families"]),
        "AUC of those that ran: least, 5, 25, 50, 75, 95 %, most": quantiles,
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return f"""# etpo-nano

A language model of {numbers["parameters"] / 1e6:.2f} million parameters (Llama architecture; weights stored
in float16, used in float32) that writes the body of `build_model(x_train, y_train)` with scikit-learn. etpo's
training starts from it when no other model is named; `etpo pretrain --seed {numbers["seed"]}` rebuilds it.

It has read {numbers["documents"]:,} documents ({numbers["tokens"]:,} tokens, {numbers["steps"]:,} steps,
{numbers["wall_s"] / 60:.0f} minutes) that a probabilistic grammar wrote: classifiers and pipelines with good
and bad hyperparameters, mistakes with their real error messages, and repairs. The grammar knows no data set;
only the numbers of rows, features and classes in a prompt's first line matter to it.

| measured | |
|---|---|
{table}

Not for anything else: it knows no natural language, and no Python beyond these programs.
"""
