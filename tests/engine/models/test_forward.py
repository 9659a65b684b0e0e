"""The lean forward against transformers' own, and decoding against the training forward."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    PhiConfig,
)

from etpo.engine.models.language_model import LanguageModel, gives_own_logits
from etpo.engine.models.sampler import Sampling, sample_actions
from etpo.engine.models.sequences import Sequences
from tests.conftest import tiny_llama

STOP = 1


def sequences_of(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Six suffixes behind two distinct prompts and an empty one."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 37, (n,), generator=g)  # noqa: E731
    a, b, empty = draw(9), draw(4), draw(0)
    return [a, b, a, empty, b, a], [draw(n) for n in (3, 7, 1, 5, 2, 6)]


def padded_hidden(model: LanguageModel, prompts, suffixes) -> torch.Tensor:
    """Each sequence alone through transformers' forward; no padding, no sharing."""
    rows = []
    for prompt, suffix in zip(prompts, suffixes, strict=True):
        tokens = torch.cat((prompt, suffix))[None]
        rows.append(model.hf.base_model(input_ids=tokens).last_hidden_state[0, len(prompt) :])
    return torch.cat(rows)


def test_lean_forward_is_transformers_forward(lean_model):
    prompts, suffixes = sequences_of()
    with torch.no_grad():
        ours = Sequences(prompts, suffixes).hidden(lean_model)
        theirs = padded_hidden(lean_model, prompts, suffixes)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_shared_prompt_gradient_is_the_plain_gradient(lean_model):
    prompts, suffixes = sequences_of()
    weights = list(lean_model.hf.base_model.parameters())
    probe = torch.randn(sum(len(s) for s in suffixes), 32, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((Sequences(prompts, suffixes).hidden(lean_model) * probe).sum(), weights)
    theirs = torch.autograd.grad((padded_hidden(lean_model, prompts, suffixes) * probe).sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_other_families_run_through_transformers():
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    model = LanguageModel(hf)
    assert not model.is_lean
    prompts, suffixes = sequences_of()
    with torch.no_grad():
        ours = Sequences(prompts, suffixes).hidden(model)
        theirs = padded_hidden(model, prompts, suffixes)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    check_decode(model)


HEADS = {
    "a bias": PhiConfig(num_attention_heads=4),
    "a softcap": Gemma2Config(head_dim=8, num_attention_heads=4, final_logit_softcapping=2.0),
    "a factor": CohereConfig(num_attention_heads=4, logit_scale=0.25),
    "a divisor": GraniteConfig(num_attention_heads=4, logits_scaling=8.0),
}


@pytest.mark.parametrize("what", HEADS)
def test_logits_are_transformers_logits_of_a_head_with(what):
    torch.manual_seed(0)
    config = HEADS[what]
    for name, value in (("vocab_size", 37), ("hidden_size", 32), ("num_hidden_layers", 2)):
        setattr(config, name, value)
    config.intermediate_size, config.num_key_value_heads, config.initializer_range = 48, 4, 0.3
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 0, 1
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval())
    if model.head_bias is not None:
        torch.nn.init.normal_(model.head_bias)
    prompts, suffixes = sequences_of()
    with torch.no_grad():
        ours = model.logits(Sequences(prompts, suffixes).hidden(model))
        whole = [torch.cat(pair)[None] for pair in zip(prompts, suffixes, strict=True)]
        theirs = [model.hf(input_ids=w).logits[0, -len(s) :] for w, s in zip(whole, suffixes, strict=True)]
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-4, atol=1e-5)
    assert gives_own_logits(model)


@pytest.mark.parametrize("what", ["a factor", "a softcap", "a bias"])
def test_logits_that_are_eight_per_cent_off_are_refused(what):
    model = LanguageModel(AutoModelForCausalLM.from_config(HEADS[what]).eval())
    assert gives_own_logits(model)
    if what == "a bias":
        torch.nn.init.normal_(model.head_weight)
        model.hf.lm_head.forward = lambda h: 1.08 * torch.nn.functional.linear(h, model.head_weight)
    else:
        model.temperature, model.softcap = 1.08 * model.temperature, None
    assert not gives_own_logits(model)
    assert not gives_own_logits(model.to(torch.bfloat16))


OTHER_DECODING = {
    "bart": (
        "alike",
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    ),
    "mamba": ("whole", {"num_hidden_layers": 2}),
    "gpt2": ("padded", {"n_layer": 2, "n_head": 4, "n_positions": 256}),
    "llama": ("lean", {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}),
}


