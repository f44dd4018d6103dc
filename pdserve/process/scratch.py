"""What a killed SGLang server leaves on disk, named so that anybody may clear it later.

SGLang makes IPC sockets in the temporary folder and a load snapshot in
/dev/shm and never removes them after a kill. A pdserve worker puts both under
names that carry its process id; ``sweep`` removes those whose process is gone.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

_SCRATCH = re.compile(r"^pdserve-(\d+)$")
_SNAPSHOT = re.compile(r"^sglang_loads_pdserve_(\d+)\.shm$")
SHARED_MEMORY = Path("/dev/shm")


def scratch_dir(pid: int) -> Path:
    """Temporary folder of the worker ``pid``; short, because Unix socket paths end at 107 bytes."""
    return Path(tempfile.gettempdir()) / f"pdserve-{pid}"


def snapshot_path(pid: int) -> Path:
    """Load snapshot file of the worker ``pid``."""
    return SHARED_MEMORY / f"sglang_loads_pdserve_{pid}.shm"


def remove(pid: int, scratch: Path | None = None) -> None:
    """Remove what the worker ``pid`` left; it must have ended, or name its ``scratch`` folder itself."""
    shutil.rmtree(scratch or scratch_dir(pid), ignore_errors=True)
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
    for folder, pattern in ((Path(tempfile.gettempdir()), _SCRATCH), (SHARED_MEMORY, _SNAPSHOT)):
        if folder.is_dir():
            matches = (pattern.match(entry.name) for entry in folder.iterdir())
            found |= {int(match[1]) for match in matches if match}
    return found


def _is_alive(pid: int) -> bool:
    """False for a zombie too: nobody may ever collect an orphan in a container."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
