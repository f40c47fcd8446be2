"""The one error that a user's mistake raises: what was wrong, where, and what to do about it."""

import errno


class UserError(Exception):
    """A fault in what the user gave: configuration, data, preset, device or path.

    The command line prints it in one to three lines without a traceback and exits with code 2.

    Args:
        what: What is wrong, in one sentence.
        where: The place: a file and line, a row and field, a config field.
        remedy: What the user can do about it.
    """

    def __init__(self, what: str, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        located = f"{where}: {what}" if where else what
        super().__init__(f"{located}\n  {remedy}" if remedy else located)


def is_full(error: BaseException) -> bool:
    """Whether something could not be written because the disk is full, or the user's share of it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
