"""The root of every error planish raises on purpose, and the exit code it maps to."""

__all__ = ["PlanishError"]


class PlanishError(Exception):
    """An error whose message says what is wrong and what to do about it.

    Library code raises subclasses; only the command line turns `exit_code` into a process exit status.
    """

    exit_code = 1
