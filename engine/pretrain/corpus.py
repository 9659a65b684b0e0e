"""What the bundled model learns from: documents of the grammar as token ids, and the tokenizer itself.

A document is one episode, tokenised as the environment shows it: prompts whole, bodies on their own. Bodies
and the stop token behind them are learnt; prompts are read only.
"""

import math
import multiprocessing
import random
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from etpo.engine.pretrain.grammar.documents import Document, draw_document
from etpo.envs.prompts import reflection_prompt, task_prompt

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Words keep the punctuation that leads to them and the `=` behind them (`, gamma=`), a line's first word its
# indentation; numbers are leading zeros and pairs of digits, so that each pair is one choice.
PIECES = r"e-[0-9]|\n? *[.,(\[]? ?[A-Za-z_][A-Za-z_0-9]*=?\"?|0\.0*|[0-9]\.|[0-9]{1,2}| ?[^\sA-Za-z0-9_]+|\s+"
CHUNK = 1000
NO_TARGET = -100


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

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each document begins."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths


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
    """Documents of each step: shuffled, then cut by length, so that little is padding; in random order."""
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


def padded_rows(corpus: Corpus, batch: NDArray[np.int64], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and targets [documents, longest] int64 of one batch, padded on the right."""
    longest = int(corpus.lengths[batch].max())
    ids = np.full((len(batch), longest), pad, np.int64)
    targets = np.full((len(batch), longest), NO_TARGET, np.int64)
    for row, doc in enumerate(batch):
        length = corpus.lengths[doc]
        span = slice(corpus.starts[doc], corpus.starts[doc] + length)
        ids[row, :length] = corpus.ids[span]
        targets[row, :length] = corpus.targets[span]
    return torch.from_numpy(ids), torch.from_numpy(targets)
