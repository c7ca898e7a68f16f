"""What a budget will hold and how fast it will run, said before a model is loaded.

    GGUF keys  ─▶ shape ────┐
    trace      ─▶ routing ──┼─▶ predict ─▶ plan ─▶ the command line
    short runs ─▶ probe ────┘

Only probe.py and disk.py touch models and disks to measure; routing.py and predict.py are pure.
"""
