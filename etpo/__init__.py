"""etpo: entropy-regularised token-level policy optimisation of language models."""

__version__ = "0.1.0"
