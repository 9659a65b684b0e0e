"""Timing protocol, measured tables and experiments."""
