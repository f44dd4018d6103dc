"""The only importer of nixl: the transfer engine over it, and settings its Python API does not offer.

NIXL's UCX progress thread polls with ``pthrDelay`` as its time-out and the
Python API hard-codes 0, so an idle agent burns a whole core. UCX's wake-up
events end the poll as soon as there is work; the delay only bounds the wait
when an event is missed (nixl 1.5.1, src/plugins/ucx/ucx_backend.cpp,
nixlUcxSharedThread::run). Worse, the thread spins on the worker's lock while
another thread posts: a contiguous 47 MB host write takes 9.2 ms with it and
4.2 ms without. An agent whose owner polls often does not need it.

A NIXL agent is thread-safe when made with NIXL_THREAD_SYNC_STRICT, as SGLang
and ``create`` do, and its calls release the GIL.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pdserve.errors import PeerLost, RegistrationFailed
from pdserve.transfer.engine import (
    DescriptorList,
    MemoryKind,
    PeerName,
    Spans,
    StridedSpans,
    TransferHandle,
    TransferState,
)

_STATES = {"DONE": TransferState.DONE, "PROC": TransferState.PENDING, "ERR": TransferState.FAILED}


@dataclass(frozen=True, slots=True)
class AgentTuning:
    """How an agent's transport is driven."""

    progress_delay_us: int = 5000
    """Longest sleep of the progress thread between looks; 0 is NIXL's own busy polling."""
    has_progress_thread: bool = True
    """False: only calls on the agent drive its transport, on both sides of a connection."""


def tune_agents(tuning: Callable[[], AgentTuning]) -> None:
    """Ask ``tuning`` for the settings of every NIXL agent made from now on in this process.

    The last caller wins.
    """
    import nixl._api as api

    bindings = api.nixlBind
    original = getattr(bindings.nixlAgent, "pdserve_original", bindings.nixlAgent)

    def make_agent(name: str, config: Any) -> Any:
        wanted = tuning()
        config.pthrDelay = wanted.progress_delay_us
        config.useProgThread = config.useProgThread and wanted.has_progress_thread
        return original(name, config)

    make_agent.pdserve_original = original  # type: ignore[attr-defined]
    bindings.nixlAgent = make_agent


