"""What goes wrong in words: the command line prints each of these as one sentence and ends with its exit code."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: exit code 2."""


class RunFailed(RuntimeError):  # noqa: N818 - it is the run that failed, not the program
    """A run that learned nothing though what it was given is valid: exit code 3."""
