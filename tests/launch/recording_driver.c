/* A CUDA driver that launches nothing and notes what it was asked to launch: the libcuda.so.1 of Triton's own JIT and
   launcher (recording_driver.py). A launch goes to a log: a Launch, then the bytes of the kernel's parameters. */
#include "cuda.h"
#include <stdint.h>
#include <string.h>

enum { MOST_KERNELS = 4096, MOST_PARAMETERS = 128, LOG_BYTES = 1 << 22 };
typedef struct { uint64_t function, stream; uint32_t grid[3], threads, shared, attributes, bytes, unused; } Launch;
typedef struct { uint64_t function; int count, bytes[MOST_PARAMETERS]; } Kernel;

static Kernel kernels[MOST_KERNELS];
static int known;
static unsigned char log_[LOG_BYTES];
static size_t logged;
static int major_, minor_, shared_, refuse_descriptors;
static uintptr_t handle = 0x1000;

/* What recording_driver.py calls. */
void recorder_device(int major, int minor, int shared) { major_ = major, minor_ = minor, shared_ = shared; }
void recorder_refuse_descriptors(int refuse) { refuse_descriptors = refuse; }

void recorder_parameters(uint64_t function, int count, const int *bytes) {
    Kernel *kernel = &kernels[known++ % MOST_KERNELS];
    kernel->function = function, kernel->count = count;
    memcpy(kernel->bytes, bytes, count * sizeof *bytes);
}

size_t recorder_take(unsigned char *into) { /* and forget */
    size_t bytes = logged;
    if (into) memcpy(into, log_, bytes);
    logged = 0;
    return bytes;
}

/* What Triton's launcher calls. */
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
    Launch launch = {.function = (uint64_t)f, .stream = (uint64_t)c->hStream, .threads = c->blockDimX,
                     .grid = {c->gridDimX, c->gridDimY, c->gridDimZ}, .shared = c->sharedMemBytes};
    for (unsigned i = 0; i < c->numAttrs; i++) launch.attributes |= 1u << c->attrs[i].id;
    if (logged > LOG_BYTES / 2) logged = 0; /* nobody reads: a benchmark */
    unsigned char *to = log_ + logged + sizeof launch;
    for (int k = 0; k < known && k < MOST_KERNELS; k++) {
        if (kernels[k].function != launch.function) continue;
        for (int i = 0; i < kernels[k].count; i++) {
            memcpy(to, parameters[i], kernels[k].bytes[i]);
            to += kernels[k].bytes[i];
        }
        break;
    }
    launch.bytes = to - (log_ + logged + sizeof launch);
    memcpy(log_ + logged, &launch, sizeof launch);
    logged = to - log_;
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
    if (refuse_descriptors) return CUDA_ERROR_INVALID_VALUE;
    cuuint64_t *to = (cuuint64_t *)map; /* 128 bytes, which is room for rank 5 */
    memset(map, 0, sizeof *map);
    *to++ = (uintptr_t)address, *to++ = type | (cuuint64_t)rank << 16 | (cuuint64_t)swizzle << 32;
    for (cuuint32_t i = 0; i < rank; i++) *to++ = dims[i] | (cuuint64_t)box[i] << 40;
    for (cuuint32_t i = 0; i + 1 < rank; i++) *to++ = strides[i];
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = major_; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = minor_; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_ + 1024; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 65536;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

/* The rest is asked for and of no interest. */
#define OK(assignment) { return assignment, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) OK(*m = (CUmodule)(handle += 16))
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) OK(*f = (CUfunction)(handle += 16))
CUresult cuPointerGetAttribute(void *to, CUpointer_attribute a, CUdeviceptr p) OK(*(CUdeviceptr *)to = p)
CUresult cuGetErrorString(CUresult e, const char **text) OK(*text = "invalid argument")
CUresult cuCtxGetDevice(CUdevice *d) OK(*d = 0)
CUresult cuModuleUnload(CUmodule m) OK(0)
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status) OK(*status = CU_STREAM_CAPTURE_STATUS_NONE)
CUresult cuCtxGetCurrent(CUcontext *c) OK(*c = (CUcontext)1)
CUresult cuCtxSetCurrent(CUcontext c) OK(0)
CUresult cuCtxGetLimit(size_t *value, CUlimit l) OK(*value = 1 << 20)
CUresult cuCtxSetLimit(CUlimit l, size_t value) OK(0)
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) OK(*c = (CUcontext)1)
CUresult cuDeviceGet(CUdevice *d, int ordinal) OK(*d = ordinal)
CUresult cuDriverGetVersion(int *version) OK(*version = 13010)
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int value) OK(0)
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) OK(0)
CUresult cuInit(unsigned flags) OK(0)