@pytest.mark.parametrize("family", OTHER_DECODING)
def test_a_family_draws_as_it_learns_whatever_its_positions_and_its_memory(family):
    """Bart counts positions by the column, Mamba's memory is no key-value cache."""
    decoding, settings = OTHER_DECODING[family]
    torch.manual_seed(0)
    common = {"vocab_size": 37, "hidden_size": 32, "max_position_embeddings": 256}
    tokens = {"bos_token_id": 2, "eos_token_id": STOP, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **common, **tokens, **settings)
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    assert gives_own_logits(model)
    assert model.decoding == decoding
    check_decode(model)


def test_a_lean_family_with_another_forward_runs_through_transformers():
    """A rotation of a part of each head is no Llama's; the packed forward would turn it all."""
    model = LanguageModel(tiny_llama())
    rotate = model.rotary.forward
    model.rotary.forward = lambda x, positions: rotate(x, 2 * positions)
    assert gives_own_logits(model)
    assert (model.is_lean, model.decoding) == (False, "padded")
    check_decode(model)


def test_an_action_ends_with_any_of_several_tokens(model):
    prompts = [torch.tensor([2, 3])] * 40
    generator = torch.Generator().manual_seed(0)
    ends = {STOP, 5, 9}
    samples = sample_actions(model, prompts, max_new_tokens=12, stop_token=ends, generator=generator)
    for sample in samples:
        assert ends.isdisjoint(sample.tokens[:-1].tolist())
    assert ends <= {int(sample.tokens[-1]) for sample in samples}


def test_decode_agrees_with_the_training_forward(lean_model):
    check_decode(lean_model)


def check_decode(model: LanguageModel) -> None:
    prompts, _ = sequences_of(3)
    prompts = [torch.cat((torch.tensor([2]), p)) for p in prompts]
    samples = sample_actions(
        model, prompts, max_new_tokens=40, stop_token=STOP, generator=torch.Generator().manual_seed(0)
    )
    assert len({len(s.tokens) for s in samples}) > 1, "rows should finish at different steps"
    with torch.no_grad():
        hidden = Sequences(
            [p[:-1] for p in prompts],
            [torch.cat((p[-1:], s.tokens[:-1])) for p, s in zip(prompts, samples, strict=True)],
        ).hidden(model)
        logprobs = model.logits(hidden).log_softmax(-1)
    tokens = torch.cat([s.tokens for s in samples])
    torch.testing.assert_close(torch.cat([s.hidden for s in samples]), hidden, rtol=1e-4, atol=1e-4)
    drawn = logprobs.gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(torch.cat([s.logprob_mu for s in samples]), drawn, rtol=1e-4, atol=1e-4)


def test_actions_end_with_the_stop_token_or_at_the_limit(model):
    prompts = [torch.tensor([2, 3])] * 40
    samples = sample_actions(
        model, prompts, max_new_tokens=6, stop_token=STOP, generator=torch.Generator().manual_seed(0)
    )
    for sample in samples:
        assert STOP not in sample.tokens[:-1]
        assert sample.tokens[-1] == STOP or len(sample.tokens) == 6
    assert {int(s.tokens[-1]) == STOP for s in samples} == {True, False}


def test_draws_follow_the_policy(model):
    """20000 first tokens: χ² per degree of freedom of the counts against π is near 1."""
    prompt = torch.tensor([2, 5, 7])
    n = 20_000
    samples = sample_actions(
        model, [prompt] * n, max_new_tokens=1, stop_token=STOP, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        p = model.logits(Sequences([prompt[:-1]], [prompt[-1:]]).hidden(model)).softmax(-1)[0]
    counts = torch.bincount(torch.cat([s.tokens for s in samples]), minlength=37)
    often = p * n > 5
    chi2 = ((counts - p * n) ** 2 / (p * n))[often].sum() / often.sum()
    assert 0.4 < chi2 < 1.9


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(2, 1.0, 2), (0, 0.75, 2), (0, 0.3, 1), (3, 0.85, 2)])
def test_truncation_keeps_the_likeliest(top_k, top_p, kept):
    p = torch.tensor([[0.1, 0.4, 0.05, 0.45]])
    logprobs = Sampling(top_k=top_k, top_p=top_p).logprobs(p.log())
    left = torch.isfinite(logprobs[0]).nonzero().flatten().tolist()
    assert left == sorted(p[0].topk(kept).indices.tolist())
    torch.testing.assert_close(logprobs.exp().sum(), torch.tensor(1.0))


def test_temperature_sharpens():
    p = torch.tensor([[0.25, 0.75]])
    torch.testing.assert_close(Sampling(temperature=0.5).logprobs(p.log()).exp(), torch.tensor([[0.1, 0.9]]))
