"""The environments of a run, as its configuration asks for them."""

import ast
from typing import Any

from etpo.engine.config import Config
from etpo.envs.data_science import DataScience
from etpo.envs.vector import VectorRunner, make_env, takes


def make_environments(config: Config) -> VectorRunner:
    """`config.envs` environments of the configured kind; the data-science ones share one scorer.

    Raises:
        DatasetError: absent or unreadable data.
        ValueError: no such environment.
    """
    if config.env is not None:
        return VectorRunner([make_env(config.env, **settings_for(config)) for _ in range(config.envs)])
    first = DataScience(
        config.dataset,
        config.target,
        config.protocol,
        config.sandbox,
        config.timeout_s,
        config.max_episode_steps,
        reflection=config.reflection,
        audit_share=config.audit_share,
        runner=config.runner,
    )
    others = [
        DataScience(
            scorer=first.scorer, max_episode_steps=config.max_episode_steps, reflection=config.reflection
        )
        for _ in range(config.envs - 1)
    ]
    return VectorRunner([first, *others])


def settings_for(config: Config) -> dict[str, Any]:
    """What `config.env` gets of the configuration: the settings that its constructor names.

    Raises:
        ValueError: `reflection` is off, or `runner` elsewhere, for an environment that has no such parameter.
    """
    assert config.env is not None
    given = dict(map(_argument, config.env_arg.split(","))) if config.env_arg else {}
    names = ("reflection", "max_episode_steps", "timeout_s", "sandbox", "audit_share", "runner")
    settings = {name: getattr(config, name) for name in names if takes(config.env, name)}
    if not config.reflection and "reflection" not in settings:
        raise ValueError(
            f"--no-reflection: expected an environment with a `reflection` parameter, got {config.env}"
        )
    if config.runner != "local" and "runner" not in settings:
        raise ValueError(
            f"--runner {config.runner}: expected an environment with a `runner` parameter, got {config.env}"
        )
    return settings | given


def _argument(text: str) -> tuple[str, Any]:
    """`key=value` as a key and a number, a truth or a text."""
    key, is_one, value = text.partition("=")
    if not is_one or not key.strip().isidentifier():
        raise ValueError(f"--env-arg: expected key=value, got {text!r}")
    try:
        return key.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key.strip(), value
