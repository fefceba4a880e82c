"""A GPU that records: Triton's real JIT and launcher on a CUDA driver that launches nothing; tensors stay on the CPU.

build(folder)    compiles recording_driver.c -> the environment of a process whose libcuda it is to be
install(arch)    in that process: its one GPU is of that architecture, and stf_kernels serves CPU tensors on it
"""

import ctypes
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

COMPILER = shutil.which(os.environ.get("CC", "cc"))
_HEADER = struct.Struct("<2Q8I")
_BYTES = {"64": 8, "32": 4, "16": 2, "8": 1}


def build(folder: Path) -> dict[str, str]:
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library, source = folder / "libcuda.so.1", Path(__file__).with_name("recording_driver.c")
    options = ["-shared", "-fPIC", "-O1", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([COMPILER, *options, "-o", str(library), str(source)], check=True)
    (folder / "libcuda.so").symlink_to(library)  # the name by which Triton links its launcher
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    return {"LD_LIBRARY_PATH": path, "TRITON_LIBCUDA_PATH": str(folder), "STF_KERNELS_CACHE": str(folder / "cache")}


class Launch(NamedTuple):
    kernel: str
    function: int  # one specialisation of that kernel
    stream: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    attributes: list[int]  # ids, as CUlaunchAttributeID counts them
    parameters: str  # hexadecimal, in the order of the kernel's


class Recorder:
    """The driver, and what it was asked for."""

    def __init__(self) -> None:
        self.stream = 1
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.recorder_take.restype = ctypes.c_size_t
        self._names: dict[int, str] = {}
        self._log = ctypes.create_string_buffer(1 << 22)

    def take(self) -> list[Launch]:
        """The launches since the last call."""
        end, at, found = self._library.recorder_take(self._log), 0, []
        while at < end:
            function, stream, *grid, threads, shared, attributes, size, _ = _HEADER.unpack_from(self._log, at)
            at += _HEADER.size
            ids = [i for i in range(32) if attributes >> i & 1]
            parameters = self._log[at : at + size].hex()
            found.append(Launch(self._names[function], function, stream, tuple(grid), threads, shared, ids, parameters))
            at += size
        return found

    def refuse_descriptors(self, refuse: bool) -> None:
        """As a driver does that does not take a tensor map."""
        self._library.recorder_refuse_descriptors(refuse)

    def _loaded(self, module, function: int, name: str, files: dict, hash_) -> None:
        """Triton's hook: the driver must know how many bytes each parameter of a kernel is."""
        ptx = Path(next(path for file, path in files.items() if file.endswith(".ptx"))).read_text()
        listed = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)[1]
        found = re.findall(r"\.param[^,\n]*?\.[a-z](\d+)\b[^,\n]*?(?:\[(\d+)\])?\s*(?:,|$)", listed, re.MULTILINE)
        sizes = [_BYTES[bits] * int(length or 1) for bits, length in found]
        self._library.recorder_parameters(ctypes.c_uint64(function), len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        self._names[function] = name


def install(arch: str) -> Recorder:
    """arch: "sm_90", ...; tables and defaults are those of a "recording-gpu" with 132 multiprocessors."""
    import torch

    capability = divmod(int(arch.removeprefix("sm_")), 10)
    properties = SimpleNamespace(name="recording GPU", multi_processor_count=132)
    properties.major, properties.minor = capability
    recorder = Recorder()
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.synchronize = lambda device=None: None

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from stf_kernels import backend, configs
    from stf_kernels.ops import tma

    recorder._library.recorder_device(*capability, configs.SHARED_MEMORY_LIMIT[arch])
    driver = CudaDriver()
    driver.get_current_stream = lambda device: recorder.stream
    driver.get_current_device = torch.cuda.current_device
    driver.get_device_capability = torch.cuda.get_device_capability
    triton.runtime.driver.set_active(driver)
    triton.knobs.runtime.kernel_load_end_hook.add(recorder._loaded)

    gpu = torch.device("cuda", 0)
    backend.triton_serves = lambda device: True
    tma.device_has_tma = lambda device: capability >= (9, 0)
    choose = configs.choose
    configs.choose = lambda device, gemm, **options: choose(gpu, gemm, **options)
    return recorder
