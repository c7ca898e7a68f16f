"""Makes gpt_oss_slice.npz from the whole trace: `python make_slice.py gpt-oss-20b.npz`.

A few hundred tokens of gpt-oss-20b's routing (data by Aman Priyanshu, Apache-2.0), with a change of text inside.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TOKENS = 400

if __name__ == "__main__":
    whole = np.load(sys.argv[1], allow_pickle=False)
    begin = int(whole["starts"][200]) - TOKENS // 4
    starts = whole["starts"][(whole["starts"] >= begin) & (whole["starts"] < begin + TOKENS)] - begin
    picked = slice(begin, begin + TOKENS)
    np.savez_compressed(
        Path(__file__).with_name("gpt_oss_slice.npz"),
        ids=whole["ids"][picked],
        probs=whole["probs"][picked],
        starts=starts,
    )
