"""The one exception of the project's own: bad input, told so that the reader knows what to do."""


class LVMError(ValueError):
    """Input that cannot be used. The message says what is wrong, where, and what to do."""
