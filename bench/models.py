"""Which model families etpo trains: each as a tiny random model, drawn from, trained and exported.

python -m etpo.bench.models [FAMILY …] [--write docs/models.md]
"""

import argparse
import contextlib
import dataclasses
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from etpo.engine.config import Config
from etpo.engine.learners.etpo_q import EtpoQLearner
from etpo.engine.models.language_model import LanguageModel, gives_own_logits
from etpo.engine.models.roles import FullRoles, LoraRoles
from etpo.engine.models.sampler import sample_actions
from etpo.engine.replay import Action
from etpo.engine.trained import quiet_transformers

VOCABULARY, LIMIT_S, TOLERANCE = 97, 60, 1e-4
# Of these a configuration gets the ones that its class has.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "is_decoder": True,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 64, "n_inner": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "d_ff": 64, "dim_ff": 64, "shared_intermediate_size": 32, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "d_head": 8, "rotary_dim": 8, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256,
    "max_seq_len": 256, "sliding_window": 8, "query_pre_attn_scalar": 8, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "state_size": 8, "mamba_d_state": 8,
    "lru_width": 32, "attention_window_size": 64, "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
# What a family needs beyond that; its own defaults fit large sizes only.
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "falcon": {"alibi": True, "num_kv_heads": 4},
    "xlnet": {"d_inner": 64},
}
TRAINING = Config(
    updates_per_batch=3, minibatch=4, envs=4, rollout_steps=1, max_new_tokens=8, lora_rank=3,
    lr=1e-3, critic_lr=1e-3, max_kl_update=1e3,
)  # fmt: skip


@dataclasses.dataclass
class Row:
    """What was seen of one family; `decoding` is the way that it draws, or why it is not read."""

    family: str
    decoding: str
    full: str = ""
    adapters: str = ""
    export: str = ""


def try_family(family: str) -> Row:
    """Build, draw, train both ways, export and read again; a step that fails says why in its column."""
    try:
        with _time_limit():
            hf = tiny_model(family)
    except Exception as error:
        return Row(family, f"not built: {_why(error)}")
    try:
        with _time_limit():
            model = LanguageModel(hf)
            if not gives_own_logits(model):
                return Row(family, "refused: logits come about otherwise")
    except Exception as error:
        return Row(family, f"refused: {_why(error)}")
    row = Row(family, model.decoding)
    row.full = _attempt(
        lambda: _train(FullRoles(LanguageModel(tiny_model(family)), EtpoQLearner.moves), model)
    )
    exported: list[str] = []

    def adapters() -> str:
        base = LanguageModel(tiny_model(family))
        roles = LoraRoles(base, TRAINING.lora_rank, EtpoQLearner.moves)
        told = _train(roles, model)
        exported.append(_attempt(lambda: _export(roles)))
        return told

    row.adapters = _attempt(adapters)
    row.export = exported[0] if exported else _attempt(
        lambda: _export(FullRoles(LanguageModel(tiny_model(family)), EtpoQLearner.moves))
    )  # fmt: skip
    return row


def tiny_model(family: str) -> Any:
    """A random model of a family, its matrices large enough that a wrong position or mask shows."""
    default = CONFIG_MAPPING[family]()
    known = {
        name: value
        for name, value in SMALL.items()
        if getattr(default, name, None) is not None
        and not isinstance(getattr(type(default), name, None), property)
    }
    special = {name: SMALL[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "is_decoder")}
    config = type(default)(**{**known, **special, **SPECIAL.get(family, {})})
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if sum(p.numel() for p in hf.parameters()) > 20e6:
        raise ValueError("no small sizes known")
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return hf


def _train(roles: FullRoles | LoraRoles, as_opened: LanguageModel) -> str:
    """One update on drawn actions; `yes` where it moved the policy and everything stayed finite."""
    for model in roles.models.values() if isinstance(roles, FullRoles) else [roles.model]:
        model.decoding, model.is_lean = as_opened.decoding, as_opened.is_lean
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (2, 5, 9, 2)]
    with roles.acting("policy") as model:
        samples = sample_actions(model, prompts, max_new_tokens=8, stop_token=2, generator=generator)
    fresh = [
        Action(p, s.tokens, s.logprob_mu, float(i % 2), True, None, i, 0, 0, hidden=s.hidden)
        for i, (p, s) in enumerate(zip(prompts, samples, strict=True))
    ]
    before = {name: p.detach().clone() for name, p in roles.parameters("policy").items()}
    log = EtpoQLearner(roles, TRAINING).update(fresh)
    numbers = [value for value in log.numbers().values() if value is not None]
    if not all(map(math.isfinite, numbers)):
        return "not finite"
    moved = any(not torch.equal(p, before[name]) for name, p in roles.parameters("policy").items())
    return "yes" if moved else "does not move"


@torch.no_grad()
def _export(roles: FullRoles | LoraRoles) -> str:
    """Save the policy as one model, read it again, and compare what both say."""
    tokens = torch.arange(3, 20)[None]
    with roles.acting("policy") as model:
        want = model.hf(input_ids=tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        whole: Any = roles.merged("policy")
        whole.save_pretrained(folder)
        got = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=tokens).logits
        )
    off = _relative(got, want)
    return "yes" if off < TOLERANCE else f"off by {off:.1e}"


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _attempt(step: Callable[[], str]) -> str:
    try:
        with _time_limit():
            return step()
    except Exception as error:
        return f"no: {_why(error)}"


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}".replace("|", "/")


def page(rows: list[Row]) -> str:
    """docs/models.md."""
    read = [row for row in rows if row.full]
    left = [row for row in rows if not row.full]
    both = sum(row.full == row.adapters == "yes" for row in read)
    lines = [
        "# Model families", "",
        f"Made by `python -m etpo.bench.models --write docs/models.md` (torch {torch.__version__}, "
        f"transformers {transformers.__version__}): every causal language model that transformers names, as "
        "a random model of two layers. Each was drawn from with prompts of several lengths, trained by one "
        "update with full weights and with adapters, its policy exported as one model (adapters merged), "
        f"read again by `from_pretrained` and compared (relative error below {TOLERANCE:g}).", "",
        "Drawing is `lean` (etpo's own packed forward), `padded` (transformers' forward and cache), `alike` "
        "(the same, prompts of one length at a time: the family counts positions by the column) or `whole` "
        "(no cache that can be gone on with: every token runs the row again).", "",
        f"{len(read)} families are read; {both} of them train both ways.", "",
        "| family | drawing | full weights | adapters | export |", "|---|---|---|---|---|",
        *(f"| {r.family} | {r.decoding} | {r.full} | {r.adapters} | {r.export} |" for r in read), "",
        "## Not read, or not tried", "",
        "Refused in one line when they are opened, or no small random model could be built here.", "",
        "| family | why |", "|---|---|",
        *(f"| {r.family} | {r.decoding} |" for r in left),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--write", type=Path, help="write the page there")
    options = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(1)
    rows = []
    for family in options.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        began = time.monotonic()
        row = try_family(family)
        rows.append(row)
        print(*dataclasses.astuple(row), f"{time.monotonic() - began:.1f} s", sep=" | ", flush=True)
    if options.write:
        options.write.write_text(page(rows), encoding="utf-8")
    else:
        sys.stdout.write(page(rows))


if __name__ == "__main__":
    main()
