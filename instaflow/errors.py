"""Errors meant for the person at the keyboard: what is wrong, and the way out."""

import errno

GONE = "The disk or network share is gone: bring it back; the same command goes on"
ROOM = "Make room, or write to another place; the same command goes on"
ACCESS = "Check the permissions there, or choose another place"
PATH = "Check the path: nothing can be made there, a file stands where a folder is needed, or a name is too long"
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EACCES: ACCESS,
    errno.EPERM: ACCESS,
    errno.EROFS: ACCESS,
    errno.ESTALE: GONE,
    errno.ENOTCONN: GONE,
    errno.EEXIST: PATH,
    errno.ENOTDIR: PATH,
    errno.ENAMETOOLONG: PATH,
    errno.ENOENT: PATH,
    errno.ELOOP: PATH,
}


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
        if hint:
            self.add_note(f"Hint: {hint}")  # in a traceback, where Python calls


class ConfigError(InstaFlowError):
    """The experiment file, or a `--set`, says something that cannot be done."""


class DataError(InstaFlowError):
    """A file on disk is missing, damaged, or not what its sidecar says."""


class NotFiniteError(InstaFlowError):
    """A model's samples are no numbers: its weights have diverged, or overflow in their precision."""


class Interrupted(InstaFlowError):
    """The work was told to stop, saved its state and can be resumed."""

    exit_code = 75


def of_the_system(error: Exception) -> InstaFlowError | None:
    """What the system refused, with its remedy; None for any other error, which keeps its traceback."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f": '{error.filename}'" if error.filename else ""
        return InstaFlowError(f"{error.strerror}{where}", REMEDIES[error.errno])
    if not isinstance(error, OSError) and "No space left on device" in str(error):  # safetensors wraps it in its own
        return InstaFlowError("No space left on device", ROOM)
    return None


def reason_of(error: Exception) -> str:
    """An error of any library in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
