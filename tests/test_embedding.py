"""The examples of docs/embedding.md: each against the stock computation on full logits, and each runs."""

import importlib
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from etpo.kernels import linear_logprob
from etpo.kernels.causal_lm import head_of, parts_of_head, stream_of
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


@pytest.mark.parametrize("adapters", [False, True])
def test_grpo_trainer_gives_the_stock_numbers_and_gradient(adapters, tiny_folder, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed")
    if adapters:
        peft = pytest.importorskip("peft", reason="peft is not installed")
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
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
            if adapters
            else None,
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
        weights = [p for p in trainer.model.parameters() if p.requires_grad]
        found = torch.autograd.grad((logps * cotangent).sum(), weights)
        results.append((logps, entropies, *(g for g in found if adapters is False or g.abs().sum() > 0)))
    assert results[0][0].shape == (4, 6)
    assert_close(results[1], results[0])


def ppo_of_trainers(log_prob, old, advantage, mask):
    """The clipped loss of both trainers, mean over the tokens of the mask."""
    ratio = (log_prob - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return -(gain * mask).sum() / mask.sum()


def stand_in_for_verl():
    """verl 0.9: the names and arguments of the functions that the example calls; the formulas are theirs."""

    def compute_policy_loss_vanilla(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        return ppo_of_trainers(log_prob, old_log_prob, advantages, response_mask), {}

    def agg_loss(
        loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None,
        loss_scale_factor=None,
    ):  # fmt: skip
        return (loss_mat * loss_mask).sum() / loss_mask.sum()

    module = ModuleType("verl.trainer.ppo.core_algos")
    module.compute_policy_loss_vanilla, module.agg_loss = compute_policy_loss_vanilla, agg_loss
    return module


def stand_in_for_openrlhf():
    """OpenRLHF 0.11: `PolicyLoss` with its arguments, and its five results."""

    class PolicyLoss(torch.nn.Module):
        def __init__(self, clip_eps_low=0.2, clip_eps_high=0.2):
            super().__init__()

        def forward(
            self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
            batch_num_tokens=None, global_batch_size=None,
        ):  # fmt: skip
            return ppo_of_trainers(log_probs, old_log_probs, advantages, action_mask), *[torch.zeros(())] * 4

    module = ModuleType("openrlhf.models")
    module.PolicyLoss = PolicyLoss
    return module


def put_in(monkeypatch, name: str, module: ModuleType) -> ModuleType:
    """The module under its name; where the real one is installed and can be imported, that one."""
    try:
        return importlib.import_module(name)
    except Exception:
        parents = name.split(".")[:-1]
        for end in range(1, len(parents) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parents[:end]), ModuleType(".".join(parents[:end])))
        monkeypatch.setitem(sys.modules, name, module)
        return module


@pytest.mark.parametrize("trainer", ["verl", "openrlhf"])
def test_losses_of_other_trainers_are_fed_by_the_kernels(trainer, monkeypatch):
    """The loss and its gradient are those of the same function fed from full logits."""
    policy, reference = tiny_qwen2(0).double(), tiny_qwen2(1).double()
    ids = torch.randint(37, (3, 9))
    attention = torch.ones_like(ids)
    mask = (torch.arange(5) < torch.tensor([[5], [3], [4]])).double()
    log_p, log_r = (
        m(input_ids=ids, attention_mask=attention).logits[:, -6:-1].log_softmax(-1)
        for m in (policy, reference)
    )
    log_prob = log_p.gather(2, ids[:, -5:, None])[..., 0]
    old = log_prob.detach() + 0.2 * torch.randn(3, 5, dtype=torch.float64)
    advantage = torch.randn(3, 5, dtype=torch.float64)
    kl = ((log_p.exp() * (log_p - log_r.detach())).sum(-1) * mask).sum() / mask.sum()
    if trainer == "verl":
        put_in(monkeypatch, "verl.trainer.ppo.core_algos", stand_in_for_verl())
        config = SimpleNamespace(
            loss_agg_mode="token-mean", kl_loss_coef=0.3, clip_ratio=0.2, clip_ratio_low=0.2,
            clip_ratio_high=0.2, global_batch_info={}, get=lambda name, default=None: default,
        )  # fmt: skip
        batch = {
            "input_ids": ids, "attention_mask": attention, "responses": ids[:, -5:], "response_mask": mask,
            "old_log_probs": old, "advantages": advantage,
        }  # fmt: skip
        loss, metrics = load("verl_loss").actor_loss(policy, reference, batch, config)
        assert metrics["actor/exact_kl"] == pytest.approx(kl.item())
    else:
        module = put_in(monkeypatch, "openrlhf.models", stand_in_for_openrlhf())
        loss = load("openrlhf_loss").actor_loss(
            policy, reference, module.PolicyLoss(), ids, attention, mask, old, advantage, kl_coef=0.3
        )
    stock = ppo_of_trainers(log_prob, old, advantage, mask) + 0.3 * kl
    torch.testing.assert_close(loss, stock, **CLOSE)
    assert_close(gradients(loss, policy), gradients(stock, policy))


def test_a_head_with_a_factor_and_a_head_that_is_none():
    model = tiny_llama(0).double()
    ids = torch.randint(37, (2, 6))
    stream = stream_of(model, input_ids=ids, temperature=0.5)
    assert head_of(stream)["temperature"] == 0.5
    model.config.logits_scaling = 4.0
    assert stream_of(model, input_ids=ids).temperature == 4.0
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="got both"):
        stream_of(model, input_ids=ids)
    with pytest.raises(ValueError, match="expected a linear head"):
        parts_of_head(torch.nn.Identity())


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_adapters_of_peft_are_in_force_and_can_be_off(target):
    """As TRL uses them: on for the policy, off for the reference; on the head too."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_qwen2(0).double(), config).eval()
    ids = torch.randint(37, (2, 7))

    def ours():
        stream = stream_of(model, input_ids=ids)
        return linear_logprob(stream.hidden[:, :-1], stream.weight, ids[:, 1:], **head_of(stream))[0]

    on, stock = ours(), stock_logprobs(model, ids)[0]
    torch.testing.assert_close(on, stock, **CLOSE)
    weights = [p for p in model.parameters() if p.requires_grad]
    both = [torch.autograd.grad(x.square().sum(), weights) for x in (on, stock)]
    assert_close(*both)
    with model.disable_adapter():
        torch.testing.assert_close(ours(), stock_logprobs(model, ids)[0], **CLOSE)
        assert not torch.allclose(ours(), on)


@pytest.mark.parametrize("name", ["dpo", "distillation", "ppo"])
def test_each_example_runs_and_learns(name, capsys):
    load(name).main()
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[4 if name == "ppo" else 3]) for line in (lines[0], lines[-1]))
    assert last > first + 0.1 if name == "ppo" else last < 0.8 * first
