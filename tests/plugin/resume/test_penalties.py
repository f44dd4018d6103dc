"""Replaying tokens into SGLang's penalizers is the same as having decoded them step by step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

VOCAB = 13
_request = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), max_size=30),
    st.sampled_from([0.0, 0.1, 0.7, -1.3]),
    st.sampled_from([0.0, 0.3, -0.6]),
    st.sampled_from([1.0, 1.3, 0.8]),
    st.sampled_from([0, 4]),
)


def _batch(requests: list[Any]) -> Any:
    from sglang.srt.sampling import penaltylib

    class Batch(SimpleNamespace):
        """What an orchestrator reads, and a weak reference can hold."""

    reqs = [
        SimpleNamespace(
            output_ids=ids,
            eos_token_ids={1},
            tokenizer=SimpleNamespace(additional_stop_token_ids=None, eos_token_id=1),
            sampling_params=SimpleNamespace(
                frequency_penalty=frequency, presence_penalty=presence, repetition_penalty=repetition,
                min_new_tokens=least, stop_token_ids=None,
            ),
        )
        for ids, frequency, presence, repetition, least in requests
    ]  # fmt: skip
    kinds = {
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
    }
    batch = Batch(reqs=reqs, device="cpu")
    orchestrator = penaltylib.BatchedPenalizerOrchestrator(vocab_size=VOCAB, batch=batch, penalizers=kinds)
    batch.sampling_info = SimpleNamespace(penalizer_orchestrator=orchestrator)
    return batch


def _state(batch: Any) -> dict[str, Any]:
    names = (
        "cumulated_frequency_penalties",
        "cumulated_presence_penalties",
        "cumulated_repetition_penalties",
    )
    found = {}
    for kind, penalizer in batch.sampling_info.penalizer_orchestrator.penalizers.items():
        for name in (*names, "len_output_tokens"):
            if hasattr(penalizer, name):
                found[f"{kind.__name__}.{name}"] = getattr(penalizer, name)
    return found


@given(st.lists(_request, min_size=1, max_size=4))
def test_replay_equals_step_by_step(requests: list[Any]) -> None:
    import torch

    from pdserve.plugin.resume.penalties import replay_penalties

    replayed = _batch(requests)
    replay_penalties(lambda batch: None, replayed)
    for row, request in enumerate(requests):
        alone = _batch([request])  # steps of requests of unlike lengths need a batch each
        for token in request[0][:-1]:
            alone.sampling_info.penalizer_orchestrator.cumulate_output_tokens(torch.tensor([token]))
        for name, value in _state(alone).items():
            assert torch.equal(_state(replayed)[name][row : row + 1], value), name
        assert replayed.reqs[row].pdserve_resume is None


def test_a_penalizer_nobody_knows_is_an_error() -> None:
    import torch

    from pdserve.plugin.resume.penalties import replay_row

    with pytest.raises(TypeError, match="SimpleNamespace"):
        replay_row(SimpleNamespace(), 0, torch.tensor([1]))


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=8), st.floats(0.5, 2, width=32))
def test_scaling_without_a_compiler_is_sglangs_formula(values: list[float], penalty: float) -> None:
    import torch

    from pdserve.plugin.resume.penalties import scale_logits

    logits, penalties = torch.tensor([values]), torch.full((1, len(values)), penalty)
    expected = [[v * p if v < 0 else v / p for v, p in zip(logits[0], penalties[0], strict=True)]]
    scale_logits(logits, penalties)
    assert torch.equal(logits, torch.tensor(expected))
