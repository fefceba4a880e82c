"""What a conversion did with every tensor: mapped, relaid out, merged, resized, created, left over."""

from collections import defaultdict
from dataclasses import dataclass, field

KINDS = ("mapped", "relaid out", "merged", "resized", "created", "left over")
SHOWN = 6


@dataclass
class Report:
    """Per kind, lines such as "target <- source"; `warnings` say what a reader has to know or check."""

    tensors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, line: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
        self.tensors[kind].append(line)

    def as_dict(self) -> dict:
        return {
            "tensors": {kind: self.tensors[kind] for kind in KINDS if kind in self.tensors},
            "notes": self.notes,
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        """For a terminal: counts of every kind, the first few of those that changed."""
        text = []
        for kind in KINDS:
            entries = self.tensors.get(kind, [])
            text.append(f"{kind:>10}: {len(entries)}")
            if kind != "mapped":
                text += [f"            {line}" for line in entries[:SHOWN]]
                if len(entries) > SHOWN:
                    text.append(f"            and {len(entries) - SHOWN} more")
        text += self.notes
        return text + [f"warning: {warning}" for warning in self.warnings]
