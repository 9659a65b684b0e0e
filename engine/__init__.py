"""Roles, decoding, targets, losses, the training loop and its checkpoints."""
