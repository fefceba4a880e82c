"""A kernel configuration: everything a launcher needs to know beyond the problem itself."""

from dataclasses import asdict, dataclass, fields, replace

FORMS = ("pointer", "tma", "swap_ab")


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes and compiler options of the segmented GEMM.

    block_m x block_n is the tile of y that one program computes, block_k the columns of one step of its loop,
    group_m the tile rows that share W in L2, num_warps and num_stages the compiler's options (warps per program,
    depth of the software pipeline). split_k > 1 shares the K axis out among that many programs (kernels/split_k.py).

    form is the kernel: "pointer" runs anywhere (kernels/segmented_linear.py); "tma" fetches its tiles by the tensor
    memory accelerator (kernels/tma.py); "swap_ab" does too, with A and B swapped and tail_m rows beside the block_m
    (kernels/swap_ab.py). Operands that do not suit these get plain torch, or `portable` where Triton is forced. pdl: a
    programmatic dependent launch.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1
    form: str = "pointer"
    tail_m: int = 0
    pdl: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form: expected one of {list(FORMS)}, got {self.form!r}")
        for name in ("block_m", "block_n", "block_k", "num_warps", "group_m", "num_stages", "split_k"):
            value = getattr(self, name)
            powers = name not in ("group_m", "num_stages", "split_k")
            three_boxes = name == "block_m" and self.form == "tma" and value == 192
            if type(value) is not int or value < 1 or (powers and value & (value - 1) and not three_boxes):
                raise ValueError(f"{name}: expected a {'power of two' if powers else 'positive int'}, got {value!r}")
            if name.startswith("block") and value < 16:
                raise ValueError(f"{name}: expected at least 16 (the smallest matrix product), got {value}")
        if self.form == "tma" and (self.block_m not in (64, 128, 192, 256) or self.split_k > 1):
            raise ValueError(f"form: tma takes a block_m of 64, 128, 192 or 256 and does not split K, got {self}")
        allowed = [t for t in (16, 32, 64, 128) if t <= self.block_m] if self.form == "swap_ab" else [0]
        if type(self.tail_m) is not int or self.tail_m not in allowed:
            raise ValueError(f"tail_m: expected one of {allowed} for {self.form}, got {self.tail_m!r}")
        if not isinstance(self.pdl, bool):
            raise ValueError(f"pdl: expected true or false, got {self.pdl!r}")

    @classmethod
    def from_dict(cls, values: dict) -> "GemmConfig":
        """Inverse of `to_dict`; ValueError names a field that is unknown or missing."""
        check_fields("config", values, {"block_m", "block_n", "block_k"}, {field.name for field in fields(cls)})
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def rows(self) -> int:
        """Rows of y in a tile."""
        return self.block_m + self.tail_m

    def tile(self) -> tuple:
        """What a search takes two pipelines of."""
        return self.form, self.rows, self.block_n, self.split_k

    def portable(self) -> "GemmConfig":
        """The nearest configuration of the portable kernel, in no more shared memory."""
        if self.form == "pointer":
            return self
        return replace(self, form="pointer", tail_m=0, block_m=128 if self.block_m == 192 else self.block_m)

    def shared_bytes(self, itemsize: int) -> int:
        """Bytes of shared memory that the pipelined operand tiles take, itemsize bytes an element."""
        return self.num_stages * self.block_k * (self.rows + self.block_n) * itemsize

    def constants(self) -> dict[str, int]:
        """The constexpr parameters that all kernels have."""
        names = ("block_m", "block_n", "block_k", "group_m")
        return {name.upper(): getattr(self, name) for name in names}

    def compiler_options(self) -> dict[str, int | bool]:
        """The keyword arguments of a launch that are not the kernel's own."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | {"launch_pdl": True} if self.pdl else options

    def __str__(self) -> str:
        rows = f"{self.block_m}+{self.tail_m}" if self.tail_m else str(self.block_m)
        form = "" if self.form == "pointer" else f" {self.form}"
        split = f" k{self.split_k}" if self.split_k > 1 else ""
        pdl = " pdl" if self.pdl else ""
        tile = f"{rows}x{self.block_n}x{self.block_k}"
        return f"{tile} g{self.group_m} w{self.num_warps} s{self.num_stages}{split}{form}{pdl}"


def check_fields(where: str, values: dict, required: set[str], known: set[str] | None = None) -> None:
    """ValueError names a field that is unknown (known: by default the required ones) or missing."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    if unknown := sorted(set(values) - (known or required)):
        raise ValueError(f"{where}: unknown field {unknown[0]!r}, expected {sorted(known or required)}")
    if missing := sorted(required - set(values)):
        raise ValueError(f"{where}: field {missing[0]!r} is missing")
