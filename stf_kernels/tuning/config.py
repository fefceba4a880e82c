"""A kernel configuration: everything a launcher needs to know beyond the problem itself."""

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes and compiler options of the segmented GEMM.

    block_m x block_n is the tile of y that one program computes, block_k the columns of one step of its loop,
    group_m the tile rows that share W in L2, num_warps and num_stages the compiler's options (warps per program,
    depth of the software pipeline). split_k > 1 shares the K axis out among that many programs (kernels/split_k.py).
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if not _is_power_of_two(value):
                raise ValueError(f"{name}: expected a power of two, got {value!r}")
        for name in ("block_m", "block_n", "block_k"):
            if getattr(self, name) < 16:
                raise ValueError(
                    f"{name}: expected at least 16 (the smallest matrix product), got {getattr(self, name)}"
                )
        for name in ("group_m", "num_stages", "split_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")

    @classmethod
    def from_dict(cls, values: dict) -> "GemmConfig":
        """Inverse of `to_dict`; ValueError names a field that is unknown or missing."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config: unknown field {unknown[0]!r}, expected {sorted(known)}")
        if missing := sorted({"block_m", "block_n", "block_k"} - set(values)):
            raise ValueError(f"config: field {missing[0]!r} is missing")
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)

    def shared_bytes(self, itemsize: int) -> int:
        """Bytes of shared memory that the pipelined operand tiles take, itemsize bytes an element."""
        return self.num_stages * self.block_k * (self.block_m + self.block_n) * itemsize

    def __str__(self) -> str:
        split = f" k{self.split_k}" if self.split_k > 1 else ""
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k} g{self.group_m} w{self.num_warps} s{self.num_stages}{split}"
        )


def _is_power_of_two(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value & (value - 1) == 0
