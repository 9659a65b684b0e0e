"""Program repair: a faulty function, hidden tests, and the share that passes as the reward."""

from etpo.envs.program_repair.env import ProgramRepair

__all__ = ["ProgramRepair"]
