"""The benchmark: stock llama.cpp and pyengine measured in turns, each sample in a fresh process, honestly.

One parent process plans *rows* (ways to run a model: rows.py), and for every *sample* starts one child (child.py)
inside control groups that limit its memory and its disk (cgroups.py). Rounds are interleaved (A B C A B C), so that a
noisy minute hits all rows alike; every sample is one line of the CSV (samples.py), and medians and ratios are taken
from pairs of the same round (summary.py). Children of stock rows import llama_cpp only: nothing of pyengine's native
part is ever loaded there.

Where two ways are to be told apart by a few percent, or on many disks, they play a *contest* (contest.py): processes
that stay loaded (players.py) and take turns. experiments.py makes matrices of contests, verdicts.py says who won.
"""
