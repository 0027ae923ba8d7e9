"""The one error that is shown to the user as a sentence, without a traceback."""


class UserError(Exception):
    """Something the caller can put right: a flag, a folder, a missing package, a rule that fits no parameter."""
