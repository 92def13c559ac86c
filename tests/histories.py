"""Histories that Hypothesis makes up, run in tests."""

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def check(
    machine: type[RuleBasedStateMachine], runs: int, steps: int, *, derandomize: bool = False
) -> None:
    """Try a machine in so many histories of so many steps at most, as long as they take.

    With ``derandomize`` in the same ones each time.
    """
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            report_multiple_bugs=False,
            suppress_health_check=[*HealthCheck],
        ),
    )
