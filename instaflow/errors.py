"""Errors meant for the person at the keyboard: what is wrong, and the way out."""


class InstaFlowError(Exception):
    """A mistake or a condition that the user can mend.

    `message` names the thing in quotes, the rule and the value received; `hint` says what to do.
    The command line prints both and exits with `exit_code`; every other exception keeps its traceback.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(InstaFlowError):
    """The experiment file, or a `--set`, says something that cannot be done."""


class DataError(InstaFlowError):
    """A file on disk is missing, damaged, or not what its sidecar says."""


class Interrupted(InstaFlowError):
    """The work was told to stop, saved its state and can be resumed."""

    exit_code = 75
