"""Drawing texts behind states, for who wants the programs and not what training keeps of them."""

from collections.abc import Sequence

import torch

from etpo.engine.models.language_model import LanguageModel
from etpo.engine.models.prompt_form import PromptForm, encoded
from etpo.engine.models.sampler import Sampling, sample_actions

ROWS = 32  # programs drawn at once: bounds the memory of the key-value cache


def draw_texts(
    model: LanguageModel,
    form: PromptForm,
    states: Sequence[str],
    generator: torch.Generator,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    rows: int = ROWS,
) -> list[str]:
    """One action in each state; a state's oldest tokens are cut where the context leaves no room.

    Args:
        form: how a state is put to the model.
        generator: on the model's device; draws follow one another, so that `rows` decides which is which.
        rows: states at a time.
    """
    texts: list[str] = []
    for start in range(0, len(states), rows):
        part = states[start : start + rows]
        known = {state: torch.tensor(encoded(form, state, model.context - max_new_tokens)) for state in part}
        samples = sample_actions(
            model, [known[state] for state in part], max_new_tokens=max_new_tokens,
            stop_token=form.stop_tokens, generator=generator, sampling=Sampling(temperature),
        )  # fmt: skip
        texts += [form.decode(state, sample.tokens) for state, sample in zip(part, samples, strict=True)]
    return texts
