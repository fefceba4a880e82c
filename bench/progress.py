"""A progress bar on stderr: tqdm where it is installed, a line per step where it is not."""

from __future__ import annotations

import sys
import time


class Progress:
    """`with Progress(total) as bar: bar.step("what happens now")`"""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            form = "{percentage:3.0f}%|{bar:24}| {elapsed} {desc}"
            self.bar = tqdm(total=total, bar_format=form, dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def now(self, text: str) -> None:
        """Say what is running."""
        if self.bar is not None:
            self.bar.set_description_str(text)
        else:
            print(f"[{self.done}/{self.total} {time.monotonic() - self.start:.0f} s] {text}", file=sys.stderr)

    def step(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(1)

    def finish(self, text: str) -> None:
        """Fewer steps than planned are a finished run too."""
        if self.bar is not None:
            self.bar.total = max(self.done, 1)
            self.bar.refresh()
        self.now(text)
