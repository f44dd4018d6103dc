"""Environment variables that servers started from here would inherit, and what is wrong with them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from pdserve.config.worker_env import LOOPBACK_HOSTS, PROXIES, DataPlaneConfig, WorkerEnv, past_proxies
from pdserve.doctor.finding import Finding, error, note, ok, warning
from pdserve.errors import ConfigError

PROXY, OWNED, ENGINE, THREADS, CUDA = "proxies", "PDSERVE_*", "SGLANG_*", "OMP_NUM_THREADS", "CUDA"
_LAUNCHER_SETS = (
    "PDSERVE_ACTIVE", "PDSERVE_ROLE", "PDSERVE_WORKER_ID", "PDSERVE_INSTANCE_ID", "PDSERVE_BOOTSTRAP_URL",
    "PDSERVE_PARENT_PID", "PDSERVE_STOCK", "PDSERVE_FORK_CHILDREN", "PDSERVE_WORKER_PID", "PDSERVE_STATS",
)  # fmt: skip
_LAUNCHER_OVERWRITES = ("SGLANG_PLATFORM", "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION")
"""worker_environment (cluster/worker_flags.py) sets them whatever the environment says."""
_TRUE = ("1", "true", "yes", "on")


def judge_environment(
    environ: Mapping[str, str], *, on_gpu: bool, num_servers: int, cores: int
) -> list[Finding]:
    """``num_servers`` are to run on this machine, which has ``cores`` CPU cores."""
    findings = [
        *_judge_proxies(environ),
        *_judge_owned(environ),
        *_judge_engine(environ),
        *(_judge_cuda(environ) if on_gpu else _judge_threads(environ, num_servers, cores)),
    ]
    return findings or [ok("environment", "nothing set that gets in the way")]


def _judge_proxies(environ: Mapping[str, str]) -> Iterator[Finding]:
    names = [name for name in PROXIES if environ.get(name)]
    if not past_proxies((), environ):
        return
    yield note(
        PROXY,
        f"{names[0]}={_without_user(environ[names[0]])}",
        "pdserve's servers reach each other past it; SGLang servers started otherwise ask the bootstrap "
        "service through it, and requests hang until a timeout",
        f"for those, export no_proxy={','.join(LOOPBACK_HOSTS)} and every server address of the fleet",
    )


def _without_user(url: str) -> str:
    scheme, slashes, rest = url.rpartition("//")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"


def _judge_owned(environ: Mapping[str, str]) -> Iterator[Finding]:
    left = [name for name in _LAUNCHER_SETS if environ.get(name)]
    if left:
        yield warning(
            OWNED,
            f"set in this shell: {', '.join(left)}",
            "pdserve's launcher sets these for each server; in a shell they change plain SGLang servers too "
            "and name the wrong worker",
            f"unset {' '.join(left)}",
        )
    readers: tuple[Callable[[Mapping[str, str]], object], ...] = (
        WorkerEnv.from_environ,
        DataPlaneConfig.from_environ,
    )
    for read in readers:
        try:
            read(environ)
        except ConfigError as exc:
            yield error(OWNED, str(exc), "every server would refuse to start", "correct or unset it")
            return


def _judge_engine(environ: Mapping[str, str]) -> Iterator[Finding]:
    plugins = environ.get("SGLANG_PLUGINS")
    if plugins is not None and "pdserve" not in [name.strip() for name in plugins.split(",")]:
        yield error(
            ENGINE,
            f"SGLANG_PLUGINS={plugins} leaves pdserve's plugin out",
            "SGLang loads only the plugins it names; servers would not join the fleet",
            "unset SGLANG_PLUGINS or add pdserve to it",
        )
    if environ.get("SGLANG_USE_HND_KVCACHE", "").lower() in _TRUE:
        yield error(
            ENGINE,
            "SGLANG_USE_HND_KVCACHE is on",
            "SGLang refuses prefill/decode disaggregation with that KV layout",
            "unset it",
        )
    backend = environ.get("SGLANG_DISAGGREGATION_NIXL_BACKEND", "")
    if backend and backend != "UCX":
        yield warning(
            ENGINE,
            f"SGLANG_DISAGGREGATION_NIXL_BACKEND={backend}",
            "pdserve's data plane counts arrivals by messages that only the UCX backend carries; "
            "servers fall back to SGLang's own path",
            "unset it",
        )
    failing = environ.get("SGLANG_TEST_DISAGG_FAILURE_PROB", "")
    if failing and failing not in ("0", "0.0"):
        yield warning(
            ENGINE,
            f"SGLANG_TEST_DISAGG_FAILURE_PROB={failing}",
            "SGLang fails transfers at random, for tests",
            "unset it",
        )
    overwritten = [name for name in _LAUNCHER_OVERWRITES if environ.get(name)]
    if overwritten:
        yield note(ENGINE, f"set here, but pdserve's launcher overwrites it: {', '.join(overwritten)}")


def _judge_cuda(environ: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").replace(" ", "").lower():
            yield warning(
                CUDA,
                f"{name}={environ[name]}",
                "cuda_ipc cannot share memory of expandable segments: KV between GPUs of this machine fails "
                "or goes through host memory",
                "leave expandable_segments out",
            )
    if environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        yield warning(
            CUDA,
            f"CUDA_LAUNCH_BLOCKING={environ['CUDA_LAUNCH_BLOCKING']}",
            "every kernel is waited for; servers are several times slower",
            "unset it",
        )


def _judge_threads(environ: Mapping[str, str], num_servers: int, cores: int) -> Iterator[Finding]:
    text = environ.get("OMP_NUM_THREADS", "")
    if not text:
        share = max(1, cores // max(1, num_servers))
        yield ok(THREADS, f"not set: pdserve gives each CPU server {share} of {cores} cores")
    elif not text.isdigit() or int(text) < 1:
        yield warning(
            THREADS, f"OMP_NUM_THREADS={text} is no number", "torch falls back to every core", "unset it"
        )
    elif int(text) * num_servers > cores:
        yield warning(
            THREADS,
            f"OMP_NUM_THREADS={text} for {num_servers} servers on {cores} cores",
            "more threads than cores made decode 6 times slower",
            "unset it: pdserve divides the cores among the servers",
        )
