"""Fixtures that several folders share: tiny random language models."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from etpo.engine.models.language_model import LanguageModel


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


def tiny_qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "qwen2"])
def lean_model(request) -> LanguageModel:
    return LanguageModel(tiny_llama() if request.param == "llama" else tiny_qwen2())


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(tiny_llama())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A model folder: a random Llama whose tokens are bytes; nothing is fetched."""
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_llama(vocab_size=len(symbols), bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(
        folder
    )
    wrapped.save_pretrained(folder)
    return folder


# Left out of `make fast`: these start many processes, interpret kernels, or train until something is learned.
SLOW = (
    "kernels/interpreted/", "kernels/test_memory.py", "bench/", "envs/sandbox/", "envs/program_repair/",
    "envs/test_reference_pipelines.py", "envs/test_scoring.py", "envs/datasets/test_fetch.py",
    "engine/pretrain/", "engine/report/test_browser.py",
    "engine/learners/test_grid.py::test_the_update_reaches_the_optimum",
    "engine/test_resume.py::test_killed_at_random_moments",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the tests of tests/kernels make their tensors."""
    parser.addoption("--device", default="cpu", help="cpu or cuda, for tests/kernels; cuda takes triton too")


def pytest_configure(config: pytest.Config) -> None:
    """Modules choose their backends as they are imported."""
    os.environ["ETPO_TEST_DEVICE"] = config.getoption("--device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what stands in SLOW."""
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker(pytest.mark.slow)
