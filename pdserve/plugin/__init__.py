"""What pdserve changes inside an SGLang server process; inert unless pdserve's launcher started it.

``platform``  the SGLang platform: CPU, or CUDA with CUDA's semantics kept
``hooks``     every SGLang hook target in one table, and the start-up self-check
``backend``   our KV manager and bootstrap server behind SGLang's backend name ``nixl``
``idle``      what keeps an idle or waiting scheduler from burning a core
``membership``registering with the bootstrap service and keeping the lease
``worker``    the entry point: ``python -m pdserve.plugin.worker <sglang flags>``
``forkserver``   forks workers from one process that has SGLang imported
"""
