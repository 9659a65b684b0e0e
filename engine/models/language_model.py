"""One causal language model, run on packed tokens.

A Llama-family model (Llama, CodeLlama, Mistral, Qwen2, Qwen2.5, Qwen3) runs a lean forward on its own Hugging
Face weights: everything that treats tokens one by one sees only real tokens, packed in one row each, and an
`Attend` callable decides which of them see each other (see `attention.py`). Any other causal LM runs through
transformers' own forward (see `sequences.py`).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging as transformers_logging

from etpo.engine.models.decoders import decoder_of
from etpo.engine.models.places import BUNDLED, ModelError, model_path

# (layer, query [N, H, d], key [N, G, d], value [N, G, d]) -> [N, H, d]; H heads, G key-value heads.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

transformers_logging.disable_progress_bar()

LEAN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NOT_READ = "expected a causal LM whose logits are its last hidden states through one LM head, got"
# What wrappers put into a parameter's name, one inside the other; the first two also around single layers.
WRAPPERS = (
    r"(^|(?<=\.))((_orig_mod|_fsdp_wrapped_module)\.|"
    r"(?<![\w.])(module|pretrained_model|base_model\.model)\.)+"
)
Decoding = Literal["lean", "padded", "alike", "whole"]


class LanguageModel(nn.Module):
    """A Hugging Face causal LM with its body and head apart.

    Args:
        hf: the loaded `…ForCausalLM`; its weights are used in place, never copied.

    Attributes:
        is_lean: True where `forward` (packed) runs; False where only `forward_padded` does.
        decoding: how actions are drawn (see `decoders`): `lean`; `padded`: prompts of several lengths are
            left-padded; `alike`: only prompts of one length share a batch, for a model that counts positions
            by the column; `whole`: without a cache. `gives_own_logits` finds out which.
        hidden_size: width of the last hidden states, as the LM head reads them.
        end_tokens: the tokens with which the model's own configuration ends a text.
        softcap, temperature: of the head, as `etpo.kernels.Stream` wants them.
        context: most positions that the model was made for.
        gain: [D] by which what the final norm gives is multiplied, a role's own; None: by nothing.
    """

    hf: Any
    n_layers: int
    hidden_size: int
    context: int
    decoding: Decoding

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        self.gain: Tensor | None = None
        config = hf.config
        self.is_lean = _is_lean(config)
        self.n_layers = config.num_hidden_layers
        self.decoding = "lean" if self.is_lean else "padded"
        self.hidden_size = self.head_weight.shape[1]
        self.end_tokens = _end_tokens(hf, len(self.head_weight))
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
        weight: Tensor = self.hf.get_output_embeddings().weight
        return weight

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
        return self.scaled(_rms_norm(body.norm, x))

    def scaled(self, hidden: Tensor) -> Tensor:
        """What the final norm gave, times the gain in force."""
        return hidden if self.gain is None else hidden * self.gain.to(hidden.dtype)

    def forward_padded(
        self, tokens_BT: Tensor, is_token_BT: Tensor, cache: object = None
    ) -> tuple[Tensor, object]:
        """Last hidden states [B, T, D] through transformers' own forward, and its cache.

        Args:
            tokens_BT: int64 [B, T]; with a cache, the new tokens only.
            is_token_BT: bool [B, T_past + T], False on padding.
        """
        settings: dict[str, Any] = {"attention_mask": is_token_BT.long()}
        if self.decoding == "padded":  # the others count for themselves, and some of them from another number
            positions = (is_token_BT.long().cumsum(-1) - 1).clamp_min(0)
            settings["position_ids"] = positions[:, -tokens_BT.shape[1] :]
        if self.decoding != "whole":
            settings |= {"past_key_values": cache, "use_cache": not torch.is_grad_enabled()}
        out = self.hf.base_model(input_ids=tokens_BT, **settings)
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
    """A model and its tokenizer by folder, GGUF file, hub name, or a name of `etpo.engine.models.places`.

    Raises:
        ModelError: one line that says what is missing and what to do.
    """
    path = model_path(name)
    source = str(path) if path.is_dir() else name
    if not path.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ModelError(
            f"--model: expected a model folder, a .gguf file, a hub name (owner/name) or {BUNDLED}, got "
            f"'{name}', which is no folder"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"--model {name}: expected a tokenizer (tokenizer.json) beside the weights, got "
                         f"{_first_line(error)}") from error  # fmt: skip
    if not tokenizer.vocab_size or tokenizer.eos_token_id is None:
        raise ModelError(f"--model {name}: expected a tokenizer with an end-of-sequence token, got none "
                         "(is tokenizer.json in the folder?)")  # fmt: skip
    hf = _load_weights(name, source, dtype)
    n_rows = len(hf.get_input_embeddings().weight)
    n_tokens = 1 + max(tokenizer.get_vocab().values())
    if n_tokens > n_rows:
        raise ModelError(f"--model {name}: expected a tokenizer of at most {n_rows} tokens, as the model has "
                         f"so many embeddings, got one of {n_tokens}; take the model's own tokenizer, or "
                         f"make room: model.resize_token_embeddings({n_tokens}) of transformers")  # fmt: skip
    try:
        model = LanguageModel(hf.to(device).eval())
        is_read = gives_own_logits(model)
    except ModelError as error:
        raise ModelError(f"--model {name}: {error}") from error
    except (AttributeError, TypeError) as error:
        family = hf.config.model_type
        raise ModelError(f"--model {name}: {NOT_READ} {family} ({_first_line(error)})") from error
    if not is_read:
        family = hf.config.model_type
        raise ModelError(f"--model {name}: {NOT_READ} {family}, whose logits come about otherwise")
    return model, tokenizer


def _load_weights(name: str, source: str, dtype: torch.dtype) -> Any:
    """The Hugging Face model, each of its parameters from the files; ModelError where one is not in them."""

    def read(**renamed: Any) -> tuple[Any, list[str]]:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **renamed,
        )  # fmt: skip
        hf, info = loaded
        return hf, sorted(info["missing_keys"])

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        hf, missing = read()
        if missing:  # perhaps saved from inside of torch.compile, DDP, FSDP or a model with a value head
            hf, missing = read(key_mapping={WRAPPERS: ""})
    except Exception as error:
        raise ModelError(
            f"--model {name}: expected a causal LM in safetensors form, got {_first_line(error)}"
        ) from error
    if missing:
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ModelError(
            f"--model {name}: expected weights for every parameter of {type(hf).__name__}, got none for "
            f"{len(missing)} of them ({some}); save the whole causal LM under its own names"
        )
    return hf


@torch.no_grad()
def gives_own_logits(model: LanguageModel) -> bool:
    """True where drawing and learning see what the whole model says of prompts of several lengths.

    Sets `model.decoding` to the first way that does, and `is_lean` with it. False for a body with a memory
    that no way carries on, or with more between the last hidden states and the logits than `LanguageModel`
    knows of.

    Raises:
        ModelError: the whole model's own logits are not finite.
    """
    rows = _trial_rows(len(model.head_weight))
    own = [model.hf(input_ids=row[None].to(model.device)).logits[0].float() for row in rows]
    if not all(logits.isfinite().all() for logits in own):
        raise ModelError(
            "expected finite logits, got NaN or infinity: the weights are damaged, or overflow in "
            f"{str(model.head_weight.dtype).removeprefix('torch.')}"
        )
    ways: list[Decoding] = ["lean", "padded", "alike", "whole"]
    failure: Exception | None = None
    for way in ways[0 if model.is_lean else 1 :]:
        model.decoding, model.is_lean = way, way == "lean"
        try:
            if _agrees(model, rows, own):
                return True
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            failure = failure or error
    if isinstance(failure, AttributeError | TypeError):
        raise failure
    return False


def _trial_rows(vocabulary: int) -> list[Tensor]:
    """Texts of three lengths, of tokens that repeat nowhere as far as the vocabulary reaches."""
    tokens = (3 + 7 * torch.arange(18)) % vocabulary
    return [tokens[:3], tokens[3:8], tokens[8:]]


def _agrees(model: LanguageModel, rows: list[Tensor], own: list[Tensor]) -> bool:
    """True where prefill and two steps, and the forward of the update, give the logits `own` [T, V] a row."""
    from etpo.engine.models.sequences import Sequences

    is_float32 = model.head_weight.dtype == torch.float32
    limit = (
        1e-3 if is_float32 else 0.1
    )  # of half precision, cached and whole forwards differ by some per cent
    batches = [[row] for row in rows] if model.decoding == "alike" else [rows]
    ours: list[Tensor] = []
    for batch in batches:
        decoder = decoder_of(model, [row[:-2] for row in batch], 2)
        drawn = [decoder.prefill()]
        drawn += [decoder.step(torch.stack([row[k] for row in batch]).to(model.device)) for k in (-2, -1)]
        ours += model.logits(torch.stack(drawn, dim=1).flatten(0, 1)).unflatten(0, (len(batch), 3))
    learnt = model.logits(Sequences([row[:1] for row in rows], [row[1:] for row in rows]).hidden(model))
    pairs = [(got, want[-3:]) for got, want in zip(ours, own, strict=True)]
    pairs.append((learnt, torch.cat([want[1:] for want in own])))
    if not all((got - want).norm() <= limit * want.norm() for got, want in pairs):
        return False
    if is_float32 or model.is_lean:
        return True
    # One row alone is the very forward of the whole model: what differs now lies behind the hidden states.
    alone = rows[-1][None].to(model.device)
    hidden_BTD, _ = model.forward_padded(alone, torch.ones_like(alone, dtype=torch.bool))
    return bool((model.logits(hidden_BTD[0]) - own[-1]).norm() <= 0.01 * own[-1].norm())


def _end_tokens(hf: Any, vocabulary: int) -> frozenset[int]:
    """What config.json and generation_config.json name as ends of a text, one token or several."""
    ends: set[int] = set()
    for config in (hf.config, getattr(hf, "generation_config", None)):
        named = getattr(config, "eos_token_id", None)
        ends.update(named if isinstance(named, list | tuple) else [named] if isinstance(named, int) else [])
    return frozenset(end for end in ends if 0 <= end < vocabulary)


def _is_lean(config: Any) -> bool:
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
