"""Lower bounds of a step."""

from megatron.longseq.flexsp.plan.degree_sets import lower_estimate
from megatron.longseq.flexsp.plan.problem import StepProblem
from megatron.longseq.flexsp.plan.split import least_microbatches


def step_bound(problem: StepProblem) -> float:
    """Return seconds that no plan is below."""
    if not problem.lengths:
        return 0.0
    startup = min(one.startup for each in problem.by_degree.values() for one in each.kinds)
    return lower_estimate(problem, range(len(problem.lengths))) + (least_microbatches(problem) - 1) * startup
