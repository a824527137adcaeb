"""A request to stop, answered inside an evaluation."""


class EvaluationInterrupted(Exception):
    """All ranks leave an evaluation before its next step, because one of them was asked to stop."""
