"""Environments: data science and program repair with a sandbox, and small MDPs with exact solutions."""

from gymnasium.envs.registration import register

for _name, _entry_point in (
    ("DataScience", "etpo.envs.data_science:DataScience"),
    ("ProgramRepair", "etpo.envs.program_repair:ProgramRepair"),
    ("TokenMDP", "etpo.envs.words.token_mdp:TokenMDP"),
    ("GridWorld", "etpo.envs.words.grid:GridWorld"),
):
    register(id=f"etpo/{_name}-v0", entry_point=_entry_point)
