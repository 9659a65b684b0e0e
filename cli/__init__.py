"""The `etpo` command."""
