"""The two ways a run ends that are not a defect of this program."""


class UserError(ValueError):
    """A mistake in the config, data or model: one line that names the value, what was expected and the remedy. Exit 2."""


class TrainingFailedError(RuntimeError):
    """Training itself went wrong, such as a loss that is not finite. Exit 3."""
