"""A Hugging Face causal language model as a `Stream`: its last hidden states and its head, without logits.

    policy = stream_of(model, input_ids=ids)
    logprob, entropy = linear_logprob(policy.hidden[:, :-1], policy.weight, ids[:, 1:], **head_of(policy))

Imports torch alone; models are known by what they offer, adapters of PEFT too.
"""

from typing import Any

from torch import Tensor, nn

from etpo.kernels.streams import Lora, Stream


def stream_of(model: nn.Module, *, temperature: float = 1.0, **inputs: Any) -> Stream:
    """Run the model up to its head.

    Args:
        model: a causal LM of transformers, or one with adapters of PEFT, on this process alone.
        temperature: divides the logits, as in sampling.
        inputs: of the model: `input_ids`, `attention_mask`, …

    Returns:
        hidden [B, T, D] with gradient, the head, its factor and softcap where the model has them.

    Raises:
        ValueError: no linear head, or more than one adapter on it.
    """
    causal_lm = unwrapped(model)
    backbone = getattr(causal_lm, causal_lm.base_model_prefix, None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"model: expected a causal language model with a backbone, got {type(model).__name__}"
        )
    hidden = backbone(**{"use_cache": False} | inputs).last_hidden_state
    weight, bias, lora = parts_of_head(causal_lm.get_output_embeddings())
    config = causal_lm.config
    # A factor on the logits is a temperature turned over: Granite divides, Cohere multiplies.
    divisor = getattr(config, "logits_scaling", None) or 1.0 / (getattr(config, "logit_scale", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None and divisor != 1.0:
        raise ValueError("model: expected a factor on the logits or a softcap, got both")
    return Stream(hidden, weight, bias, lora, temperature * divisor, softcap)


def head_of(stream: Stream) -> dict[str, Any]:
    """What a head has besides its weight, as keyword arguments of `linear_logprob`."""
    return {name: getattr(stream, name) for name in ("bias", "lora", "temperature", "softcap")}


def heads_of(first: Stream, second: Stream) -> dict[str, Any]:
    """What two heads have besides their weights, as keyword arguments of `linear_kl`.

    Raises:
        ValueError: they differ in temperature or softcap, which `linear_kl` takes once.
    """
    if (first.temperature, first.softcap) != (second.temperature, second.softcap):
        raise ValueError("expected two heads of one temperature and one softcap; take vocab_stats for others")
    return {
        "bias": first.bias, "ref_bias": second.bias, "lora": first.lora, "ref_lora": second.lora,
        "temperature": first.temperature, "softcap": first.softcap,
    }  # fmt: skip


def unwrapped(model: nn.Module) -> Any:
    """The causal LM inside of PEFT's wrapper; its layers still have their adapters."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def parts_of_head(head: nn.Module | None) -> tuple[Tensor, Tensor | None, Lora | None]:
    """(weight [V, D], bias [V] or None, adapter in force or None) of an output layer.

    Raises:
        ValueError: it is no linear layer, or has several adapters in force.
    """
    base: Any = getattr(head, "base_layer", head)
    if base is None or getattr(base, "weight", None) is None or base.weight.dim() != 2:
        raise ValueError(f"model: expected a linear head, got {type(head).__name__}")
    layer: Any = head
    active = [] if base is head or layer.disable_adapters or layer.merged else list(layer.active_adapters)
    active = [name for name in active if name in layer.lora_A]
    if len(active) > 1:
        raise ValueError(f"model: expected one adapter on the head, got {active}")
    lora = None
    if active:
        (name,) = active
        lora = layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
    return base.weight, getattr(base, "bias", None), lora
