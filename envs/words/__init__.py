"""Small word games with exact solutions: a token MDP, a grid world. Imports nothing else of etpo.envs."""
