"""A configuration made in Python is checked as one from the command line is."""

import pytest

from etpo.engine.config import OPTIONS, Config, resolve, to_toml


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"q_form": "normalized"},
            r"--q-form: expected one of .*; did you mean 'normalised'",
        ),
        ({"algo": "ppo"}, "--algo: expected one of etpo, etpo-q, ppo-kl, rloo, grpo, reflection, got 'ppo'"),
        ({"backup": "Soft"}, "--backup: expected one of expected, soft, got 'Soft'"),
        ({"steps": "500"}, "--steps: expected int, got '500'"),
        ({"steps": True}, "--steps: expected int, got True"),
        ({"seed": 2**63}, "--seed: expected a number ≥ 0 and ≤ 9223372036854775807"),
        ({"beta": float("inf")}, "--beta: expected a finite number > 0, got inf"),
        ({"beta": float("nan")}, "--beta: expected a finite number > 0, got nan"),
    ],
)
def test_a_wrong_value_is_refused_in_python_too(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(**wrong)


def test_an_int_is_welcome_for_a_float() -> None:
    assert repr(Config(beta=1).beta) == "1.0"


def test_a_written_configuration_reads_back(tmp_path) -> None:
    config = resolve({"steps": 7, "gamma": 1}, preset="paper")
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert resolve({}, file) == config
    assert (config.steps, config.gamma, config.q_form) == (7, 1.0, "logits")


def test_an_option_of_the_critic_network_names_the_algorithm_that_has_one() -> None:
    assert resolve({}).algo == "etpo"
    assert resolve({"q_form": "residual"}).algo == "etpo-q"
    assert resolve({"q_form": "residual", "algo": "etpo"}).algo == "etpo"
    assert resolve({"critic_lr": 1.0, "algo": "ppo-kl"}).algo == "ppo-kl"
    assert resolve({"algo": "reflection"}, preset="paper").critic_lr is None
    assert resolve({}, preset="paper").critic_lr == 1e-6


def test_help_of_the_configuration_names_every_option() -> None:
    assert Config.__doc__ is not None
    assert all(f"{name}: {one.option.help}" in Config.__doc__ for name, one in OPTIONS.items())
