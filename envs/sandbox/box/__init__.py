"""Inside the box: the warm server and its forks. Imports nothing of etpo but itself; `start.py` runs it."""
