"""The one error of the converters: what was named, what was expected, what came, what to do. One line."""

import contextlib
from collections.abc import Iterator


class ConversionError(ValueError):
    """Nothing was written at DST, and SRC is as it was."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@contextlib.contextmanager
def blamed_on(what: str, remedy: str) -> Iterator[None]:
    """Whatever is raised inside becomes a ConversionError about `what`: fields of a foreign file break anything."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError(
            f"{what}: expected valid values, got {type(error).__name__}: {error}; {remedy}"
        ) from error
