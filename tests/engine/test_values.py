"""V by a regression: right where returns are linear, blind to an action's own return, slowly forgetting."""

import pytest
import torch

from etpo.engine.checkpoint import CheckpointError
from etpo.engine.values import KEPT, Evidence, PrefixValue, sketch


def evidence_of(features: torch.Tensor, target: torch.Tensor, folds: int = 4) -> Evidence:
    return Evidence(features, target, torch.ones(len(target)).double(), torch.arange(len(target)) % folds)


def draw(n: int, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return features, features @ torch.arange(1.0, width + 1).double()


def test_a_linear_return_is_found() -> None:
    features, target = draw(4000)
    value = PrefixValue()
    value.regress(features, torch.ones(len(target)).double(), torch.arange(len(target)) % 4, lambda v: target)
    again = value.regress(features, torch.ones(len(target)).double(), torch.arange(len(target)) % 4,
                          lambda v: target)  # fmt: skip
    assert (again - target).abs().max() < 0.02 * target.abs().max()


def test_an_action_s_own_fold_does_not_decide_its_value() -> None:
    features, target = draw(40)
    value = PrefixValue()
    value.gram, value.moment = torch.eye(5).double(), torch.zeros(5).double()
    known = value.crossed(evidence_of(features, target))
    changed = target.clone()
    changed[0::4] += 100.0
    moved = value.crossed(evidence_of(features, changed))
    assert moved[0::4].equal(known[0::4])
    assert not moved[1::4].equal(known[1::4])


def test_what_was_known_fades() -> None:
    features, target = draw(40)
    value = PrefixValue()
    value.gram, value.moment = torch.zeros(5, 5).double(), torch.zeros(5).double()
    value.learn(evidence_of(features, target))
    first = value.moment.clone()
    value.learn(evidence_of(features, torch.zeros_like(target)))
    torch.testing.assert_close(value.moment, KEPT * first)


def test_bootstrap_states_get_a_value_and_teach_nothing() -> None:
    features, target = draw(44)
    value = PrefixValue()
    seen: list[int] = []
    v = value.regress(
        features, torch.ones(40).double(), torch.arange(40) % 4, lambda v: seen.append(len(v)) or target[:40]
    )
    assert seen == [44]
    assert len(v) == 44
    assert v[40:].abs().max() == 0, "nothing was known when the batch came"
    gram = value.gram.clone()
    torch.testing.assert_close(gram, features[:40].T @ features[:40])


def test_a_sketch_of_wide_states_keeps_their_angles() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 4096, generator=generator, dtype=torch.float64)
    hidden[1] = hidden[0] + 0.1 * hidden[1]
    narrow = sketch(hidden)
    assert narrow.shape == (20, 256)
    cosines = torch.nn.functional.cosine_similarity
    assert abs(cosines(narrow[0], narrow[1], dim=0) - cosines(hidden[0], hidden[1], dim=0)) < 0.05
    assert sketch(hidden[:, :8]).shape == (20, 8)


def test_a_checkpoint_of_another_learner_is_refused() -> None:
    with pytest.raises(CheckpointError, match="etpo-q"):
        PrefixValue().restore({})
