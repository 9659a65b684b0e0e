"""`python -m etpo.cli` is `etpo`."""

from etpo.cli.main import main

main()
