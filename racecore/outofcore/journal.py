"""The journal of a run: its identity and a line for every task whose results are written, so that
it can be resumed.

Every line is a JSON object after its CRC-32. The first line identifies the run: version,
parameters, inputs. Each further line gives the number of a task, the checksums of the rows it
wrote, and that of the state after it. The last line says that everything is on the disk. A torn or
damaged line counts as not written, and so does one whose rows are not in the files: journal and
outputs may reach the disk in any order.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from typing import Any, NamedTuple

from racecore.errors import CorruptFileError
from racecore.outofcore import crash_points
from racecore.outofcore.locked_file import open_locked

__all__ = ["Entry", "Journal"]

_VERSION = 1
_START_AFRESH = (
    "to discard what it did and start afresh, use resume=False (racecore attend --restart)"
)


class Entry(NamedTuple):
    """The checksums of a task that is done.

    Attributes
    ----------
    rows : dict of str to int
        By the name of the array it wrote.
    state : int or None
        Of the state after it; None where it updates none.
    """

    rows: dict[str, int]
    state: int | None


class Journal:
    """An open journal, locked against other runs.

    Parameters
    ----------
    path : str
        A new file, or the journal of an interrupted run.
    afresh : bool
        Discard the contents of the file.

    Attributes
    ----------
    identity : dict or None
        From the first line; None where the file is new.
    entries : dict of int to Entry
        By the number of the task.
    completion : dict or None
        From the last line, None where there is none.
    n_damaged : int
        Lines that do not match their checksums.

    Raises
    ------
    racecore.errors.OutputInUseError
        Another run has it open.
    racecore.errors.CorruptFileError
        The file is no journal, or its first line is damaged.
    """

    def __init__(self, path: str, afresh: bool = False) -> None:
        self.path = path
        self.identity: dict[str, Any] | None = None
        self.entries: dict[int, Entry] = {}
        self.completion: dict[str, Any] | None = None
        self.n_damaged = 0
        # Bytes up to the end of the last whole line.
        self._length = 0
        self._file = open_locked(path)
        try:
            # After the lock is taken: another run may be writing the file.
            if afresh:
                os.ftruncate(self._file, 0)
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def begin(self, identity: dict[str, Any]) -> None:
        """Discard the contents and write the first line."""
        os.ftruncate(self._file, 0)
        self._length = 0
        self.entries = {}
        self.completion = None
        self.identity = identity
        self._append({"racecore journal": _VERSION, "run": identity})
        os.fsync(self._file)
        crash_points.reached("journal begun")

    def difference(self, identity: dict[str, Any]) -> str | None:
        """Return a message that lists how the run of this journal differs from another one, None if
        it does not.
        """
        before = self.identity or {}
        changed = [
            name for name in {**before, **identity} if before.get(name) != identity.get(name)
        ]
        if not changed:
            return None
        changes = "; ".join(
            f"{name}: {before.get(name)} then, {identity.get(name)} now" for name in changed
        )
        return (
            f"{self.path} belongs to an interrupted run that differs from this one ({changes}); "
            f"{_START_AFRESH}"
        )

    def add_task(self, number: int, entry: Entry) -> None:
        """Write the line of a task that is done."""
        line: dict[str, Any] = {
            "task": number,
            "rows": {name: f"{x:016x}" for name, x in entry.rows.items()},
        }
        if entry.state is not None:
            line["state"] = f"{entry.state:016x}"
        self._append(line)
        crash_points.reached("line written")

    def add_completion(self, completion: dict[str, Any]) -> None:
        """Write the line that everything is on the disk, and wait until that line is."""
        self._append({"complete": completion})
        # On the disk before any output is renamed.
        os.fsync(self._file)
        crash_points.reached("completion noted")

    def remove(self) -> None:
        """Remove the file, then close it: its lock ends with the descriptor."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.close()

    def close(self) -> None:
        """Close the file; remove it if it is empty."""
        if self._file >= 0:
            if self._length == 0:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path)
            os.close(self._file)
        self._file = -1

    def _append(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        # In two halves, so that tests can kill the process within a line.
        half = len(line) // 2
        for begin, end in ((0, half), (half, len(line))):
            while begin < end:
                begin += os.pwrite(self._file, line[begin:end], self._length + begin)
            if end == half:
                crash_points.reached("line half written")
        self._length += len(line)

    def _read(self) -> None:
        with open(self._file, "rb", closefd=False) as file:
            for index, line in enumerate(file):
                # A torn last line is overwritten by the next one.
                if not line.endswith(b"\n"):
                    break
                self._length += len(line)
                content = _parse(line)
                # A damaged line costs its task, not the run.
                if content is None:
                    self.n_damaged += 1
                elif index == 0:
                    self._read_first(content)
                elif "task" in content:
                    self.entries[content["task"]] = _entry(content)
                else:
                    self.completion = content.get("complete")
        if self.identity is None and self._length > 0:
            raise CorruptFileError(
                f"{self.path} is no journal of a run, or its first line is damaged; {_START_AFRESH}"
            )

    def _read_first(self, content: dict[str, Any]) -> None:
        version = content.get("racecore journal")
        if version is not None and version != _VERSION:
            raise CorruptFileError(
                f"{self.path} has version {version}, this racecore reads version {_VERSION}; "
                f"{_START_AFRESH}"
            )
        self.identity = content.get("run")


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line, None if it does not match its checksum."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    content = json.loads(text)
    return content if isinstance(content, dict) else None


def _entry(content: dict[str, Any]) -> Entry:
    state = content.get("state")
    return Entry(
        {name: int(x, 16) for name, x in content["rows"].items()},
        None if state is None else int(state, 16),
    )
