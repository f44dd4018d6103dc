"""How long things take on a worker and on the link between two: a few fitted numbers.

    prefill pass  a + b * new + c * new * (context + new / 2) + d * context * context / 2    in tokens
    decode step   a + b * batch + c * context                      context: tokens in the batch
    transfer      alpha + bytes * beta

Read from and written to JSON: ``calibrate`` writes it from a live service, profiles.py has published ones.
The figures are of one worker (all its GPUs together).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from pdserve.errors import ConfigError

_MAY_BE_ZERO = (
    "prefill_base_s",
    "prefill_token_s",
    "prefill_pair_s",
    "prefill_reread_s",
    "decode_base_s",
    "decode_request_s",
    "decode_token_s",
    "link_alpha_s",
    "link_beta_s",
    "request_s",
    "handshake_s",
    "response_s",
    "reload_beta_s",
    "fit_error",
)
_MUST_BE_POSITIVE = (
    "kv_bytes_per_token",
    "prefill_pool_tokens",
    "decode_pool_tokens",
    "max_running_requests",
    "chunk_tokens",
)


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Costs of one kind of worker. Seconds, tokens, bytes as each name says.

    ``prefill_pair_s``: per pair of a new token and a token it attends to; ``decode_token_s``: per token of
    context in the batch. ``link_beta_s``: per byte, the worker's whole network; ``reload_beta_s``: per byte,
    of a retracted request's KV back from host memory. ``request_s``: from the balancer's socket to the
    scheduler's queue; ``handshake_s``: from pages given on decode until prefill may start; ``response_s``:
    from a token sampled to the client. ``fit_error``: mean of |fit / measured - 1|.
    """

    name: str
    source: str
    prefill_base_s: float
    prefill_token_s: float
    prefill_pair_s: float = 0.0
    prefill_reread_s: float = 0.0
    """Per pair among tokens already known, which some kernels compute again at every pass over a request
    (SGLang's torch_native on CPU does; 0 on GPUs)."""
    decode_base_s: float
    decode_request_s: float
    decode_token_s: float = 0.0
    kv_bytes_per_token: int
    prefill_pool_tokens: int
    decode_pool_tokens: int
    max_running_requests: int = 256
    chunk_tokens: int = 8192
    link_alpha_s: float = 0.0
    link_beta_s: float = 0.0
    request_s: float = 0.0
    handshake_s: float = 0.0
    response_s: float = 0.0
    reload_beta_s: float = 0.0
    has_decode_cache: bool = False
    """SGLang's ``--disaggregation-decode-enable-radix-cache``: what decode has need not travel."""
    fit_error: float = 0.0

    def prefill_s(self, new_tokens: int, context_tokens: int = 0) -> float:
        """Seconds of one pass over ``new_tokens`` of one request after ``context_tokens`` known ones."""
        return self.prefill_pass_s([(new_tokens, context_tokens)])

    def prefill_pass_s(self, rows: Iterable[tuple[int, int]]) -> float:
        """Seconds of one pass over several requests, each (new tokens, context tokens)."""
        tokens = 0
        pairs = reread = 0.0
        for new, context in rows:
            tokens += new
            pairs += new * (context + new / 2)
            reread += context * context / 2
        linear_s = self.prefill_base_s + self.prefill_token_s * tokens
        return linear_s + self.prefill_pair_s * pairs + self.prefill_reread_s * reread

    def prefill_alone_s(self, new_tokens: int, context_tokens: int = 0) -> float:
        """Seconds of a request alone, in passes of ``chunk_tokens``."""
        done, total_s = 0, 0.0
        while done < new_tokens:
            now = min(self.chunk_tokens, new_tokens - done)
            total_s += self.prefill_s(now, context_tokens + done)
            done += now
        return total_s

    def decode_step_s(self, batch: int, context_tokens: int) -> float:
        """Seconds of one decode step of ``batch`` requests with so many tokens of context together."""
        return self.decode_base_s + self.decode_request_s * batch + self.decode_token_s * context_tokens

    def decode_s(self, tokens: int, batch: int, context_tokens: int) -> float:
        """Seconds of ``tokens`` steps of an unchanged batch, whose context grows by ``batch`` each step."""
        first_s = self.decode_step_s(batch, context_tokens)
        return tokens * first_s + self.decode_token_s * batch * tokens * (tokens - 1) / 2

    def transfer_s(self, tokens: int) -> float:
        """Seconds in which the KV of so many tokens travels over an idle link."""
        return self.link_alpha_s + tokens * self.kv_bytes_per_token * self.link_beta_s

    def check(self) -> CostModel:
        """Itself, if all figures make sense.

        Raises:
            ConfigError: naming the first one that does not.
        """
        for field in _MAY_BE_ZERO:
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"cost model {self.name!r}: {field}: expected >= 0, got {value}")
        for field in _MUST_BE_POSITIVE:
            value = getattr(self, field)
            if value <= 0:
                raise ConfigError(f"cost model {self.name!r}: {field}: expected > 0, got {value}")
        if self.decode_base_s + self.decode_request_s <= 0:
            raise ConfigError(f"cost model {self.name!r}: decode_base_s: a decode step may not take 0 s")
        if self.prefill_base_s + self.prefill_token_s <= 0:
            raise ConfigError(f"cost model {self.name!r}: prefill_base_s: a prefill pass may not take 0 s")
        return self

    def save(self, path: str | Path) -> None:
        """Write it as JSON, indented.

        Raises:
            ConfigError: if the file cannot be written.
        """
        try:
            Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        except OSError as exc:
            raise ConfigError(f"cost model {path}: cannot be written: {exc}") from exc


def load_model(path: str | Path) -> CostModel:
    """Read what ``save`` wrote.

    Raises:
        ConfigError: if the file is missing, no JSON of a cost model, or a figure makes no sense.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=CostModel).check()
    except FileNotFoundError:
        raise ConfigError(f"cost model {path}: no such file") from None
    except OSError as exc:
        raise ConfigError(f"cost model {path}: cannot be read: {exc}") from exc
    except msgspec.DecodeError as exc:
        raise ConfigError(f"cost model {path}: {exc}; pdserve calibrate writes such a file") from exc
