"""What every test runs under."""

from __future__ import annotations

import os

# Before any OpenMP library loads, and inherited by child processes: threads of one test that spin at a barrier would
# take the cores from the I/O threads, and from other tests on the same machine. Results do not depend on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
