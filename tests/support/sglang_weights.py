"""The weights of a fake: SGLang's routes that change them, and which ones each answer was made with."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

PUSHES = ("/update_weights_from_tensor", "/update_weights_from_distributed", "/update_weights_from_ipc")
ROUTES = (
    *("/update_weights_from_disk", "/update_weight_version", *PUSHES),
    *("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter"),
)
_STARTS = itertools.count()


@dataclass
class FakeWeights:
    """What a start of a fake has loaded; ``used`` has the weights of each answer by room."""

    path: str = "fake-model"
    version: str = "default"
    adapters: set[str] = field(default_factory=set)
    changes: list[str] = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)
    refuses: str = ""
    """Answer 400 with this text."""
    gate: asyncio.Event | None = None
    """If set, wait for it before a change takes place."""
    num_waiting: int = 0
    startup_time: dict[str, Any] = field(default_factory=lambda: {"total": next(_STARTS) + 0.5})

    @property
    def name(self) -> str:
        """Everything that an answer depends on."""
        return f"{self.path} {self.version} {sorted(self.adapters)}"

    async def change(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Carry out a change: status and answer."""
        fields = json.loads(body)
        if self.gate is not None:
            self.num_waiting += 1
            await self.gate.wait()
        if self.refuses:
            return 400, json.dumps({"success": False, "message": self.refuses}).encode()
        self.changes.append(path)
        if path == "/update_weights_from_disk":
            self.path = fields["model_path"]
        if path.startswith("/load_lora"):
            self.adapters.add(fields["lora_name"])
        if path == "/unload_lora_adapter":
            self.adapters.discard(fields["lora_name"])
        self.version = fields.get("weight_version") or fields.get("new_version") or self.version
        return 200, b'{"success":true,"message":"Success."}'
