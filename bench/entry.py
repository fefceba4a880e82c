"""How a command ends: with the status of its `main`, and without a traceback where nothing in it went wrong.

130   interrupted (Ctrl-C), wherever that met it, an import included
141   whoever read its output has gone: `... | head`; files were written before anything was printed
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    try:
        status = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
