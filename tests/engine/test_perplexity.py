"""Perplexity, beside a forward pass of the whole text by transformers."""

import math

import pytest
import torch

from etpo.engine.models.language_model import load_language_model
from etpo.engine.perplexity import TextError, own_texts, perplexity, read_text


@pytest.fixture
def loaded(tiny_folder):
    return load_language_model(str(tiny_folder), torch.float32, "cpu")


def test_equals_the_mean_over_a_plain_forward_pass(loaded):
    model, tokenizer = loaded
    text = "An apple a day, naïvely."
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        logp = model.hf(ids).logits[0, :-1].log_softmax(-1)
    nat = -logp.gather(1, ids[0, 1:, None]).sum().item()
    found = perplexity(model, tokenizer, text)
    n_bytes = len(text.encode())
    assert found.n_tokens == ids.shape[1] - 1 == n_bytes  # tokens of the tiny model are bytes
    assert found.perplexity == pytest.approx(math.exp(nat / n_bytes), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nat / n_bytes / math.log(2), rel=1e-4)


def test_a_text_longer_than_the_context_is_read_in_overlapping_windows(loaded):
    model, tokenizer = loaded
    text = "abcdefgh" * 40  # 320 tokens, the context is 128
    found = perplexity(model, tokenizer, text)
    assert found.n_tokens == 320
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]])
    nat = 0.0
    with torch.no_grad():
        for start in range(0, 320, 64):
            first = max(0, start - 64)
            logp = model.hf(ids[None, first : start + 64]).logits[0].log_softmax(-1)[start - first :]
            nat -= logp.gather(1, ids[start + 1 : start + 65, None]).sum().item()
    assert found.perplexity == pytest.approx(math.exp(nat / 320), rel=1e-4)


def test_own_texts_are_small_and_each_of_its_kind():
    texts = own_texts()
    assert list(texts) == ["English prose", "Python code", "table description"]
    assert all(2000 <= len(text.encode()) <= 4000 for text in texts.values())
    compile(texts["Python code"], "code", "exec")


def test_bad_files_are_one_line(loaded, tmp_path):
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "blank").write_text(" \n")
    cases = {
        "absent": "No such file",
        "latin": "UTF-8, got byte 0xef at 2",
        "blank": "got a blank one",
        ".": "directory",
    }
    for name, told in cases.items():
        with pytest.raises(TextError, match=told):
            read_text(tmp_path / name)
