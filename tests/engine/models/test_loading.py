"""What people bring as a model: each parameter is read from the files, or the folder is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from etpo.engine.models.language_model import load_language_model
from etpo.engine.models.places import ModelError

MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def rename(folder, change):
    """Save the weights under other names; `change` gives None for one that is left out."""
    weights = load_file(folder / "model.safetensors")
    renamed = {change(name): tensor for name, tensor in weights.items()}
    renamed.pop(None, None)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def load(folder):
    return load_language_model(str(folder), torch.float32, "cpu")


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "pretrained_model.",
        "base_model.model.",
        "_fsdp_wrapped_module.",
        "module._orig_mod.",
    ],
)
def test_weights_saved_from_inside_a_wrapper_are_read(folder, prefix):
    weights = rename(folder, lambda name: prefix + name)
    model, _ = load(folder)
    own = model.hf.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items())


def test_weights_of_wrapped_layers_are_read(folder):
    weights = rename(folder, lambda name: name.replace("layers.0.", "layers.0._orig_mod."))
    assert torch.equal(load(folder)[0].hf.state_dict()[MATRIX], weights[MATRIX])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name: None if name == MATRIX else name, rf"got none for 1 of them \({MATRIX}\)"),
        (lambda name: "student." + name, r"got none for \d\d of them \("),
        (lambda name: name.replace("layers.1.", "layers.7."), r"got none for 9 of them \(model.layers.1"),
    ],
)
def test_a_parameter_that_the_files_lack_is_named(folder, change, words):
    rename(folder, change)
    with pytest.raises(ModelError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_lost_head_is_named_where_it_is_not_the_embedding(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"got none for 1 of them \(lm_head.weight\)"):
        load(folder)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"at most 259 tokens, .* got one of 261; .*resize_token_embeddings"):
        load(folder)


def test_the_ends_of_a_text_come_from_both_configurations(folder):
    for name, ends in (("config.json", 1), ("generation_config.json", [2, 40, 9999])):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": ends}))
    assert load(folder)[0].end_tokens == {1, 2, 40}
