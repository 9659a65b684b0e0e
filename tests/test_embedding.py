"""The examples of docs/embedding.md: each against the stock computation on full logits, and each runs."""

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import tiny_llama, tiny_qwen2

EXAMPLES = Path(__file__).parents[1] / "examples"
# The models are float64 and their forward is the same; gradients pass their norms, which run in float32.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
FLOAT32 = 1e-6


def load(name: str) -> ModuleType:
    """The module of examples/`name`.py."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(loss, model) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_close(got, want) -> None:
    for one, other in zip(got, want, strict=True):
        assert float((one - other).detach().norm() / other.detach().norm()) < FLOAT32


def stock_logprobs(model, ids):
    log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return log_p.gather(2, ids[:, 1:, None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def test_dpo_gives_the_stock_loss_and_gradient():
    dpo = load("dpo")
    policy, reference = tiny_qwen2(0).double(), tiny_qwen2(1).double()
    is_response = torch.arange(9) >= torch.tensor([[3], [5]])
    pairs = [(torch.randint(37, (2, 9)), is_response) for _ in range(2)]
    loss = dpo.dpo_loss(policy, reference, *pairs, beta=0.3)

    def ratio(ids):
        logps = [(stock_logprobs(m, ids)[0] * is_response[:, 1:]).sum(1) for m in (policy, reference)]
        return logps[0] - logps[1].detach()

    stock = -F.logsigmoid(0.3 * (ratio(pairs[0][0]) - ratio(pairs[1][0]))).mean()
    torch.testing.assert_close(loss, stock, **CLOSE)
    assert_close(gradients(loss, policy), gradients(stock, policy))


@pytest.mark.parametrize("reverse", [False, True])
def test_distillation_gives_the_stock_loss_and_gradient(reverse):
    distillation = load("distillation")
    student, teacher = (tiny_llama(k, hidden_size=size).double() for k, size in enumerate((32, 48)))
    assert teacher.config.hidden_size != student.config.hidden_size
    ids = torch.randint(37, (2, 7))
    loss = distillation.distillation_loss(student, teacher, ids, temperature=1.7, reverse=reverse)
    log_s, log_t = ((m(input_ids=ids).logits / 1.7).log_softmax(-1) for m in (student, teacher))
    log_t = log_t.detach()
    a, b = (log_s, log_t) if reverse else (log_t, log_s)
    stock = 1.7**2 * (a.exp() * (a - b)).sum(-1).mean()
    torch.testing.assert_close(loss, stock, **CLOSE)
    assert_close(gradients(loss, student), gradients(stock, student))


def test_ppo_gives_the_stock_loss_and_gradient():
    ppo = load("ppo")
    policy, reference = tiny_qwen2(0).double(), tiny_qwen2(1).double()
    ids = torch.randint(37, (3, 8))
    is_action = torch.arange(7) >= torch.tensor([[2], [3], [5]])
    stock_logprob, entropy = stock_logprobs(policy, ids)
    old = stock_logprob.detach() + 0.3 * torch.randn(3, 7, dtype=torch.float64)
    advantage = torch.randn(3, 7, dtype=torch.float64)
    loss, kl = ppo.ppo_loss(policy, reference, ids, is_action, old, advantage, kl_coef=0.4, entropy_coef=0.2)
    log_p = policy(input_ids=ids).logits[:, :-1].log_softmax(-1)
    log_r = reference(input_ids=ids).logits[:, :-1].log_softmax(-1).detach()
    stock_kl = (log_p.exp() * (log_p - log_r)).sum(-1)
    ratio = (stock_logprob - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    stock = -(gain - 0.4 * stock_kl + 0.2 * entropy)[is_action].mean()
    torch.testing.assert_close(loss, stock, **CLOSE)
    torch.testing.assert_close(kl, stock_kl[is_action].mean().detach(), **CLOSE)
    assert_close(gradients(loss, policy), gradients(stock, policy))


def test_grpo_method_gives_the_stock_formula_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(GRPOTrainer=object))
    trainer = load("trl_grpo").KernelGRPOTrainer()
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=nullcontext)
    trainer.temperature = 0.7
    model = tiny_llama(0).double()
    ids = torch.randint(37, (3, 8))
    mask = (torch.arange(8) < torch.tensor([[8], [6], [7]])).long()
    logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
        model, ids, mask, 5, batch_size=2, compute_entropy=True
    )
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -6:-1] / 0.7
    log_p, real = logits.log_softmax(-1), mask[:, -5:]
    stock = log_p.gather(2, ids[:, -5:, None])[..., 0] * real
    torch.testing.assert_close(logps, stock, **CLOSE)
    torch.testing.assert_close(entropies, -(log_p.exp() * log_p).sum(-1) * real, **CLOSE)
    assert aux_loss is None
    assert trainer._get_per_token_logps_and_entropies(model, ids, mask, 5)[1] is None
    cotangent = torch.linspace(-1.0, 2.0, 15).view(3, 5)
    both = [gradients((value * cotangent).sum(), model) for value in (logps, stock)]
    assert_close(*both)
    with pytest.raises(ValueError, match="pixel_values"):
        trainer._get_per_token_logps_and_entropies(model, ids, mask, 5, pixel_values=ids)


def test_grpo_trainer_gives_the_stock_numbers_and_gradient(tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    # Some releases of pyarrow do not pickle, which a fingerprint would ask for.
    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", lambda dataset: "two prompts")

    def build(kind):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        config = GRPOConfig(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, temperature=0.7,
            num_generations=2, per_device_train_batch_size=2,
        )  # fmt: skip
        return kind(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        )

    torch.manual_seed(0)
    ids = torch.randint(3, 200, (4, 10))
    mask = (torch.arange(10) < torch.tensor([[10], [8], [9], [10]])).long()
    results = []
    for kind in (GRPOTrainer, load("trl_grpo").KernelGRPOTrainer):
        trainer = build(kind)
        logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, 6, batch_size=2, compute_entropy=True
        )
        assert aux_loss is None
        cotangent = torch.linspace(-1.0, 2.0, 24).view(4, 6) * mask[:, -6:]
        results.append((logps, entropies, *gradients((logps * cotangent).sum(), trainer.model)))
    assert results[0][0].shape == (4, 6)
    assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["dpo", "distillation", "ppo"])
def test_each_example_runs_and_learns(name, capsys):
    load(name).main()
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[4 if name == "ppo" else 3]) for line in (lines[0], lines[-1]))
    assert last > first + 0.1 if name == "ppo" else last < 0.8 * first
