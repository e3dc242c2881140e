"""One writer per folder: who holds it is named, and the dead hold nothing."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vipo.errors import UserError
from vipo.runs import lock
from vipo.runs.lock import FolderLock

HOLDER = """
import sys, time
from pathlib import Path
from vipo.runs.lock import FolderLock
held = FolderLock(Path(sys.argv[1]))
held.take()
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The folder is another process's until it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_another_process_is_named_and_nothing_changes_until_it_dies(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held_elsewhere(folder) as holder:
        before = (folder / lock.NAME).read_bytes()
        with pytest.raises(UserError, match=rf"'.*run' is in use by process {holder.pid} on .*--output"):
            FolderLock(folder).take()
        assert (folder / lock.NAME).read_bytes() == before and f"process {holder.pid} " in before.decode()
        holder.kill()
        holder.wait()
        ours = FolderLock(folder)
        ours.take()
        ours.check()


def test_a_lock_that_is_let_go_leaves_nothing_but_what_was_put_there(tmp_path: Path) -> None:
    ours = FolderLock(tmp_path / "deep" / "run")
    ours.take()
    assert (tmp_path / "deep" / "run" / lock.NAME).is_file()
    ours.release()
    assert not list(tmp_path.iterdir())
    ours.take()
    (tmp_path / "deep" / "run" / "recipe.yaml").write_text("")
    ours.release()
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["recipe.yaml"]


def test_in_one_process_the_latest_holds_it_and_the_earlier_learns_of_it(tmp_path: Path) -> None:
    abandoned, ours = FolderLock(tmp_path), FolderLock(tmp_path)
    abandoned.take()
    ours.take()
    with pytest.raises(UserError, match="taken over by a later run"):
        abandoned.check()
    abandoned.release()  # has nothing to let go
    ours.check()
    assert (tmp_path / lock.NAME).is_file()


def test_a_forgotten_lock_holds_nobody_up(tmp_path: Path) -> None:
    FolderLock(tmp_path).take()
    gc.collect()
    FolderLock(tmp_path).take()


def test_a_file_system_without_locks_is_said_and_other_errors_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, "no")

        monkeypatch.setattr(lock.fcntl, "flock", flock)

    failing(errno.ENOLCK)
    ours = FolderLock(tmp_path / "a")
    ours.take()
    assert not ours.works
    failing(errno.EIO)
    with pytest.raises(OSError, match="no"):
        FolderLock(tmp_path / "b").take()
