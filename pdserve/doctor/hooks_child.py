"""Imports SGLang, applies every hook that fits this machine and prints how many; fails as a server would.

python -m pdserve.doctor.hooks_child
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from pdserve.plugin.hooks import HOOKS, apply_hooks, check_sglang_version
from pdserve.process.parent_death import die_with_parent


def main() -> int:
    """Number of hooks as JSON on the last line."""
    check_sglang_version(importlib.import_module("sglang.version").__version__)
    on_cpu = not importlib.import_module("torch").cuda.is_available()
    apply_hooks(HOOKS, on_cpu=on_cpu)
    count = sum(on_cpu or not hook.cpu_only for hook in HOOKS)
    sys.stdout.write(json.dumps({"hooks": count}) + "\n")
    return 0


if __name__ == "__main__":
    die_with_parent(os.getppid())
    sys.exit(main())
