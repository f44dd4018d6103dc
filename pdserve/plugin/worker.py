"""Entry point of one SGLang server of the fleet: ``python -m pdserve.plugin.worker <sglang flags>``.

    parse flags ─► hooks + self-check ─► SGLang launches ─► ready ─► register, keep the lease

The process dies with its parent (even by ``kill -9``), and SGLang's own
children die with it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from pdserve.config.worker_env import WorkerEnv, adopt_scratch, adopt_worker_defaults
from pdserve.errors import PdserveError
from pdserve.plugin.imports import is_cpu_server, skip_gpu_only_packages, without_collections
from pdserve.process import scratch

logger = logging.getLogger(__name__)

EXIT_REFUSED = 79
"""Exit status when the bootstrap service refused this worker; its last log line says why."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one server until it ends. Never returns normally while SGLang serves."""
    flags = list(sys.argv[1:] if argv is None else argv)
    env = adopt_worker_defaults()
    if env.parent_pid:
        from pdserve.process.parent_death import die_with_parent

        die_with_parent(env.parent_pid)
    if is_cpu_server(flags) and not env.stock:
        skip_gpu_only_packages()
    run_sglang(flags, env)


def run_sglang(flags: Sequence[str], env: WorkerEnv) -> None:
    """Serve with these SGLang flags; used by ``main`` and, after a fork, by the forkserver."""
    with without_collections():
        from sglang.srt.plugins import load_plugins

        load_plugins()  # before anything else: it replaces classes that other modules then import
        from sglang.srt.entrypoints.http_server import app, launch_server
        from sglang.srt.server_args import prepare_server_args
        from sglang.srt.utils import kill_process_tree

    scratch.sweep()
    folder = scratch.scratch_dir(os.getpid())
    adopt_scratch(folder)
    server_args = prepare_server_args(list(flags))

    from pdserve.plugin.membership import WorkerMembership
    from pdserve.plugin.patches import run_scheduler
    from pdserve.plugin.resume.sse import IdComments

    membership = WorkerMembership(env, server_args, on_refused=_leave_refused)
    if not env.stock:
        app.add_middleware(IdComments, instance_id=env.instance_id)
    app.add_api_route("/pdserve/instance", membership.describe, methods=["GET"])
    try:
        server_args.resolve_once()
        launch_server(server_args, run_scheduler_process_func=run_scheduler, launch_callback=membership.start)
    finally:
        membership.stop()
        kill_process_tree(os.getpid(), include_parent=False)
        scratch.remove(os.getpid(), folder)


def _leave_refused(error: Exception) -> None:
    """Called from the lease thread: SGLang cannot be stopped from a thread, so leave at once."""
    message = str(error) if isinstance(error, PdserveError) else repr(error)
    logger.error("refused by the bootstrap service: %s", message)
    sys.stderr.write(f"pdserve: refused by the bootstrap service: {message}\n")
    sys.stderr.flush()
    _kill_children()
    os._exit(EXIT_REFUSED)


def _kill_children() -> None:
    from sglang.srt.utils import kill_process_tree

    kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
