"""One causal language model, run on packed tokens.

A Llama-family model (Llama, CodeLlama, Mistral, Qwen2, Qwen2.5, Qwen3) runs a lean forward on its own Hugging
Face weights: everything that treats tokens one by one sees only real tokens, packed in one row each, and an
`Attend` callable decides which of them see each other (see `attention.py`). Any other causal LM runs through
transformers' own forward (see `sequences.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging as transformers_logging

from etpo import EtpoError

# (layer, query [N, H, d], key [N, G, d], value [N, G, d]) -> [N, H, d]; H heads, G key-value heads.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

transformers_logging.disable_progress_bar()

BUNDLED = "etpo-nano"
LEAN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NOT_READ = "expected a causal LM with a key-value cache and one LM head, got"


class ModelError(EtpoError):
    """A model folder that is absent, incomplete or unreadable."""


class LanguageModel(nn.Module):
    """A Hugging Face causal LM with its body and head apart.

    Args:
        hf: the loaded `…ForCausalLM`; its weights are used in place, never copied.

    Attributes:
        is_lean: True where `forward` (packed) runs; False where only `forward_padded` does.
        softcap, temperature: of the head, as `etpo.kernels.Stream` wants them.
        context: most positions that the model was made for.
    """

    hf: Any
    n_layers: int
    hidden_size: int
    context: int

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        config = hf.config
        self.is_lean = _is_lean(config)
        self.n_layers = config.num_hidden_layers
        self.hidden_size = config.hidden_size
        self.context = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits by `logit_scale`, Granite divides them by `logits_scaling`.
        scale = getattr(config, "logit_scale", None) or 1.0
        self.temperature = (getattr(config, "logits_scaling", None) or 1.0) / scale
        if self.is_lean:
            self.head_dim = (
                getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            )
            self.rotary = LlamaRotaryEmbedding(config)

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def head_weight(self) -> Tensor:
        """The LM head [V, D]; the embedding itself where the two are tied."""
        return self.hf.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        return getattr(self.hf.get_output_embeddings(), "bias", None)

    def forward(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        """Last hidden states of packed tokens, after the final norm.

        Args:
            tokens_N: int64 [N].
            positions_N: int64 [N], each token's position in its own sequence.
            attend: attention among the packed tokens.

        Returns:
            [N, D] in the model's dtype.
        """
        body = self.hf.model
        x = F.embedding(tokens_N, body.embed_tokens.weight)
        cos, sin = self.rotary(x[None], positions_N[None])
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
        for index, layer in enumerate(body.layers):
            attn = layer.self_attn
            h = _rms_norm(layer.input_layernorm, x)
            q = attn.q_proj(h).unflatten(-1, (-1, self.head_dim))
            k = attn.k_proj(h).unflatten(-1, (-1, self.head_dim))
            v = attn.v_proj(h).unflatten(-1, (-1, self.head_dim))
            if hasattr(attn, "q_norm"):
                q, k = _rms_norm(attn.q_norm, q), _rms_norm(attn.k_norm, k)
            out = attend(index, _rotate(q, cos, sin), _rotate(k, cos, sin), v)
            x = x + attn.o_proj(out.flatten(-2))
            h = _rms_norm(layer.post_attention_layernorm, x)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
        return _rms_norm(body.norm, x)

    def forward_padded(self, tokens_BT: Tensor, is_token_BT: Tensor, cache=None) -> tuple[Tensor, object]:
        """Last hidden states [B, T, D] through transformers' own forward, and its cache.

        Args:
            tokens_BT: int64 [B, T]; with a cache, the new tokens only.
            is_token_BT: bool [B, T_past + T], False on padding.
        """
        positions = (is_token_BT.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens_BT.shape[1] :]
        body = self.hf.base_model
        out = body(
            input_ids=tokens_BT,
            attention_mask=is_token_BT.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=not torch.is_grad_enabled(),
        )
        return out.last_hidden_state, getattr(out, "past_key_values", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits of hidden states [N, D], for sampling."""
        z = F.linear(hidden, self.head_weight, self.head_bias).float()
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature


def load_language_model(
    name: str, dtype: torch.dtype, device: str
) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer by folder, by hub name, or the bundled `etpo-nano`.

    Raises:
        ModelError: one line that says what is missing and what to do.
    """
    path = bundled_path() if name == BUNDLED else Path(name).expanduser()
    source = str(path) if path.is_dir() else name
    if not path.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ModelError(
            f"--model: expected a model folder, a hub name (owner/name) or {BUNDLED}, got '{name}', "
            "which is no folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"--model {name}: expected a tokenizer (tokenizer.json) beside the weights, got "
                         f"{_first_line(error)}") from error  # fmt: skip
    if not tokenizer.vocab_size or tokenizer.eos_token_id is None:
        raise ModelError(f"--model {name}: expected a tokenizer with an end-of-sequence token, got none "
                         "(is tokenizer.json in the folder?)")  # fmt: skip
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        hf: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        raise ModelError(
            f"--model {name}: expected a causal LM in safetensors form, got {_first_line(error)}"
        ) from error
    try:
        model = LanguageModel(hf.to(device).eval())
        is_read = model.is_lean or gives_own_logits(model)
    except (AttributeError, TypeError) as error:
        raise ModelError(f"--model {name}: {NOT_READ} {config.model_type} ({_first_line(error)})") from error
    if not is_read:
        raise ModelError(f"--model {name}: {NOT_READ} {config.model_type}, whose logits come about otherwise")
    return model, tokenizer


@torch.no_grad()
def gives_own_logits(model: LanguageModel) -> bool:
    """True where `forward_padded`, its cache and `logits` give what the whole model says of a fourth token.

    False for a body with another kind of memory than a key-value cache, or with more between the last hidden
    states and the logits than `LanguageModel` knows of. Wrong logits differ by about their own size; cached
    and whole forwards, also in bfloat16, by a few per cent of it at most.
    """
    tokens_BT = (torch.arange(4, device=model.device) % len(model.head_weight))[None]
    is_token_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    theirs = model.hf(input_ids=tokens_BT).logits[0, -1].float()
    _, cache = model.forward_padded(tokens_BT[:, :3], is_token_BT[:, :3])
    hidden_BTD, _ = model.forward_padded(tokens_BT[:, 3:], is_token_BT, cache)
    ours = model.logits(hidden_BTD[:, -1])[0]
    return bool((ours - theirs).norm() <= 0.1 * theirs.norm())


def bundled_path() -> Path:
    """The folder of etpo-nano inside the package."""
    return Path(__file__).parents[1] / "nano"


def _is_lean(config) -> bool:
    if config.model_type not in LEAN_FAMILIES or getattr(config, "hidden_act", "silu") != "silu":
        return False
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return not slides


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(x_NHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_NHd.chunk(2, dim=-1)
    return x_NHd * cos + torch.cat((-second, first), dim=-1) * sin


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
