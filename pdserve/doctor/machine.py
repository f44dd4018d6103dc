"""The checks of this machine: which facts each one judges, and how long it may take."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.cluster.spec import ProcessSpec
from pdserve.cluster.worker_flags import CPU_MAX_TOTAL_TOKENS, flag_value
from pdserve.config.worker_env import cache_dir, environment
from pdserve.doctor.finding import Finding, Level
from pdserve.doctor.gpu import SMI_S, GpuFacts, gather_gpu, judge_gpu
from pdserve.doctor.limits import gather_limits, judge_limits, judge_room
from pdserve.doctor.model_files import ModelFacts, gather_model, judge_model, server_bytes
from pdserve.doctor.ports import gather_ports, judge_ports
from pdserve.doctor.runner import Check, Group
from pdserve.doctor.software import (
    DEEP_S,
    apply_hooks_for_real,
    gather_software,
    judge_deep,
    judge_software,
    not_deep,
)
from pdserve.doctor.surroundings import judge_environment
from pdserve.doctor.transport import (
    LOOPBACK_S,
    UCX_S,
    gather_transport,
    judge_loopback,
    judge_transport,
    send_over_loopback,
)
from pdserve.errors import ConfigError
from pdserve.process.limits import usable_cores


@dataclass(frozen=True, slots=True)
class MachineQuestion:
    """What this machine is meant to run. ``is_serving``: a fleet runs already, nothing is to be started."""

    model: str = ""
    device: str = "auto"
    prefill: int = 1
    decode: int = 1
    port: int = 30000
    deep: bool = False
    is_serving: bool = False

    @property
    def num_servers(self) -> int:
        """Servers that are still to be started here."""
        return 0 if self.is_serving else self.prefill + self.decode


def machine_groups(question: MachineQuestion) -> list[Group]:
    """Every check of this machine, in the order of the report."""
    looks = _Looks(question)
    software = (
        Check("software", lambda: judge_software(gather_software())),
        Check("environment", looks.environment),
        Check("hooks applied", looks.deep, DEEP_S + 10),
    )
    system = [Check("limits", looks.limits, SMI_S * 2 + 20)]
    if not question.is_serving:
        system += [Check("ports", looks.ports), Check("model", lambda: judge_model(looks.model()), 60)]
    transport = (
        Check("transport", looks.transport, UCX_S + SMI_S * 2 + 20),
        Check("loopback", looks.loopback, 2 * LOOPBACK_S + SMI_S * 2),
    )
    return [
        Group("Software", software),
        Group("GPU", (Check("gpu", looks.gpu, SMI_S * 2 + 20),)),
        Group("Machine", tuple(system)),
        Group("KV transfer", transport, in_turn=True),
    ]


def check_room(model: str, servers: Sequence[ProcessSpec]) -> None:
    """Refuse, before the first of them starts, ``servers`` of ``model`` that do not fit on this machine.

    The estimate is ``pdserve doctor``'s. What is not known (the weights of a model that is still to be
    downloaded) counts as nothing.

    Raises:
        ConfigError: naming what is short and what to do.
    """
    facts, on_gpu = gather_model(model, environment()), bool(servers[0].gpus)
    findings = judge_room(
        gather_limits((), usable_cores()),
        num_servers=len(servers),
        needed_bytes=sum(server_bytes(facts, on_gpu=on_gpu, kv_tokens=_pool_tokens(one)) for one in servers),
        on_gpu=on_gpu,
    )
    if short := [finding for finding in findings if finding.level is Level.ERROR]:
        what = "; ".join(finding.what for finding in short)
        raise ConfigError(
            f"this machine is too small: {what}. {short[0].what_to_do}; --force starts them all"
        )


def _pool_tokens(server: ProcessSpec) -> int:
    """KV tokens that its flags ask for; 0 if SGLang sizes the pool by what is free."""
    given = flag_value(server.flags, "--max-total-tokens")
    return int(given) if given.isdigit() else 0


class _Looks:
    """Facts that several checks need are gathered once."""

    def __init__(self, question: MachineQuestion) -> None:
        self._question = question
        self._environ = environment()
        # cached_property needs a __dict__ lock of its own in threads; twice looked at once does no harm
        self.gpu_facts = functools.cache(lambda: gather_gpu(self._environ))
        self.model = functools.cache(lambda: gather_model(question.model, self._environ))

    @property
    def on_gpu(self) -> bool:
        """Whether servers would run on a GPU here."""
        facts: GpuFacts = self.gpu_facts()
        return self._question.device != "cpu" and bool(facts.usable)

    def gpu(self) -> list[Finding]:
        return judge_gpu(self.gpu_facts(), self._question.device, self._question.num_servers)

    def deep(self) -> list[Finding]:
        return judge_deep(apply_hooks_for_real()) if self._question.deep else not_deep()

    def environment(self) -> list[Finding]:
        return judge_environment(
            self._environ,
            on_gpu=self.on_gpu,
            num_servers=self._question.prefill + self._question.decode,
            cores=usable_cores(),
        )

    def limits(self) -> list[Finding]:
        question = self._question
        facts = gather_limits((cache_dir(),), usable_cores())
        model: ModelFacts = self.model()
        tokens = CPU_MAX_TOTAL_TOKENS
        needed = question.num_servers * server_bytes(model, on_gpu=self.on_gpu, kv_tokens=tokens)
        return judge_limits(
            facts,
            num_servers=question.num_servers,
            needed_bytes=needed,
            on_gpu=self.on_gpu,
            has_rdma=any(Path("/sys/class/infiniband").glob("*")),
        )

    def ports(self) -> list[Finding]:
        question = self._question
        return judge_ports(gather_ports(question.port, question.num_servers, question.prefill))

    def transport(self) -> list[Finding]:
        return judge_transport(gather_transport(self._environ), on_gpu=self.on_gpu)

    def loopback(self) -> list[Finding]:
        findings = judge_loopback(send_over_loopback())
        if self.on_gpu:
            first = min(self.gpu_facts().usable)
            findings += judge_loopback(send_over_loopback(first), f"GPU {first}")
        return findings
