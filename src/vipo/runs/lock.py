"""One writer per folder: a lock that the system takes back when its process dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO
from weakref import WeakValueDictionary

from vipo.errors import UserError

NAME = ".lock"
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks

_held: WeakValueDictionary[Path, FolderLock] = WeakValueDictionary()  # of this process


@dataclass(eq=False)
class FolderLock:
    """``root`` belongs to its holder until :meth:`release`, or until the process ends.

    Within one process the latest to ask holds it: whoever abandoned a run must not be locked out by it. The earlier
    holder learns of it by :meth:`check`.
    """

    root: Path
    works: bool = True  # False where the file system has no locks
    _file: TextIO | None = None
    _made: list[Path] = field(default_factory=list)  # folders that were not there before, deepest first

    def take(self, *, make: bool = True) -> None:
        """Hold the folder; with ``make`` one that is missing is made.

        Raises:
            UserError: another process holds it, it is missing, or something that is not a folder is in the way.
        """
        if self._file is not None:
            return
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{str(self.root)!r} is a file, not a folder; choose another --output")
        if not make and not self.root.exists():
            raise UserError(
                f"cannot resume {str(self.root)!r}: there is no such folder; leave out --resume to start there, or give"
                " a run's folder as --output"
            )
        earlier = _held.pop(self.root.resolve(), None)
        if earlier is not None:
            earlier._close()
        self._make_folder()
        try:
            self._file = self._locked()
        except BaseException:
            self._remove_what_was_made()
            raise
        _held[self.root.resolve()] = self

    def check(self) -> None:
        """Raises:
        UserError: a later one of this process holds the folder now, or it was released.
        """
        if self._file is None:
            raise UserError(
                f"{str(self.root)!r} was taken over by a later run of this process; this one must not go on"
            )

    def release(self) -> None:
        """Let go; the lock file and folders that were made for it and are still empty are removed."""
        if self._file is None:
            return
        with suppress(OSError):
            (self.root / NAME).unlink()
        self._close()
        self._remove_what_was_made()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _make_folder(self) -> None:
        self._made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        self.root.mkdir(parents=True, exist_ok=True)

    def _remove_what_was_made(self) -> None:
        with suppress(OSError):  # not empty any more: it is a run's now
            for folder in self._made:
                folder.rmdir()

    def _locked(self) -> TextIO:
        """The open and locked file, with who holds it written inside."""
        path = self.root / NAME
        while True:
            file = path.open("a+", encoding="utf-8")
            try:
                self.works = _lock(file)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise UserError(
                    f"{str(self.root)!r} is in use by {holder}; wait for it or stop it, or choose another --output"
                ) from None
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # whoever held it removed it in between
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        return file


def _lock(file: TextIO) -> bool:
    """Lock an open file; False if its file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise
        return False
    return True
