"""A trained run as people use it from Python: loaded, drawn from, exported."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import etpo
from etpo.engine.checkpoint import CheckpointError
from etpo.engine.config import Config
from etpo.engine.drawing import ROWS
from etpo.engine.models.language_model import LanguageModel
from etpo.engine.models.open import open_model
from etpo.engine.models.roles import LoraRoles
from etpo.engine.run_folder import RunFolderError
from etpo.engine.trained import Trained, draw, first_state

IDS = torch.arange(5, 15)[None]


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, tmp_path_factory, tiny_folder: Path) -> Path:
    """A run of two updates."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    config = etpo.Config(
        env="etpo/GridWorld-v0", model=str(tiny_folder), steps=32, max_new_tokens=4, threads=1, lr=1e-2,
        max_kl_update=1.0, roles=request.param,
    )  # fmt: skip
    outcome = etpo.train(config, out)
    assert outcome.step == 32
    assert (out / "report.html").is_file()
    return out


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


def test_load_gives_the_policy_and_its_reference(run: Path, tiny_folder: Path) -> None:
    trained = etpo.load(run)
    start = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert trained.step == 32
    assert (logits(trained.model) - logits(start)).abs().max() > 1e-3
    with trained.roles.acting("reference") as reference:
        torch.testing.assert_close(logits(reference.hf), logits(start), rtol=0, atol=0)
    assert (logits(trained.model) - logits(start)).abs().max() > 1e-3


def test_sample_is_decided_by_its_seed_and_its_role(run: Path, tiny_folder: Path) -> None:
    trained = etpo.load(run)
    texts = trained.sample("row 0", ROWS + 3, seed=1)
    assert len(texts) == ROWS + 3
    assert etpo.load(run).sample("row 0", ROWS + 3, seed=1) == texts
    assert trained.sample("row 0", ROWS + 3, seed=2) != texts
    before = trained.sample("row 0", 4, seed=1, role="reference")
    start = LanguageModel(AutoModelForCausalLM.from_pretrained(tiny_folder).eval())
    assert before == draw(start, trained.tokenizer, "row 0", 4, seed=1, temperature=1.0, max_new_tokens=4)


def test_without_a_prompt_the_run_s_first_state_is_put(run: Path) -> None:
    trained = etpo.load(run)
    prompt, _ = first_state(trained.config)
    assert trained.sample(n=3) == trained.sample(prompt, 3)
    assert trained.sample(n=3) != trained.sample(prompt + "?", 3)


def test_cold_draws_are_all_the_likeliest(run: Path) -> None:
    assert len(set(etpo.load(run).sample("row 0", 8, temperature=1e-4))) == 1


@pytest.mark.parametrize("wrong", [{"n": 0}, {"temperature": 0.0}, {"role": "critic"}])
def test_sample_refuses_what_it_cannot_do(run: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        etpo.load(run).sample(**({"prompt": "row 0", "n": 1} | wrong))


def test_a_prompt_longer_than_the_context_is_cut_at_its_start(run: Path) -> None:
    trained = etpo.load(run)
    tail = "x" * (128 - 4)
    assert trained.sample("y" * 500 + tail, 2, seed=3) == trained.sample("z" * 500 + tail, 2, seed=3)


def test_a_merged_export_is_the_policy(run: Path, tmp_path: Path) -> None:
    policy = logits(etpo.load(run).model)
    etpo.load(run).export(tmp_path / "m", merge=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    # Merging adds the adapter to the weights, which rounds: a few float32 roundings of logits of this size.
    bound = 64 * torch.finfo(torch.float32).eps * policy.abs().max().item()
    torch.testing.assert_close(logits(exported), policy, rtol=0, atol=bound)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("row 0")["input_ids"][0] == 0


def test_an_adapter_export_has_peft_s_files_and_its_base(
    run: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    trained = etpo.load(run)
    if trained.roles.form == "full":
        pytest.skip("full weights have no adapter")
    trained.export(tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    assert str(tiny_folder) in (tmp_path / "a" / "adapter_config.json").read_text()
    with pytest.raises(ValueError, match="no adapter"):
        trained.export(tmp_path / "b", "reference")


def test_peft_loads_the_adapter(run: Path, tmp_path: Path, tiny_folder: Path) -> None:
    peft = pytest.importorskip("peft")
    trained = etpo.load(run)
    if trained.roles.form == "full":
        pytest.skip("full weights have no adapter")
    trained.export(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "a")
    torch.testing.assert_close(logits(loaded.eval()), logits(trained.model))


@pytest.mark.parametrize(("form", "dtype"), [("full", torch.float32), ("lora", torch.bfloat16)])
def test_weights_that_are_trained_themselves_are_float32_also_on_a_gpu(monkeypatch, form, dtype) -> None:
    monkeypatch.setattr("etpo.engine.models.open.torch_dtype", lambda config: torch.bfloat16)
    model, _ = open_model(Config(roles=form), "etpo-nano")
    assert model.head_weight.dtype == dtype


def test_adapters_need_linear_layers() -> None:
    model = LanguageModel(GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=32, n_layer=1, n_head=4)))
    with pytest.raises(ValueError, match="expected full for GPT2LMHeadModel"):
        LoraRoles(model, rank=4)


def test_resume_from_python_goes_on(run: Path) -> None:
    trained = etpo.load(run)
    assert isinstance(trained, Trained)
    outcome = etpo.train(trained.config, run, resume=True)
    assert outcome.step == 32  # nothing was left to do


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such folder"):
        etpo.load(tmp_path / "absent")
    with pytest.raises(RunFolderError, match="a folder without one"):
        etpo.load(tmp_path)
    (tmp_path / "config.toml").write_text("steps = 3\n")
    with pytest.raises(CheckpointError, match="none was saved yet"):
        etpo.load(tmp_path)


def test_the_first_state_is_the_environment_s_own(sandbox_free_prompt: str) -> None:
    assert first_state(Config(dataset="wine"))[0] == sandbox_free_prompt
    assert first_state(Config(env="etpo/GridWorld-v0"))[0].startswith("row ")


@pytest.fixture
def sandbox_free_prompt() -> str:
    """The prompt that a data-science environment shows first; its scorer is never asked."""
    from types import SimpleNamespace

    from etpo.envs.data_science import DataScience
    from etpo.envs.datasets import load_dataset

    scorer: object = SimpleNamespace(dataset=load_dataset("wine"))
    return DataScience(scorer=scorer).reset()[0]  # type: ignore[arg-type]


def test_score_runs_one_program() -> None:
    score = etpo.score("return None\n", "wine")
    assert score.reward == -1.0
    assert score.outcome != "ok"


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="trian"):
        _ = etpo.trian  # type: ignore[attr-defined]
