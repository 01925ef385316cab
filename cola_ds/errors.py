"""The three ways a run ends early that are not a defect of this program."""


class UserError(ValueError):
    """A mistake in the config, data or model: one line that names the value, what was expected and the remedy. Exit 2."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TrainingFailedError(RuntimeError):
    """Training itself went wrong, such as a loss that is not finite. Exit 3."""


class StoppedError(Exception):
    """A signal asked the run to stop, and a checkpoint was written. Exit 75: the same command goes on from there."""
