"""Pretrains the bundled model: corpus from the grammar → byte-level BPE tokenizer → a small Llama.

A document is one episode, tokenised as the environment shows it: prompts whole, bodies on their own. The loss is on
bodies and on the stop token behind them; prompts are read, never learnt. A batch holds documents of nearly equal
length, one a row, padded on the right, so that causal attention needs no mask.
"""

import json
import math
import multiprocessing
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from etpo.engine.checkpoint import (
    Checkpoint,
    flatten_optimizer,
    latest_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from etpo.envs.grammar import Document, draw_document
from etpo.envs.prompts import reflection_prompt, task_prompt

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Words keep the punctuation that leads to them and the `=` that follows them (`, gamma=`), a line's first word its
# indentation; numbers come as leading zeros and pairs of digits, so that each digit pair is one choice.
PIECES = r"e-[0-9]|\n? *[.,(\[]? ?[A-Za-z_][A-Za-z_0-9]*=?\"?|0\.0*|[0-9]\.|[0-9]{1,2}| ?[^\sA-Za-z0-9_]+|\s+"
CHUNK = 1000
NO_TARGET = -100


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training."""

    vocab: int = 1536
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    ffn: int = 512
    context: int = 512
    batch_tokens: int = 4096
    lr: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    checkpoint_every: int = 100
    tokenizer_documents: int = 5000
    held_out_documents: int = 1000


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids, one after the other.

    Attributes:
        ids: int16 [T], what the model reads.
        targets: int16 [T], what it should say next; NO_TARGET where nothing is learnt.
        lengths: int32 [documents].
    """

    ids: NDArray[np.int16]
    targets: NDArray[np.int16]
    lengths: NDArray[np.int32]


def pretrain(
    out: Path,
    *,
    seed: int = 0,
    minutes: float | None = None,
    tokens: int = 8_000_000,
    threads: int = 0,
    resume: bool = True,
    progress: Callable[[dict[str, Any]], None] | None = None,
    recipe: Recipe = Recipe(),
) -> dict[str, Any]:
    """Train the bundled model from nothing and write its folder.

    Checkpoints stand beside `out` until the model is complete: a run that was killed goes on from the last one, and
    ends in the same weights, bit for bit, at the same number of threads.

    Args:
        out: folder for config.json, model.safetensors, tokenizer.json, tokenizer_config.json.
        seed: decides the corpus, the initial weights and the order of documents.
        minutes: fewer tokens than `tokens`, where this machine would train longer than this on them.
        tokens: tokens that the model reads, prompts included.
        threads: of PyTorch, and processes that write the corpus; 0 for as many as there are cores.
        resume: go on from checkpoints of an earlier call; False starts again.
        progress: called with a dictionary that names the `stage` and how far it is.

    Returns:
        What was measured: `perplexity` (held-out, per token of a program), `nats_per_token`,
        `grammar_nats_per_token` (no model can be much better), `tokens`, `steps`, `parameters`, `wall_s`.

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

    model.to(torch.float16).float()  # measured is what is stored
    tell({"stage": "held-out"})
    held_out = list(islice(documents(seed, "held-out"), recipe.held_out_documents))
    numbers = {
        **measure_perplexity(model, tokenizer, held_out),
        "tokens": int(corpus.lengths.sum()),
        "documents": len(corpus.lengths),
        "steps": len(batches),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "wall_s": wall_s,
    }
    write_folder(out, model, tokenizer)
    shutil.rmtree(work)
    return numbers


def _plan(work: Path, seed: int, minutes: float | None, tokens: int, recipe: Recipe) -> dict[str, Any]:
    """What this run was asked for; an earlier run's checkpoints are dropped where they were for something else."""
    asked = {"seed": seed, "minutes": minutes, "tokens_asked": tokens, "recipe": repr(recipe)}
    path = work / "plan.json"
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        if all(plan.get(key) == value for key, value in asked.items()):
            return plan
        shutil.rmtree(work)
        work.mkdir(parents=True)
    if minutes is not None:
        tokens = min(tokens, int(60 * minutes * _tokens_per_s(recipe)))
    plan = {**asked, "tokens": tokens}
    path.write_text(json.dumps(plan), encoding="utf-8")
    return plan


def _tokens_per_s(recipe: Recipe) -> float:
    """Tokens a second of a few training steps on noise."""
    model = LlamaForCausalLM(_config(recipe, 0, 1, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(3, recipe.vocab, (max(1, recipe.batch_tokens // 100), 100))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        _loss(model, ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return ids.numel() / float(np.median(seconds[1:]))


def documents(seed: int, part: str | int) -> Iterator[Document]:
    """One part of the corpus; parts are independent of each other."""
    rng = random.Random(f"{seed}/{part}")
    while True:
        yield draw_document(rng)


def _chunk(seed: int, part: int) -> list[Document]:
    return list(islice(documents(seed, part), CHUNK))


def train_tokenizer(docs: Iterable[Document], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab` tokens on the corpus's own text; every byte has a token.

    The constant pieces of the prompts are one token each: they are read often and never written.
    """
    fixed = [AddedToken(text, normalized=False) for text in _constant_pieces()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(fixed),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(docs), trainer)
    tokenizer.add_tokens(fixed)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _constant_pieces() -> list[str]:
    """What every task prompt and every reflection prompt has in common."""
    task = re.split("NAME|11111|22222|33333", task_prompt("NAME", 11111, 22222, 33333))
    reflection = re.split("ERROR", reflection_prompt("", "\n", "ERROR"))
    return [piece for piece in [*task, *reflection] if len(piece) > 2]


def _texts(docs: Iterable[Document]) -> Iterator[str]:
    """The corpus without the constant pieces of its prompts."""
    constant = re.compile("|".join(map(re.escape, _constant_pieces())))
    for doc in docs:
        yield from constant.split(doc.task)
        yield doc.body
        if doc.error is not None and doc.repaired is not None:
            yield doc.error
            yield doc.repaired


def encode(tokenizer: PreTrainedTokenizerFast, docs: list[Document]) -> Corpus:
    """Token ids and targets of documents. Behind a failed body the target is the stop token, too."""
    mended = [doc for doc in docs if doc.error is not None and doc.repaired is not None]
    prompts = _ids(tokenizer, [doc.task for doc in docs], bos=True)
    bodies = _ids(tokenizer, [doc.body for doc in docs], bos=False)
    seconds = _ids(tokenizer, [reflection_prompt(d.task, d.body, d.error or "") for d in mended], bos=True)
    repairs = _ids(tokenizer, [doc.repaired or "" for doc in mended], bos=False)
    second_of = dict(zip(map(id, mended), zip(seconds, repairs, strict=True), strict=True))
    ids: list[int] = []
    targets: list[int] = []
    lengths = []
    for doc, prompt, body in zip(docs, prompts, bodies, strict=True):
        row = prompt + body
        goal = [NO_TARGET] * (len(prompt) - 1) + body + [tokenizer.eos_token_id]
        if id(doc) in second_of:
            second, repair = second_of[id(doc)]
            assert second[: len(row)] == row, "a body is tokenised alike alone and inside a prompt"
            goal += [NO_TARGET] * (len(second) - len(row) - 1) + repair + [tokenizer.eos_token_id]
            row = second + repair
        ids += row
        targets += goal
        lengths.append(len(row))
    return Corpus(np.array(ids, np.int16), np.array(targets, np.int16), np.array(lengths, np.int32))


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str], bos: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=bos)["input_ids"] if texts else []


def build_corpus(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    tokens: int,
    processes: int,
    tell: Callable[[dict[str, Any]], None],
) -> Corpus:
    """About `tokens` tokens of documents; the same whatever the number of processes."""
    first = encode(tokenizer, _chunk(seed, 0))
    n_documents = math.ceil(tokens / first.lengths.mean())
    parts = [first]
    chunks = range(1, math.ceil(n_documents / CHUNK))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        draw = pool.map if processes > 1 and len(chunks) > 1 else map
        for docs in draw(_chunk, [seed] * len(chunks), chunks):
            parts.append(encode(tokenizer, docs))
            tell({"stage": "corpus", "documents": CHUNK * len(parts), "of": n_documents})
    ids, targets, lengths = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "targets", "lengths")
    )
    end = int(lengths[:n_documents].sum())
    return Corpus(ids[:end], targets[:end], lengths[:n_documents])


def make_batches(lengths: NDArray[np.int32], batch_tokens: int, seed: int) -> list[NDArray[np.int64]]:
    """Documents of each step: shuffled, then cut by length, so that little is padding; steps in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    batches: list[NDArray[np.int64]] = []
    pool = 64 * batch_tokens // max(1, int(lengths.mean()))
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        first = 0
        for at in range(1, len(part) + 1):
            if at == len(part) or (at + 1 - first) * lengths[part[at]] > batch_tokens:
                batches.append(part[first:at])
                first = at
    return [batches[i] for i in rng.permutation(len(batches))]


def _rows(
    corpus: Corpus, starts: NDArray[np.int64], batch: NDArray[np.int64], pad: int
) -> tuple[Tensor, Tensor]:
    """Padded ids and targets [documents, longest] int64 of one batch."""
    longest = int(corpus.lengths[batch].max())
    ids = np.full((len(batch), longest), pad, np.int64)
    targets = np.full((len(batch), longest), NO_TARGET, np.int64)
    for row, doc in enumerate(batch):
        span = slice(starts[doc], starts[doc] + corpus.lengths[doc])
        ids[row, : corpus.lengths[doc]] = corpus.ids[span]
        targets[row, : corpus.lengths[doc]] = corpus.targets[span]
    return torch.from_numpy(ids), torch.from_numpy(targets)


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


def _train(
    model: LlamaForCausalLM,
    corpus: Corpus,
    batches: list[NDArray[np.int64]],
    work: Path,
    recipe: Recipe,
    tell: Callable[[dict[str, Any]], None],
) -> float:
    """Train in place from the last checkpoint in `work`; seconds that it took, earlier calls included."""
    names = [name for name, _ in model.named_parameters()]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr,
        betas=(0.9, 0.95),
    )
    ordered = [name for name, p in model.named_parameters() if p.ndim > 1]
    ordered += [name for name in names if name not in ordered]
    saved, _ = latest_checkpoint(work / "checkpoints")
    first, before_s = 0, 0.0
    if saved is not None:
        first, before_s = saved.step, saved.state["wall_s"]
        model.load_state_dict({n: saved.tensors[f"model/{n}"] for n in names}, strict=False)
        restore_optimizer("adamw", optimizer, ordered, saved.tensors)
    starts = np.concatenate([[0], np.cumsum(corpus.lengths, dtype=np.int64)])
    pad = int(model.config.pad_token_id or 0)
    begin = time.perf_counter()
    for step in range(first, len(batches)):
        ids, targets = _rows(corpus, starts, batches[step], pad)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _schedule(step, len(batches), recipe.warmup_steps)
        loss = _loss(model, ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wall_s = before_s + time.perf_counter() - begin
        done = step + 1
        if done % recipe.checkpoint_every == 0:
            tensors = {f"model/{n}": p for n, p in model.named_parameters()}
            tensors |= flatten_optimizer("adamw", optimizer, ordered)
            save_checkpoint(work / "checkpoints", Checkpoint(done, tensors, {"wall_s": wall_s}))
        tell(
            {
                "stage": "train",
                "step": done,
                "of": len(batches),
                "loss": float(loss.detach()),
                "wall_s": wall_s,
            }
        )
    return before_s + time.perf_counter() - begin


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    warmup = min(warmup, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def measure_perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, docs: list[Document]
) -> dict[str, float]:
    """Perplexity per token (stop token included) of first programs and of repairs, and the grammar's own entropy.

    `grammar_nats_per_token` is the surprise of the grammar's choices for the first programs: an upper bound on
    their entropy, which no model that knows the grammar would exceed.
    """
    first = [Document(d.task, d.body, None, None, d.kind, d.nats) for d in docs]
    nats, count_ = _surprise(model, tokenizer, first)
    both_nats, both = _surprise(model, tokenizer, docs)
    return {
        "perplexity": math.exp(nats / count_),
        "nats_per_token": nats / count_,
        "grammar_nats_per_token": sum(doc.nats for doc in docs) / count_,
        "repair_nats_per_token": (both_nats - nats) / max(1, both - count_),
        "tokens_per_program": count_ / len(docs),
    }


def _surprise(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, docs: list[Document]
) -> tuple[float, int]:
    """Σ −log π and the number of tokens that have a target."""
    corpus = encode(tokenizer, docs)
    starts = np.concatenate([[0], np.cumsum(corpus.lengths, dtype=np.int64)])
    total = 0.0
    for batch in make_batches(corpus.lengths, 4096, 0):
        ids, targets = _rows(corpus, starts, batch, int(model.config.pad_token_id or 0))
        total += float(_loss(model, ids, targets)) * int((targets != NO_TARGET).sum())
    return total, int((corpus.targets != NO_TARGET).sum())


def write_folder(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A folder that `from_pretrained` loads; weights stored in half precision, declared float32 for use."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(out)
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
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _kept_corpus(
    work: Path,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    tokens: int,
    processes: int,
    tell: Callable[[dict[str, Any]], None],
) -> Corpus:
    """The corpus in `work`, written first where there is none."""
    path = work / "corpus.safetensors"
    if not path.is_file():
        corpus = build_corpus(tokenizer, seed, tokens, processes, tell)
        partial = path.with_suffix(".partial")
        save_file({"ids": corpus.ids, "targets": corpus.targets, "lengths": corpus.lengths}, partial)
        partial.rename(path)
    return Corpus(**load_file(path))