class NixlEngine:
    """``TransferEngine`` over one NIXL agent, its own or one that SGLang made."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._registered: list[Any] = []
        # nixl's stubs re-export these under another name for every CUDA version.
        self._errors: tuple[type[Exception], ...] = _nixl_errors()

    @classmethod
    def create(
        cls, *, backend: str = "UCX", backend_params: dict[str, str] | None = None, name: str = ""
    ) -> NixlEngine:
        """A new agent with one backend.

        Args:
            backend: NIXL plugin, as SGLANG_DISAGGREGATION_NIXL_BACKEND.
            backend_params: its settings, e.g. ``{"num_threads": "1", "device_list": "mlx5_0"}``.

        Raises:
            RegistrationFailed: naming the plugins there are when ``backend`` is not one of them.
        """
        from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t

        config = nixl_agent_config(backends=[], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
        agent = nixl_agent(name or str(uuid.uuid4()), config)
        plugins = agent.get_plugin_list()
        if backend not in plugins:
            raise RegistrationFailed(
                f"NIXL has no backend {backend!r}; this installation has {', '.join(sorted(plugins))}"
            )
        try:
            agent.create_backend(backend, backend_params or {})
        except Exception as exc:
            raise RegistrationFailed(
                f"NIXL backend {backend} with {backend_params or {}} failed: {exc}"
            ) from exc
        return cls(agent)

    @property
    def name(self) -> PeerName:
        """The agent's name."""
        return PeerName(str(self._agent.name))

    def register(self, spans: Spans, kind: MemoryKind) -> None:
        """Register memory with every backend of the agent."""
        rows = [(int(address), int(nbytes), int(device), "") for address, nbytes, device in spans]
        try:
            descriptors = self._agent.register_memory(rows, str(kind))
        except self._errors as exc:
            raise RegistrationFailed(f"NIXL refused {len(rows)} {kind} spans: {exc}") from exc
        if not descriptors:
            raise RegistrationFailed(f"NIXL refused {len(rows)} {kind} spans")
        self._registered.append(descriptors)

    def describe(self) -> bytes:
        """NIXL's agent metadata."""
        return bytes(self._agent.get_agent_metadata())

    def connect(self, description: bytes) -> PeerName:
        """Load a peer's metadata and open the connection now rather than at the first write."""
        try:
            raw = self._agent.add_remote_agent(description)
            name = raw.decode() if isinstance(raw, bytes) else str(raw)
            self._agent.make_connection(name)
        except self._errors as exc:
            raise PeerLost(f"NIXL cannot connect: {exc}") from exc
        return PeerName(name)

    def is_connected(self, peer: PeerName) -> bool:
        """False once NIXL has dropped a peer's metadata after a disconnect; ``connect`` loads it again."""
        return bool(self._agent.check_remote_metadata(str(peer)))

    def prepare(self, peer: PeerName | None, blocks: StridedSpans, kind: MemoryKind) -> DescriptorList:
        """NIXL's prepared descriptor list, in its compressed (strided) form."""
        try:
            return DescriptorList(self._agent.prep_xfer_dlist(peer or "", blocks, str(kind)))
        except self._errors as exc:
            raise PeerLost(f"NIXL cannot prepare {len(blocks)} descriptors for {peer}: {exc}") from exc

    def write(
        self,
        source: tuple[DescriptorList, npt.NDArray[np.int32]],
        target: tuple[DescriptorList, npt.NDArray[np.int32]],
        message: bytes,
    ) -> TransferHandle:
        """One NIXL request over prepared lists."""
        try:
            handle = self._agent.make_prepped_xfer(
                "WRITE", source[0].raw, source[1], target[0].raw, target[1]
            )
        except self._errors as exc:
            raise PeerLost(f"NIXL cannot make a write: {exc}") from exc
        return self._post(handle, message)

    def write_spans(
        self,
        peer: PeerName,
        source: Spans,
        target: Spans,
        kind: tuple[MemoryKind, MemoryKind],
        message: bytes,
    ) -> TransferHandle:
        """One NIXL request over explicit spans."""
        try:
            handle = self._agent.initialize_xfer(
                "WRITE",
                self._agent.get_xfer_descs(source, str(kind[0])),
                self._agent.get_xfer_descs(target, str(kind[1])),
                peer,
            )
        except self._errors as exc:
            raise PeerLost(f"NIXL cannot make a write to {peer}: {exc}") from exc
        return self._post(handle, message)

    def poll(self, handle: TransferHandle) -> TransferState:
        """NIXL's state; an unreadable state is FAILED, it will not get better."""
        if handle.raw is None:
            return TransferState.DONE
        try:
            state = _STATES[self._agent.check_xfer_state(handle.raw)]
        except self._errors:
            state = TransferState.FAILED
        if state is not TransferState.PENDING:
            self._release(handle)
        return state

    def arrivals(self) -> list[tuple[PeerName, bytes]]:
        """NIXL's notifications; they arrive after the bytes they belong to."""
        found = self._agent.get_new_notifs()
        return [(PeerName(str(peer)), bytes(text)) for peer, texts in found.items() for text in texts]

    def close(self) -> None:
        """Deregister what this engine registered; the agent itself ends with its last reference."""
        for descriptors in self._registered:
            self._agent.deregister_memory(descriptors)
        self._registered.clear()

    def _post(self, raw: Any, message: bytes) -> TransferHandle:
        handle = TransferHandle(raw)
        try:
            state = self._agent.transfer(raw, message)
        except self._errors as exc:
            # NIXL posts block by block and does not wait for those it has posted when one is refused.
            raise PeerLost(f"NIXL refused a write: {exc}", may_have_written=True) from exc
        if state == "ERR":
            self._release(handle)
            raise PeerLost("NIXL refused a write", may_have_written=True)
        return handle

    def _release(self, handle: TransferHandle) -> None:
        raw, handle.raw = handle.raw, None
        try:
            self._agent.release_xfer_handle(raw)
        except self._errors:
            # A failed request may refuse to be released while its peer is being torn down;
            # NIXL frees it with the agent.
            return


def _nixl_errors() -> tuple[type[Exception], ...]:
    bindings = importlib.import_module("nixl._bindings")
    found = [
        value
        for name, value in vars(bindings).items()
        if name.startswith("nixl") and isinstance(value, type) and issubclass(value, Exception)
    ]
    return (RuntimeError, *found)
