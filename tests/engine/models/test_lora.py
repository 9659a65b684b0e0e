"""Adapters: where their A points, the gain that is trained along, and what is saved and merged of both."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    LlamaConfig,
)

from etpo.engine.models.final_norm import final_norm
from etpo.engine.models.language_model import LanguageModel
from etpo.engine.models.lora import adapter_layers, add_adapters, leading_directions
from etpo.engine.models.roles import GAIN, LoraRoles
from etpo.engine.models.sequences import Sequences

SMALL = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=6),
    "neox": GPTNeoXConfig(**SMALL),
}


def model_of(family: str) -> LanguageModel:
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").eval()
    for name, p in hf.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, mean=0.7, std=0.2)
    return LanguageModel(hf)


def sequences() -> Sequences:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 61, (n,), generator=generator) for n in (9, 14, 11)]
    return Sequences([text[:4] for text in texts], [text[4:] for text in texts])


def test_leading_directions_are_those_of_the_singular_value_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator, dtype=torch.float64) * torch.linspace(4, 0.1, 12)
    fill = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    _, _, right = torch.linalg.svd(x)
    for rows in (x, x[:9]):
        _, _, right = torch.linalg.svd(rows)
        found = leading_directions(rows, fill)
        torch.testing.assert_close((found @ right[:5].T).abs(), torch.eye(5).double(), rtol=0, atol=1e-9)


def test_where_inputs_have_fewer_directions_the_rest_is_filled() -> None:
    x = torch.zeros(7, 12, dtype=torch.float64)
    x[:, 3] = 2.0
    fill = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = leading_directions(x, fill)
    torch.testing.assert_close(found @ found.T, torch.eye(4).double())
    assert found[0, 3].abs().item() == pytest.approx(1.0)
    assert leading_directions(torch.zeros(7, 12).double(), fill).isfinite().all()


def test_adapters_point_at_their_inputs_until_one_has_moved() -> None:
    roles = LoraRoles(model_of("llama"), rank=3)
    before = roles.hidden("policy", sequences())
    roles.prepare(sequences())
    torch.testing.assert_close(roles.hidden("policy", sequences()), before, rtol=0, atol=0)
    for layer in adapter_layers(roles.model.hf).values():
        a = layer.lora_a["policy"]
        torch.testing.assert_close(a @ a.T * layer.scale**2, torch.eye(3), rtol=0, atol=1e-5)
        assert a.equal(layer.lora_a["critic"])
    layer = next(iter(adapter_layers(roles.model.hf).values()))
    with torch.no_grad():
        layer.lora_b["policy"].add_(0.1)
    kept = layer.lora_a["policy"].clone()
    other = Sequences([torch.tensor([5])], [torch.tensor([7, 8, 9, 10])])
    roles.prepare(other)
    assert layer.lora_a["policy"].equal(kept)


def test_a_step_of_b_is_the_step_of_the_weight_in_the_directions_of_a() -> None:
    """B ← B − η·∂L/∂B moves W by −η·G·P, P the projection on A's rows and G the gradient of W itself."""
    roles = LoraRoles(model_of("llama"), rank=3)
    roles.prepare(sequences())
    layer = adapter_layers(roles.model.hf)["model.layers.1.mlp.up_proj"]
    layer.weight.requires_grad_()
    roles.hidden("policy", sequences()).square().sum().backward()
    a, b = layer.lora_a["policy"].detach(), layer.lora_b["policy"]
    moved = layer.scale * b.grad @ a
    projection = a.T @ a * layer.scale**2
    torch.testing.assert_close(moved, layer.weight.grad @ projection, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gain_merges_into_the_final_norm(family) -> None:
    roles = LoraRoles(model_of(family), rank=3, moves=("policy",))
    with torch.no_grad():
        roles.parameters("policy")[GAIN].uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
        for layer in adapter_layers(roles.model.hf).values():
            layer.lora_b["policy"].normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    hidden = roles.hidden("policy", sequences())
    assert not torch.allclose(hidden, roles.hidden("reference", sequences()))
    with roles.acting("policy"):
        assert roles.model.gain is not None
    assert roles.model.gain is None
    merged = LanguageModel(roles.merged("policy"))
    torch.testing.assert_close(sequences().hidden(merged), hidden, rtol=1e-4, atol=1e-5)


def test_a_linear_layer_that_does_more_with_its_weight_gets_no_adapter() -> None:
    """DeepSeek-V4 has one whose weight is cut in groups: an adapter in its place would multiply it whole."""

    class Grouped(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x @ w.T for w in self.weight.chunk(2)], dim=-1)

    model = torch.nn.Sequential(Grouped(4, 6), torch.nn.Linear(6, 3), torch.nn.Linear(3, 2))
    add_adapters(model, model[2], ["policy"], 2)
    assert list(adapter_layers(model)) == ["1"]


def test_norms_inside_of_layers_are_not_the_final_one() -> None:
    names = {family: final_norm(model_of(family).hf, 24) for family in FAMILIES}
    assert {family: norm and norm.name for family, norm in names.items()} == {
        "llama": "model.norm", "gemma2": "model.norm", "neox": "gpt_neox.final_layer_norm",
    }  # fmt: skip
    assert {family: norm and norm.offset for family, norm in names.items()} == {
        "llama": 0.0, "gemma2": 1.0, "neox": 0.0,
    }  # fmt: skip
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=32, n_layer=1, n_head=4))
    assert final_norm(gpt2, 32).name == "transformer.ln_f"
