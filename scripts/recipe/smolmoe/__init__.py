"""How pyengine's bundled demonstration model was made: a dense chat model turned into a mixture of experts.

The steps are modules of their own, in the order in which they run: `corpus`, `prompt_drawing`, `generate`, `train`
(which calls `upcycle`, `layerwise`, `distil` and `measure`) and `export`. Run them with ``python -m smolmoe STEP``.
"""
