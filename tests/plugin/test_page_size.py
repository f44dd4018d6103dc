"""On a GPU pages have 16 tokens unless the user, the model or the attention backend wants otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.rows import rows

pytestmark = pytest.mark.slow

PLAIN = {
    "page_size": None, "device": "cuda", "speculative_eagle_topk": None, "is_hybrid_swa": False,
    "uses_mamba_radix_cache": False,
}  # fmt: skip


def _default(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], environ: dict[str, str]) -> Any:
    """What SGLang's own pass declares with our hook around it, for made-up facts."""
    from sglang.srt.arg_groups import model_override_base
    from sglang.srt.arg_groups.overrides import _page_size_default

    from pdserve.plugin.patches import default_page_size

    view = SimpleNamespace(**(PLAIN | changes))
    with monkeypatch.context() as patch:
        patch.setenv("PDSERVE_ACTIVE", "1")
        for name, value in environ.items():
            patch.setenv(name, value)
        patch.setattr(model_override_base, "model_config_of", lambda view: view)
        return default_page_size(_page_size_default, view)


@rows(
    ("changes", "environ", "declared"),
    [
        ({}, {}, {"page_size": 16}),
        ({"speculative_eagle_topk": 1}, {}, {"page_size": 16}),
        ({"page_size": 1}, {}, {}),
        ({"page_size": 128}, {}, {}),
        ({"speculative_eagle_topk": 4}, {}, {"page_size": 1}),
        ({"is_hybrid_swa": True}, {}, {"page_size": 1}),
        ({"uses_mamba_radix_cache": True}, {}, {"page_size": 1}),
        ({"device": "cpu"}, {}, {"page_size": 1}),
        ({}, {"PDSERVE_DATA_PLANE": "off"}, {"page_size": 1}),
        ({}, {"PDSERVE_STOCK": "1"}, {"page_size": 1}),
    ],
)
def test_only_what_nobody_has_decided_becomes_16(
    changes: dict[str, Any],
    environ: dict[str, str],
    declared: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _default(monkeypatch, changes, environ) == declared


def test_sglang_runs_the_pass_through_the_hook_after_models_and_backends_have_spoken() -> None:
    """The pipeline has imported the pass by name; the registry must reach that name too."""
    from sglang.srt.arg_groups import overrides, pipeline
    from sglang.srt.plugins import hook_registry

    original = overrides._page_size_default
    assert pipeline._page_size_default is original
    hook_registry._propagate_patch(original, "ours", overrides)
    try:
        assert pipeline._page_size_default == "ours"
    finally:
        pipeline._page_size_default = original
