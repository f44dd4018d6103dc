"""pdserve: one command turns machines into a prefill/decode-disaggregated SGLang service."""

__version__ = "0.1.0"

SUPPORTED_SGLANG = "0.5.23"
"""The only SGLang release whose P/D internals the plugin was read against and tested on."""
