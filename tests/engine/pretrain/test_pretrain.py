"""Pretraining: what is learnt, the batches, and that a run which stops goes on bit for bit."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from etpo.engine.pretrain import corpus
from etpo.engine.pretrain.corpus import (
    NO_TARGET,
    build_corpus,
    documents,
    encode,
    make_batches,
    padded_rows,
    train_tokenizer,
)
from etpo.engine.pretrain.train import Recipe, make_model, measure_perplexity, pretrain
from etpo.envs.prompts import reflection_prompt, task_prompt

TINY = Recipe(
    vocab=420,
    hidden=16,
    layers=1,
    heads=2,
    ffn=24,
    batch_tokens=600,
    checkpoint_every=3,
    tokenizer_documents=60,
    held_out_documents=8,
    card_programs=0,
)


@pytest.fixture(scope="module")
def docs():
    return list(islice(documents(0, "test"), 150))


@pytest.fixture(scope="module")
def tokenizer(docs):
    return train_tokenizer(docs, 700)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 60)


def run(out: Path, stop_after: int | None = None, **changes) -> dict:
    def progress(told: dict) -> None:
        if told["stage"] == "train" and told["step"] == stop_after:
            raise KeyboardInterrupt

    options = {"tokens": 5000, "threads": 1, "recipe": TINY, "progress": progress, **changes}
    return pretrain(out, **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    numbers = run(tmp_path / "whole")
    assert numbers["steps"] >= 8
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_after=4)
    assert not (tmp_path / "parts").exists()
    steps = []
    again = pretrain(
        tmp_path / "parts",
        tokens=5000,
        threads=1,
        recipe=TINY,
        progress=lambda told: steps.append(told.get("step")),
    )
    assert next(step for step in steps if step) == 4, "goes on behind the checkpoint of step 3"
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert again["perplexity"] == numbers["perplexity"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_stopped_while_it_measures_it_leaves_no_half_made_folder(tmp_path):
    """The command refuses a folder that holds files, so `out` is filled when all is measured."""

    def stop(told):
        if told["stage"] == "programs":
            raise KeyboardInterrupt

    recipe = replace(TINY, card_programs=1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "nano", recipe=recipe, progress=stop)
    assert not (tmp_path / "nano").exists()
    run(tmp_path / "nano", recipe=recipe)
    assert (tmp_path / "nano" / "README.md").is_file()
    run(tmp_path / "whole")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "nano"))


def test_another_seed_or_plan_starts_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "nano", stop_after=4)
    run(tmp_path / "nano", seed=1)
    run(tmp_path / "other", seed=1)
    assert same(weights(tmp_path / "nano"), weights(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "nano", seed=1, stop_after=4)
    steps = []
    run(tmp_path / "nano", seed=1, resume=False, progress=lambda told: steps.append(told.get("step")))
    assert next(step for step in steps if step) == 1


def test_the_folder_loads_with_transformers(tmp_path):
    out = tmp_path / "nano"
    numbers = run(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32
    assert len(tokenizer) == TINY.vocab == model.config.vocab_size
    assert numbers["parameters"] == model.num_parameters()
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.bos_token_id
    held_out = list(islice(documents(0, "held-out"), TINY.held_out_documents))
    assert measure_perplexity(model, tokenizer, held_out)["perplexity"] == numbers["perplexity"]
    prompt = task_prompt("café-ü", 20, 3, 2)
    ids = tokenizer(prompt)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt


def test_it_learns(tmp_path):
    """Untrained, a token costs about log V nats; a short training already saves more than two of them."""
    numbers = run(tmp_path / "nano", tokens=20_000, recipe=replace(TINY, hidden=32, heads=2))
    assert numbers["nats_per_token"] < np.log(TINY.vocab) - 2
    assert 0 < numbers["grammar_nats_per_token"] < numbers["nats_per_token"]


def test_minutes_shorten_the_corpus(tmp_path):
    numbers = run(tmp_path / "nano", tokens=10**9, minutes=0.01)
    assert numbers["tokens"] < 10**6


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"minutes": -1.0}])
def test_wrong_budgets_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"got .*(0|-1)"):
        run(tmp_path / "nano", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_bodies_and_stop_tokens_are_learnt_and_prompts_are_not(docs, tokenizer):
    eos = tokenizer.eos_token_id
    corpus = encode(tokenizer, docs)
    repairs = 0
    for doc, start, length in zip(docs, corpus.starts, corpus.lengths, strict=True):
        ids = corpus.ids[start : start + length].tolist()
        targets = corpus.targets[start : start + length].tolist()
        parts, current = [], []
        for target in targets:
            if target != NO_TARGET:
                current.append(target)
            if target == eos:
                parts.append(tokenizer.decode(current[:-1]))
                current = []
        assert parts == [doc.body] + ([doc.repaired] if doc.repaired else [])
        # What is read before each program is what the environment would show, token for token.
        assert (
            ids[: targets.index(eos)][: len(tokenizer(doc.task)["input_ids"])]
            == tokenizer(doc.task)["input_ids"]
        )
        if doc.error is not None:
            seen = tokenizer(reflection_prompt(doc.task, doc.body, doc.error))["input_ids"]
            assert ids[: len(seen)] == seen
            repairs += 1
        # A target is the next token, but for the stop token behind a failed program.
        for position, target in enumerate(targets[:-1]):
            assert target in (NO_TARGET, eos, ids[position + 1])
    assert repairs > 20


def test_every_document_is_in_one_batch_and_little_is_padding(docs, tokenizer):
    corpus = encode(tokenizer, docs)
    lengths = np.tile(corpus.lengths, 20)
    batches = make_batches(lengths, 2048, seed=3)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    padded = [len(batch) * int(lengths[batch].max()) for batch in batches]
    assert max(padded) <= 2048
    assert lengths.sum() > 0.93 * sum(padded)
    again = make_batches(lengths, 2048, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_padding_changes_nothing(docs, tokenizer):
    corpus = encode(tokenizer, docs[:6])
    model = make_model(tokenizer, replace(TINY, vocab=700), seed=0).eval()
    ids, _ = padded_rows(corpus, np.arange(6), tokenizer.pad_token_id)
    with torch.no_grad():
        together = model(ids).logits
        for row in range(6):
            length = int(corpus.lengths[row])
            alone = model(ids[row : row + 1, :length]).logits
            # float32 sums of 16 terms in another order.
            torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=1e-5, atol=1e-5)


def test_the_corpus_is_its_parts_in_order(tokenizer):
    one = build_corpus(tokenizer, 0, 9000, 1, lambda _: None)
    first = encode(tokenizer, list(islice(documents(0, 0), 60)))
    assert len(one.lengths) == np.ceil(9000 / first.lengths.mean()) > 70
    assert len(one.ids) == len(one.targets) == one.lengths.sum()
    assert np.array_equal(one.ids[: len(first.ids)], first.ids)
    second = encode(tokenizer, list(islice(documents(0, 1), 10)))
    assert np.array_equal(one.lengths[60:70], second.lengths)


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert decoded == text


def test_the_longest_documents_fit_the_context(docs, tokenizer):
    assert encode(tokenizer, docs).lengths.max() < Recipe().context
