"""SGLang's routes that a prefill/decode pair cannot serve, each with what to do instead. Pure data.

A pair generates text. Embedding, classifying and scoring end with the prefill
of a model, so their place is a plain SGLang server. The Ollama and audio routes
generate, but their bodies have no fields for the pair's rendezvous.
"""

from __future__ import annotations

_PLAIN = (
    "it needs one forward pass and no decode: send it to a plain SGLang server (no --disaggregation-mode)"
)
_SCORE = f"{_PLAIN}, or read logprobs from /generate with return_logprob and max_new_tokens 1"

UNSERVED: dict[str, tuple[tuple[str, ...], str]] = {
    "/encode": (("POST", "PUT"), f"embeddings are not served by prefill/decode pairs; {_PLAIN}"),
    "/v1/embeddings": (("POST",), f"embeddings are not served by prefill/decode pairs; {_PLAIN}"),
    "/classify": (("POST", "PUT"), f"classification is not served by prefill/decode pairs; {_PLAIN}"),
    "/v1/classify": (("POST",), f"classification is not served by prefill/decode pairs; {_PLAIN}"),
    "/v1/score": (("POST",), f"scoring is not served by prefill/decode pairs; {_SCORE}"),
    "/v1/rerank": (("POST", "PUT"), f"reranking is not served by prefill/decode pairs; {_SCORE}"),
    "/v1/decisions": (("POST",), f"decisions are scored, not generated; {_SCORE}"),
    "/v1/systemone": (("POST",), f"decisions are scored, not generated; {_SCORE}"),
    "/v1/audio/transcriptions": (
        ("POST",),
        "transcription requests carry no rendezvous of a prefill/decode pair; send the audio as a content "
        "part of /v1/chat/completions, or to a plain SGLang server",
    ),
    "/v1/realtime": (
        ("GET",),
        "the realtime websocket is not served by prefill/decode pairs; use /v1/chat/completions with "
        "stream, or a plain SGLang server",
    ),
    "/api/chat": (
        ("POST",),
        "Ollama's requests carry no rendezvous of a prefill/decode pair; use /v1/chat/completions",
    ),
    "/api/generate": (
        ("POST",),
        "Ollama's requests carry no rendezvous of a prefill/decode pair; use /generate or /v1/completions",
    ),
}
"""Path to (methods, reason)."""
