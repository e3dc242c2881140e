"""The command line: a file per group of commands, each of them parses and calls. ``vipo --help`` is the map of it.

Importing this package costs no torch; a command imports what it works with once it is called.
"""

from vipo.cli.commands import app, main

__all__ = ["app", "main"]
