"""The three ways a run ends early that are not a defect of this program, and how they are put."""

_NAMED = 6  # of those that a message is about


class UserError(ValueError):
    """A mistake in the config, data or model: one line that names the value, what was expected and the remedy. Exit 2."""


class ArrivalError(UserError):
    """Processes do not find each other, so that process 0 cannot speak for all: who raises this knows of it by itself."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some_of(names: list[str], between: str = ", ") -> str:
    """Names for a message: the first few, and how many there are more."""
    more = len(names) - _NAMED
    return between.join(names[:_NAMED]) + (f"{between}and {more} more" if more > 0 else "")


class TrainingFailedError(RuntimeError):
    """Training itself went wrong, such as a loss that is not finite. Exit 3."""


class StoppedError(Exception):
    """A signal asked the run to stop, and a checkpoint was written. Exit 75: the same command goes on from there."""
