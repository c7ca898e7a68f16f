"""How many texts to compute at once, so that reading experts hides behind computing them (Klotski, arXiv 2502.06888).

    short runs ─▶ costs ─────┐
    trace      ─▶ demand ────┼─▶ inequalities ─▶ solving ─▶ BatchPlan ─▶ `pyengine plan --batch`, `pyengine batch`
    memory     ─▶ solving ───┘        ▲
    steps of a running model ─▶ refine ┘

Only measuring.py, gpu_measuring.py, spread_run.py, glimpse.py and watching.py touch models; costs, fitting, demand,
inequalities, gpu_step, step_times, solving and refine are pure. With slots in a GPU's memory gpu_measuring.py measures
the open model and its link, and gpu_step.py is the step's time; batch_on_gpu.py plans before a model is open.
"""

from pyengine.planner.batch_plan import plan_batch
from pyengine.planner.costs import Costs
from pyengine.planner.solving import BatchPlan, DoesNotFitError, Memory

__all__ = ["BatchPlan", "Costs", "DoesNotFitError", "Memory", "plan_batch"]
