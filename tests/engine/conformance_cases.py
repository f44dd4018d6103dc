"""All requests of the conformance test, and the answers that cannot be the same, each with its reason."""

from __future__ import annotations

from fnmatch import fnmatchcase

from tests.engine import conformance_native, conformance_openai, conformance_other

CASES = (*conformance_native.CASES, *conformance_openai.CASES, *conformance_other.CASES)
assert len(CASES) >= 150, len(CASES)
assert len({case.name for case in CASES}) == len(CASES)

_SAMPLES = "a plain server computes the prompt of samples once before them; ours begin together"
_WORDS = "FastAPI's own words, with the file and line of the server that says them"
_TOLD = "a plain server says nothing; the balancer tells its state, or what each worker answered"
_UNREADABLE = ("broken JSON", "not JSON", "no body", "NaN", "null", "an array", "array", "a string")
_UNREADABLE += ("a lone surrogate", "invalid UTF-8", "as text", "without content type")
_SILENT = ("ping", "health", "abort of an unknown request")
_ROUTER = "404 and 405 have the error form of their route and say what the path takes"
LEGITIMATE: tuple[tuple[str, str, str], ...] = (
    ("* n [23]*", "*cached_tokens*", _SAMPLES),
    ("* n [23]*", "shapes:*cached_tokens*", _SAMPLES),
    ("chat n [23]*streamed*", "*.id:*", "OpenAI gives an answer one id; SGLang one to each sample"),
    ("chat n 2, return_output_ids*", "*.spec_tokens_details: only in plain: [[]]", "empty, for n > 1 only"),
    (
        "*of no token*", "*.output_token_logprobs*",
        "a plain server lists the token nobody asked for unless its whole batch asks for none",
    ),
    ("generate return_sampling_mask", "*", "a pair has it with SGLANG_ENABLE_DISAGG_SAMPLING_MASK=1 only"),
    *((f"* {kind}", "*.message: *", _WORDS) for kind in _UNREADABLE),
    *((f"* by {method}", "*", _ROUTER) for method in ("GET", "POST", "PUT", "DELETE")),
    ("unknown path*", "*", _ROUTER),
    ("known path with a slash", "*", "not redirected: the client's mistake is said"),
    ("generate empty batch", "*", "a batch of nothing is refused, not answered with nothing"),
    ("* without content type", "*", "a body that does not say what it is is taken for JSON"),
    *((name, "content-type: *", _TOLD) for name in _SILENT),
    *((name, ': "" != *', _TOLD) for name in _SILENT),
    ("*model info", ".disaggregation_mode: *", "the server that was asked is half of a pair"),
    ("*model info", ".embedding.cache.radix_cache_disabled: *", "a decode server keeps none"),
)  # fmt: skip
"""(case name, path of the difference, why): patterns as of a shell."""


def is_legitimate(name: str, difference: str) -> bool:
    """True if the table says that this difference must be."""
    return any(fnmatchcase(name, case) and fnmatchcase(difference, path) for case, path, _ in LEGITIMATE)
