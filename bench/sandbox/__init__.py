"""The sandbox under load and under attack."""
