"""Pretrains the bundled model: corpus from the grammar → byte-level BPE tokenizer → a small Llama.

A batch holds documents of nearly equal length, one a row, padded on the right, so that causal attention needs
no mask. Matrices learn by Muon (momentum made orthogonal), which halves the tokens that this model needs;
embeddings and gains by AdamW.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from etpo.engine.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from etpo.engine.optim import flatten_optimizer, restore_optimizer
from etpo.engine.pretrain.card import measure_programs, model_card
from etpo.engine.pretrain.corpus import (
    NO_TARGET,
    Corpus,
    build_corpus,
    documents,
    encode,
    make_batches,
    padded_rows,
    train_tokenizer,
)
from etpo.engine.pretrain.grammar.documents import Document
from etpo.engine.run_folder import write_atomically

CARD_DATASET = "tic-tac-toe"
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training."""

    vocab: int = 1536
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    ffn: int = 512
    context: int = 512
    init_std: float = 0.05
    batch_tokens: int = 2048
    lr_matrices: float = 0.01
    lr_others: float = 1e-2
    warmup_share: float = 0.05
    weight_decay: float = 0.05
    checkpoint_every: int = 200
    tokenizer_documents: int = 5000
    held_out_documents: int = 1000
    card_programs: int = 500


def pretrain(
    out: Path,
    *,
    seed: int = 0,
    minutes: float | None = None,
    tokens: int = 6_000_000,
    threads: int = 0,
    resume: bool = True,
    progress: Tell | None = None,
    recipe: Recipe = Recipe(),
) -> dict[str, Any]:
    """Train the bundled model from nothing and write its folder.

    Checkpoints stand beside `out` until the model is complete: a run that was killed goes on from the last
    one, and ends in the same weights, bit for bit, at the same number of threads.

    Args:
        out: folder for config.json, model.safetensors, the tokenizer's files, and README.md (the model card).
        seed: decides the corpus, the initial weights and the order of documents.
        minutes: fewer tokens than `tokens`, where this machine would train longer than this on them.
        tokens: tokens that the model reads, prompts included.
        threads: of PyTorch, and processes that write the corpus; 0 for as many as there are cores.
        resume: go on from checkpoints of an earlier call; False starts again.
        progress: called with a dictionary that names the `stage` and how far it is.

    Returns:
        What was measured (see `measure_perplexity`), and `tokens`, `documents`, `steps`, `parameters`,
        `seed`, `wall_s`; under `programs` what its programs do (see `measure_programs`).

    Raises:
        ValueError: `tokens` or `minutes` not positive.
    """
    if tokens <= 0 or (minutes is not None and minutes <= 0):
        raise ValueError(f"tokens and minutes must be positive, got {tokens} and {minutes}")
    out = Path(out)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    tell = progress or (lambda _: None)
    work = out.parent / f".{out.name}-pretrain"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    plan = _plan(work, seed, minutes, tokens, recipe)

    tell({"stage": "tokenizer"})
    tokenizer = _kept_tokenizer(work, seed, recipe)
    corpus = _kept_corpus(work, tokenizer, seed, plan["tokens"], threads, tell)
    batches = make_batches(corpus.lengths, recipe.batch_tokens, seed)
    model = make_model(tokenizer, recipe, seed)
    wall_s = _train(model, corpus, batches, work, recipe, tell)

    model.half().float()  # measured is what is stored
    tell({"stage": "held-out"})
    held_out = list(islice(documents(seed, "held-out"), recipe.held_out_documents))
    numbers: dict[str, Any] = {
        **measure_perplexity(model, tokenizer, held_out),
        "tokens": int(corpus.lengths.sum()),
        "documents": len(corpus.lengths),
        "steps": len(batches),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "wall_s": wall_s,
    }
    built = work / "model"
    write_folder(built, model, tokenizer)
    if recipe.card_programs:
        tell({"stage": "programs"})
        numbers["programs"] = measure_programs(built, CARD_DATASET, recipe.card_programs, seed)
        (built / "README.md").write_text(model_card(numbers), encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for file in built.iterdir():
        file.replace(out / file.name)
    shutil.rmtree(work)
    return numbers


def _plan(work: Path, seed: int, minutes: float | None, tokens: int, recipe: Recipe) -> dict[str, Any]:
    """What this run was asked for; what an earlier run left is dropped where it was for something else."""
    asked = {"seed": seed, "minutes": minutes, "tokens_asked": tokens, "recipe": repr(recipe)}
    path = work / "plan.json"
    if path.is_file():
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(plan.get(key) == value for key, value in asked.items()):
            return plan
        shutil.rmtree(work)
        work.mkdir(parents=True)
    if minutes is not None:
        tokens = min(tokens, int(60 * minutes * _tokens_per_s(recipe)))
    plan = {**asked, "tokens": tokens}
    write_atomically(path, json.dumps(plan))
    return plan


def _tokens_per_s(recipe: Recipe) -> float:
    """Tokens a second of a few training steps on noise."""
    model = LlamaForCausalLM(_config(recipe, 0, 1, 2))
    optimizers = _optimizers(model, recipe)
    ids = torch.randint(3, recipe.vocab, (max(1, recipe.batch_tokens // 100), 100))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        _step(model, optimizers, ids, ids, 1e-3)
        seconds.append(time.perf_counter() - start)
    return ids.numel() / float(np.median(seconds[1:]))


def _config(recipe: Recipe, bos: int, eos: int, pad: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.ffn,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        initializer_range=recipe.init_std,
        dtype="float32",
    )


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """An untrained model, float32."""
    torch.manual_seed(seed)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return LlamaForCausalLM(_config(recipe, *ids))


def _loss(model: LlamaForCausalLM, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the positions that have a target; logits only there."""
    hidden = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    is_learnt = targets_BT != NO_TARGET
    return F.cross_entropy(model.lm_head(hidden[is_learnt]), targets_BT[is_learnt])


@dataclass(frozen=True)
class _Optimizer:
    """An optimiser, its name in checkpoints, its parameters' names and its highest learning rate."""

    name: str
    optimizer: torch.optim.Optimizer
    names: list[str]
    lr: float


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[_Optimizer]:
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    others = {n: p for n, p in model.named_parameters() if n not in matrices}
    muon = torch.optim.Muon(
        list(matrices.values()), weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(list(others.values()), betas=(0.9, 0.95), weight_decay=0.0)
    return [
        _Optimizer("muon", muon, list(matrices), recipe.lr_matrices),
        _Optimizer("adamw", adamw, list(others), recipe.lr_others),
    ]


def _step(
    model: LlamaForCausalLM, optimizers: list[_Optimizer], ids_BT: Tensor, targets_BT: Tensor, schedule: float
) -> float:
    """One step at `schedule` times the highest learning rates; the loss before it."""
    loss = _loss(model, ids_BT, targets_BT)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for each in optimizers:
        for group in each.optimizer.param_groups:
            group["lr"] = schedule * each.lr
        each.optimizer.step()
        each.optimizer.zero_grad()
    return float(loss.detach())


def _train(
    model: LlamaForCausalLM,
    corpus: Corpus,
    batches: list[NDArray[np.int64]],
    work: Path,
    recipe: Recipe,
    tell: Tell,
) -> float:
    """Train in place from the last checkpoint in `work`; seconds that it took, earlier calls included."""
    optimizers = _optimizers(model, recipe)
    saved, _ = latest_checkpoint(work / "checkpoints")
    first, before_s = 0, 0.0
    if saved is not None:
        first, before_s = saved.step, saved.state["wall_s"]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved.tensors[f"model/{name}"])
        for each in optimizers:
            restore_optimizer(each.name, each.optimizer, each.names, saved.tensors)
    begin = time.perf_counter()
    wall_s = before_s
    for step in range(first, len(batches)):
        ids, targets = padded_rows(corpus, batches[step], int(model.config.pad_token_id or 0))
        loss = _step(model, optimizers, ids, targets, _schedule(step / len(batches), recipe.warmup_share))
        wall_s = before_s + time.perf_counter() - begin
        done = step + 1
        if done % recipe.checkpoint_every == 0:
            tensors: dict[str, Tensor] = {f"model/{n}": p for n, p in model.named_parameters()}
            for each in optimizers:
                tensors |= flatten_optimizer(each.name, each.optimizer, each.names)
            save_checkpoint(work / "checkpoints", Checkpoint(done, tensors, {"wall_s": wall_s}))
        tell({"stage": "train", "step": done, "of": len(batches), "loss": loss, "wall_s": wall_s})
    return wall_s


def _schedule(done: float, warmup: float) -> float:
    """Share of the highest learning rate when a share `done` of all steps is over: a rise, then a cosine."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@torch.no_grad()
def measure_perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, docs: list[Document]
) -> dict[str, float]:
    """How well the model foresees programs that it has not seen, per token, the stop token included.

    Returns:
        `perplexity` and `nats_per_token` of first programs; `grammar_nats_per_token`, the surprise of the
        grammar's own choices for them (an upper bound on their entropy); `repair_nats_per_token` of repairs;
        `tokens_per_program`.
    """
    first = [Document(d.task, d.body, None, None, d.kind, d.nats) for d in docs]
    nats, n_tokens = _surprise(model, tokenizer, first)
    all_nats, n_all = _surprise(model, tokenizer, docs)
    return {
        "perplexity": math.exp(nats / n_tokens),
        "nats_per_token": nats / n_tokens,
        "grammar_nats_per_token": sum(doc.nats for doc in docs) / n_tokens,
        "repair_nats_per_token": (all_nats - nats) / max(1, n_all - n_tokens),
        "tokens_per_program": n_tokens / len(docs),
    }


def _surprise(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, docs: list[Document]
) -> tuple[float, int]:
    """Σ −log π and the number of tokens that have a target."""
    corpus = encode(tokenizer, docs)
    total = 0.0
    for batch in make_batches(corpus.lengths, 4096, 0):
        ids, targets = padded_rows(corpus, batch, int(model.config.pad_token_id or 0))
        total += float(_loss(model, ids, targets)) * int((targets != NO_TARGET).sum())
    return total, int((corpus.targets != NO_TARGET).sum())


def write_folder(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A folder that `from_pretrained` loads; weights stored in half precision, declared float32 for use."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    model.float()
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)


def _kept_tokenizer(work: Path, seed: int, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer in `work`, trained first where there is none."""
    folder = work / "tokenizer"
    if not folder.is_dir():
        partial = work / "tokenizer.partial"
        train_tokenizer(
            islice(documents(seed, "tokenizer"), recipe.tokenizer_documents), recipe.vocab
        ).save_pretrained(partial)
        partial.rename(folder)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def _kept_corpus(
    work: Path,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    tokens: int,
    processes: int,
    tell: Tell,
) -> Corpus:
    """The corpus in `work`, written first where there is none."""
    path = work / "corpus.safetensors"
    if not path.is_file():
        corpus = build_corpus(tokenizer, seed, tokens, processes, tell)
        partial = path.with_suffix(".partial")
        save_file({"ids": corpus.ids, "targets": corpus.targets, "lengths": corpus.lengths}, partial)
        partial.rename(path)
    return Corpus(**load_file(path))
