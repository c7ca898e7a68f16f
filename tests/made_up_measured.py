"""What a probe of the bundled model might have found."""

from __future__ import annotations

from pyengine.planning.measured import Measured

MEASURED = Measured(
    token_s=0.010,
    token_past_s=1e-6,
    expert_share=0.2,
    missing=((1, 0.0002), (4, 0.0006), (8, 0.0012)),
    prompt_token_s=0.001,
    prompt_past_s=1e-6,
    pair_s=4e-6,
    prompt_miss_s=1e-4,
    bytes_per_miss=63e3,
    overhead_bytes=50 << 20,
    disk_bytes_per_s=1e9,
    disk_latency_s=1e-4,
    n_threads=2,
    direct_io=True,
    bundle=False,
    took_s=3.0,
)
