"""The box that programs run in, as the trainer sees it: `Sandbox`. Imports nothing else of etpo.envs."""

from etpo.envs.sandbox.arrays import SplitArrays
from etpo.envs.sandbox.client import Sandbox, refuse
from etpo.envs.sandbox.modes import SandboxError

__all__ = ["Sandbox", "SandboxError", "SplitArrays", "refuse"]
