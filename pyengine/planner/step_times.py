"""What a step takes and what its layers hide, wherever the slots are: by pyengine.planner.inequalities for a processor
and a disk, by pyengine.planner.gpu_step for a GPU and its link. Pure."""

from __future__ import annotations

from pyengine.planner import gpu_step
from pyengine.planner import inequalities as ram_step
from pyengine.planner.costs import Costs
from pyengine.planner.demand import StepDemand
from pyengine.planner.inequalities import Inequality, StepShape, StepTime


def step_time(costs: Costs, shape: StepShape, demand: StepDemand) -> StepTime:
    """The time of a step with that demand, mean of its samples."""
    return (gpu_step.gpu_step_time if costs.device else ram_step.step_time)(costs, shape, demand)


def inequalities(costs: Costs, shape: StepShape, demand: StepDemand) -> list[Inequality]:
    """Klotski's three, with the numbers of a mean layer."""
    return (gpu_step.gpu_inequalities if costs.device else ram_step.inequalities)(costs, shape, demand)
