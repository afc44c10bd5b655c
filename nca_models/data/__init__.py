"""What systems learn: pictures and digits."""


class DataError(ValueError):
    """The data cannot be had; the message is one line."""
