"""The one error of the converters: what was named, what was expected, what came, what to do. One line."""


class ConversionError(ValueError):
    """Nothing was written at DST, and SRC is as it was."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
