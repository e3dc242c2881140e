"""``python -m vipo`` is the command line."""

from vipo.cli import main

main()
