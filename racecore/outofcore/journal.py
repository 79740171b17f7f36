"""The journal of a run: what it is, and a line for every task whose results are written, so that it
can be resumed.

Every line is a JSON object behind its CRC-32. The first one identifies the run: version,
parameters, inputs. Each further one gives a task's number, the checksums of the rows that it wrote,
and that of the state it left. The last one says that everything is on the disk. A line that is torn
or damaged counts as not written, and so does one whose rows are not in the files: the journal never
has to reach the disk in step with them.
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
    """What is known of a task that is done."""

    rows: dict[str, int]  # checksums of what it wrote
    state: int | None  # checksum of the state that it left, if it left one


class Journal:
    """An open journal, locked against other runs.

    Parameters
    ----------
    path : str
        A new file, or what an earlier run left.
    afresh : bool
        Forget what an earlier run left, whatever it is.

    Attributes
    ----------
    identity : dict or None
        What the first line says; None where the file is new.
    entries : dict of int to Entry
        By number of the task.
    completion : dict or None
        What the last line says, where it is there.
    n_damaged : int
        Lines that did not match their checksums.

    Raises
    ------
    racecore.errors.OutputInUseError
        Another run has it open.
    racecore.errors.CorruptFileError
        It is no journal, or its first line is damaged though others are there.
    """

    def __init__(self, path: str, afresh: bool = False) -> None:
        self.path = path
        self.identity: dict[str, Any] | None = None
        self.entries: dict[int, Entry] = {}
        self.completion: dict[str, Any] | None = None
        self.n_damaged = self._length = 0
        self._file = open_locked(path)
        try:
            if afresh:
                os.ftruncate(self._file, 0)
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def begin(self, identity: dict[str, Any]) -> None:
        """Forget what is there, if anything is, and write the first line."""
        os.ftruncate(self._file, 0)
        self._length = 0
        self.entries, self.completion, self.identity = {}, None, identity
        self._append({"racecore journal": _VERSION, "run": identity})
        os.fsync(self._file)
        crash_points.reached("journal begun")

    def difference(self, identity: dict[str, Any]) -> str | None:
        """Tell in what the run that this is the journal of differs from another one; None means in
        nothing.
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
        return f"{self.path} is what an interrupted run left, and not of this one ({changes}); {_START_AFRESH}"

    def note(self, number: int, entry: Entry) -> None:
        """Write that a task is done."""
        line: dict[str, Any] = {
            "task": number,
            "rows": {name: f"{x:016x}" for name, x in entry.rows.items()},
        }
        if entry.state is not None:
            line["state"] = f"{entry.state:016x}"
        self._append(line)
        crash_points.reached("line written")

    def note_completion(self, completion: dict[str, Any]) -> None:
        """Write that everything is on the disk, and wait until that line is."""
        self._append({"complete": completion})
        os.fsync(self._file)
        crash_points.reached("completion noted")

    def remove(self) -> None:
        """Remove the file, and let go of it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self.close()

    def close(self) -> None:
        """Let go of the file; an empty one goes too."""
        if self._file >= 0:
            if self._length == 0:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path)
            os.close(self._file)
        self._file = -1

    def _append(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
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
                if not line.endswith(b"\n"):
                    break  # torn: the next line takes its place
                self._length += len(line)
                content = _parse(line)
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
    """Return what a line holds, None if it is not what its checksum says."""
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
