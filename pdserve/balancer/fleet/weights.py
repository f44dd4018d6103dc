"""What must agree between a fleet's workers: weights and LoRA adapters that were loaded while it ran. Pure.

    Weights() ─ after(Change) ─► Weights       one value for each worker, one for the fleet
    goal.steps_from(found)                     the changes that bring a worker there, or why none do

A change that names files (a checkpoint, an adapter) can be repeated on a worker that missed it. One whose
tensors came with the request, or over a group of processes, cannot: such a worker waits for the next whole
version. Two values are equal only if the same changes led there, each as often.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from pdserve.errors import PdserveError

DISK = "/update_weights_from_disk"
VERSION = "/update_weight_version"
LOAD, LOAD_TENSORS, UNLOAD = "/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter"
PUSHES = ("/update_weights_from_tensor", "/update_weights_from_distributed", "/update_weights_from_ipc")
ROUTES = (DISK, VERSION, *PUSHES, LOAD, LOAD_TENSORS, UNLOAD)
"""SGLang's routes that change what a server answers."""


class CannotReplay(PdserveError):
    """A worker cannot be brought to the fleet's weights by repeating changes; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Change:
    """One of ``ROUTES`` that was carried out. ``name``: the checkpoint, the adapter or the version.

    ``body`` is what repeats it; empty if nothing does. ``flushes``: the worker has emptied its cache.
    """

    path: str
    name: str
    version: str = ""
    body: bytes = field(default=b"", compare=False)
    flushes: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.path}{f', version {self.version}' if self.version else ''})"


class _Fields(msgspec.Struct):
    model_path: str = ""
    weight_version: str | None = None
    new_version: str = ""
    lora_name: str = ""
    lora_path: str = ""
    flush_cache: bool = True


def parse_change(path: str, body: bytes) -> Change | None:
    """The change that ``body`` asks for on ``path``; None if SGLang would not understand it either."""
    try:
        fields = msgspec.json.decode(body, type=_Fields)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    version = fields.weight_version or ""
    if path == DISK:
        return Change(path, fields.model_path, version, body, fields.flush_cache)
    if path in PUSHES:
        return Change(path, version or "tensors", version, b"", fields.flush_cache)
    if path == VERSION:
        return Change(path, fields.new_version, fields.new_version, body)
    return Change(path, fields.lora_name, fields.lora_path, b"" if path == LOAD_TENSORS else body)


@dataclass(frozen=True, slots=True)
class Weights:
    """What was loaded since the start, none of it for the default.

    ``base`` is the last change that named all weights: a checkpoint, or the first tensors of a new version.
    ``count``: changes since then, it included. ``is_pushed``: tensors were among them. ``version`` is the
    last one that was given, ``adapters`` what was loaded and not unloaded, by name.
    """

    base: Change | None = None
    count: int = 0
    is_pushed: bool = False
    version: str = ""
    adapters: tuple[Change, ...] = ()

    def __str__(self) -> str:
        origin = str(self.base or ("pushed tensors" if self.is_pushed else "those of its start"))
        return ", ".join([origin, *(f"adapter {adapter.name}" for adapter in self.adapters)])

    @property
    def model_path(self) -> str:
        """The checkpoint that was loaded; empty for another origin."""
        return self.base.name if self.base is not None and self.base.path == DISK else ""

    def continues(self, begun: Weights) -> bool:
        """True if an answer begun with ``begun`` may go on with these: at most adapters have come since."""
        return self == begun or (
            replace(self, adapters=()) == replace(begun, adapters=())
            and set(begun.adapters) <= set(self.adapters)
        )

    def after(self, change: Change) -> Weights:
        """The same after one more change."""
        version = change.version or self.version
        if change.path == DISK:
            count = self.count + 1 if change == self.base and not self.is_pushed else 1
            return replace(self, base=change, count=count, is_pushed=False, version=version)
        if change.path in PUSHES:
            is_next = bool(change.version) and change.version != self.version
            base, count = (change, 1) if is_next else (self.base, self.count + 1)
            return replace(self, base=base, count=count, is_pushed=True, version=version)
        if change.path == VERSION:
            return replace(self, version=version)
        others = [adapter for adapter in self.adapters if adapter.name != change.name]
        if change.path != UNLOAD:
            others.append(change)
        return replace(self, adapters=tuple(sorted(others, key=lambda adapter: adapter.name)))

    def steps_from(self, found: Weights) -> list[Change]:
        """The changes that bring a worker with ``found`` here.

        Raises:
            CannotReplay: if some of it cannot be repeated.
        """
        steps: list[Change] = []
        version = found.version
        if (found.base, found.count, found.is_pushed) != (self.base, self.count, self.is_pushed):
            if self.base is None or self.is_pushed:
                raise CannotReplay(
                    f"it has other weights than the fleet ({self}), which came as tensors and cannot be sent "
                    "again: it comes back with the next version that all workers are sent whole, or by "
                    f"{DISK}"
                )
            steps.append(self.base)
            version = self.base.version or version
        if self.version and version != self.version:
            body = msgspec.json.encode({"new_version": self.version, "abort_all_requests": False})
            steps.append(Change(VERSION, self.version, self.version, body))
        return steps + self._adapter_steps(found)

    def _adapter_steps(self, found: Weights) -> list[Change]:
        wrong = [adapter for adapter in found.adapters if adapter not in self.adapters]
        missing = [adapter for adapter in self.adapters if adapter not in found.adapters]
        for adapter in missing:
            if not adapter.body:
                raise CannotReplay(
                    f"it lacks the adapter {adapter.name}, which came as tensors and cannot be sent again: "
                    f"unload it, or load it from files by {LOAD}"
                )
        unloads = [
            Change(UNLOAD, each.name, body=msgspec.json.encode({"lora_name": each.name})) for each in wrong
        ]
        return unloads + missing
