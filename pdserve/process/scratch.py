"""What a killed SGLang server leaves on disk, named so that anybody may clear it later.

SGLang makes IPC sockets in the temporary folder and a load snapshot in
/dev/shm and never removes them after a kill. A pdserve worker puts both under
names that carry its process id; ``sweep`` removes those whose process is gone.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from pdserve.errors import ConfigError

_SCRATCH = re.compile(r"^pdserve-(\d+)$")
_SNAPSHOT = re.compile(r"^sglang_loads_pdserve_(\d+)\.shm$")
SHARED_MEMORY = Path("/dev/shm")
SHORT_FOLDERS = (Path("/tmp"), Path("/var/tmp"), SHARED_MEMORY)
"""Instead of a temporary folder whose name is too long for the sockets in it."""
MAX_SOCKET_PATH = 107
LONGEST_FOLDER = MAX_SOCKET_PATH - len("/pdserve-4194304/pymp-abcdefgh/listener-abcdefgh")
"""Bytes: the longest name of a socket is that of Python's multiprocessing."""


def scratch_dir(pid: int) -> Path:
    """Temporary folder of the worker ``pid``; short, because Unix socket paths end at 107 bytes.

    Raises:
        ConfigError: the machine's temporary folder is too long, and no short one can be written.
    """
    places = [place for place in _places() if os.access(place, os.W_OK | os.X_OK)]
    if not places:
        named = ", ".join(map(str, SHORT_FOLDERS))
        raise ConfigError(
            f"the temporary folder {tempfile.gettempdir()} is too long for Unix sockets (at most "
            f"{LONGEST_FOLDER} bytes), and none of {named} can be written; set TMPDIR to a short folder"
        )
    return places[0] / f"pdserve-{pid}"


def snapshot_path(pid: int) -> Path:
    """Load snapshot file of the worker ``pid``."""
    return SHARED_MEMORY / f"sglang_loads_pdserve_{pid}.shm"


def remove(pid: int, scratch: Path | None = None) -> None:
    """Remove what the worker ``pid`` left; it must have ended, or name its ``scratch`` folder itself."""
    for folder in [scratch] if scratch else [place / f"pdserve-{pid}" for place in _places()]:
        shutil.rmtree(folder, ignore_errors=True)
    snapshot_path(pid).unlink(missing_ok=True)


def sweep() -> list[int]:
    """Remove what dead workers left on this machine; returns their process ids."""
    dead = sorted(pid for pid in _known() if not _is_alive(pid))
    for pid in dead:
        remove(pid)
    return dead


def live_workers() -> list[int]:
    """Process ids of the pdserve workers that run on this machine now, whoever started them."""
    return sorted(pid for pid in _known() if _is_alive(pid))


def _known() -> set[int]:
    found: set[int] = set()
    for folder, pattern in (*((place, _SCRATCH) for place in _places()), (SHARED_MEMORY, _SNAPSHOT)):
        if folder.is_dir():
            matches = (pattern.match(entry.name) for entry in folder.iterdir())
            found |= {int(match[1]) for match in matches if match}
    return found


def _places() -> tuple[Path, ...]:
    """Where scratch folders may be: the temporary folder if its name is short, else SHORT_FOLDERS."""
    own = Path(tempfile.gettempdir())
    return (own,) if len(os.fsencode(own)) <= LONGEST_FOLDER else SHORT_FOLDERS


def _is_alive(pid: int) -> bool:
    """False for a zombie too: nobody may ever collect an orphan in a container."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
