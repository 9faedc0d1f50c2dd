/* The CUDA runtime as compiled CuTe DSL host code sees it: the functions of libcute_dsl_runtime.so, given to the DSL in
 * its place (CUTE_DSL_LIBS). They have the ABI of cudart with an underscore before the name. Loading and launching call
 * back into Python (capture.py); memory is the host's; everything happens at once, so streams and events order nothing.
 *
 * A failure is kept on the Python side and raised there after the call. What comes back from here is only a status, and
 * for tvm-ffi an error of kind "EmulatorError" that Python replaces by the one kept. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Status;
enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NOT_SUPPORTED = 801 };

typedef struct { uint32_t x, y, z; } Dim3;

typedef struct { uint32_t id, padding; uint32_t value[16]; } LaunchAttribute;
enum { COOPERATIVE = 2, CLUSTER_DIMENSION = 4 };

typedef struct {
    Dim3 grid, block;
    size_t dynamic_smem;
    void *stream;
    const LaunchAttribute *attributes;
    uint32_t attribute_count;
} LaunchConfig;

/* What Python answers; filled by emulator_connect. */
typedef struct {
    Status (*load_library)(const void *image, void **library);
    Status (*unload_library)(void *library);
    Status (*get_kernel)(void *library, const char *name, void **kernel);
    Status (*launch)(void *kernel, const uint32_t *grid, const uint32_t *block, const uint32_t *cluster,
                     uint64_t dynamic_smem, int cooperative, void **arguments);
    Status (*kernel_attribute)(void *kernel, int attribute, int *value);
    Status (*device_attribute)(int attribute, int *value);
    void (*allocated)(void *address, uint64_t size);
    void (*freed)(void *address);
    void (*unsupported)(const char *function);
} Callbacks;

static Callbacks callbacks;

void emulator_connect(const Callbacks *given) { callbacks = *given; }

/* --- modules and launches ------------------------------------------------------------------------------------------ */

Status _cudaLibraryLoadData(void **library, const void *image) {
    return callbacks.load_library ? callbacks.load_library(image, library) : NOT_INITIALIZED;
}
Status _cuLibraryLoadData(void **library, const void *image) { return _cudaLibraryLoadData(library, image); }

Status _cudaLibraryUnload(void *library) {
    return callbacks.unload_library ? callbacks.unload_library(library) : SUCCESS;
}
Status _cuLibraryUnload(void *library) { return _cudaLibraryUnload(library); }

Status _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    return callbacks.get_kernel(library, name, kernel);
}
Status _cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    return _cudaLibraryGetKernel(kernel, library, name);
}

Status _cudaLaunchKernelEx(const LaunchConfig *config, void *kernel, void **arguments) {
    Dim3 cluster = {1, 1, 1};
    int cooperative = 0;
    for (uint32_t i = 0; i < config->attribute_count; i++) {
        const LaunchAttribute *attribute = &config->attributes[i];
        if (attribute->id == CLUSTER_DIMENSION) memcpy(&cluster, attribute->value, sizeof cluster);
        if (attribute->id == COOPERATIVE) cooperative = attribute->value[0] != 0;
    }
    return callbacks.launch(kernel, &config->grid.x, &config->block.x, &cluster.x, config->dynamic_smem, cooperative,
                            arguments);
}

Status _cudaLaunchKernel(void *kernel, Dim3 grid, Dim3 block, void **arguments, size_t dynamic_smem, void *stream) {
    return _cudaLaunchKernelEx(&(LaunchConfig){grid, block, dynamic_smem, stream, NULL, 0}, kernel, arguments);
}

Status _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
    (void)device;
    return callbacks.kernel_attribute(kernel, attribute, value);
}

/* Limits that a program sets on a kernel are those of the launch, which the engine checks. */
Status _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
    (void)kernel, (void)attribute, (void)value, (void)device;
    return SUCCESS;
}
Status _cudaFuncSetAttribute(void *kernel, int attribute, int value) {
    return _cudaKernelSetAttributeForDevice(kernel, attribute, value, 0);
}

Status _cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *kernel, int threads, size_t dynamic_smem) {
    (void)kernel, (void)threads, (void)dynamic_smem;
    *blocks = 1;
    return SUCCESS;
}

/* --- the device ---------------------------------------------------------------------------------------------------- */

Status _cudaGetDevice(int *device) { return *device = 0, SUCCESS; }
Status _cuDeviceGet(int *device, int ordinal) { return *device = ordinal, SUCCESS; }
Status _cudaSetDevice(int device) { return (void)device, SUCCESS; }
Status _cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
Status _cudaDeviceSynchronize(void) { return SUCCESS; }

Status _cudaDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    return callbacks.device_attribute ? callbacks.device_attribute(attribute, value) : NOT_INITIALIZED;
}

/* --- memory -------------------------------------------------------------------------------------------------------- */

Status _cudaMalloc(void **address, size_t size) {
    /* CUDA aligns to 256 bytes, and kernels count on it. */
    if (posix_memalign(address, 256, size ? size : 1)) return OUT_OF_MEMORY;
    if (callbacks.allocated) callbacks.allocated(*address, size);
    return SUCCESS;
}
Status _cudaMallocAsync(void **address, size_t size, void *stream) { return (void)stream, _cudaMalloc(address, size); }
Status _cudaMallocHost(void **address, size_t size) { return _cudaMalloc(address, size); }
Status _cudaMallocManaged(void **address, size_t size, unsigned flags) {
    return (void)flags, _cudaMalloc(address, size);
}

Status _cudaFree(void *address) {
    if (callbacks.freed && address) callbacks.freed(address);
    free(address);
    return SUCCESS;
}
Status _cudaFreeAsync(void *address, void *stream) { return (void)stream, _cudaFree(address); }
Status _cudaFreeHost(void *address) { return _cudaFree(address); }

Status _cudaMemcpy(void *target, const void *source, size_t size, int kind) {
    (void)kind;
    return memmove(target, source, size), SUCCESS;
}
Status _cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) {
    return (void)stream, _cudaMemcpy(target, source, size, kind);
}
Status _cudaMemset(void *target, int value, size_t size) { return memset(target, value, size), SUCCESS; }
Status _cudaMemsetAsync(void *target, int value, size_t size, void *stream) {
    return (void)stream, _cudaMemset(target, value, size);
}

/* --- streams and events: one order, no time ------------------------------------------------------------------------ */

static Status make_handle(void **handle) {
    static uintptr_t last = 0x1000;
    *handle = (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
    return SUCCESS;
}

Status _cudaStreamCreate(void **stream) { return make_handle(stream); }
Status _cudaStreamDestroy(void *stream) { return (void)stream, SUCCESS; }
Status _cudaStreamSynchronize(void *stream) { return (void)stream, SUCCESS; }
Status _cudaStreamWaitEvent(void *stream, void *event, unsigned flags) {
    return (void)stream, (void)event, (void)flags, SUCCESS;
}
Status _cudaEventCreate(void **event) { return make_handle(event); }
Status _cudaEventDestroy(void *event) { return (void)event, SUCCESS; }
Status _cudaEventRecord(void *event, void *stream) { return (void)event, (void)stream, SUCCESS; }
Status _cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
    return (void)start, (void)end, *milliseconds = 0.0f, SUCCESS;
}
Status _cudaProfilerStart(void) { return SUCCESS; }
Status _cudaProfilerStop(void) { return SUCCESS; }

/* --- errors -------------------------------------------------------------------------------------------------------- */

static const char *const FAILED = "the emulator stopped this call";
static const char *const KIND = "EmulatorError";

typedef void (*RaiseParts)(const char *kind, const char **parts, int count);

void CuteDSLRT_TVMFFISetRaisedCudaError(RaiseParts raise, int status) {
    (void)status;
    if (raise) raise(KIND, (const char *[]){FAILED}, 1);
}
/* Takes the launch's dimensions and limits as well; the error that Python keeps says more than they do. */
void CuteDSLRT_TVMFFISetRaisedCudaLaunchError(RaiseParts raise, int status, ...) {
    CuteDSLRT_TVMFFISetRaisedCudaError(raise, status);
}

const char *cuda_dialect_get_error_name(int status) { return status == SUCCESS ? "cudaSuccess" : KIND; }
const char *CuteDSLRT_GetErrorName(int status) { return cuda_dialect_get_error_name(status); }
const char *CuteDSLRT_GetErrorString(int status) { return status == SUCCESS ? "no error" : FAILED; }
void cuda_dialect_print_on_error(int status) { (void)status; }
void cuda_dialect_assert_success(int status) { (void)status; }

/* --- a module's library, loaded when its first function is called ---------------------------------------------------- */

Status cuda_dialect_init_library_once(void **library, Status (*init)(void **), Status (*per_device)(void **, int),
                                      void (*raise)(const char *kind, const char *message)) {
    if (*library) return SUCCESS;
    void *loaded = NULL;
    Status status = init(&loaded);
    if (status == SUCCESS && per_device) status = per_device(&loaded, 0);
    if (status != SUCCESS) {
        raise(KIND, FAILED);
        return -1;
    }
    *library = loaded;
    return SUCCESS;
}

/* Called when the process ends, where there may be no interpreter to tell: libraries are simply left. */
void cuda_dialect_unload_library_once(void **library) { *library = NULL; }

/* --- what is not emulated: there, and says so ------------------------------------------------------------------------- */

#define UNSUPPORTED(name)                                      \
    Status name(void) {                                        \
        if (callbacks.unsupported) callbacks.unsupported(#name); \
        return NOT_SUPPORTED;                                  \
    }

UNSUPPORTED(_cuLibraryGetGlobal)
UNSUPPORTED(_cuLibraryGetKernelCount)
UNSUPPORTED(_cuLibraryGetManaged)
UNSUPPORTED(_cuLibraryGetModule)
UNSUPPORTED(_cuLibraryGetUnifiedFunction)
UNSUPPORTED(_cuLibraryLoadFromFile)
UNSUPPORTED(_cudaGetDeviceProperties)
UNSUPPORTED(_cudaGraphDestroy)
UNSUPPORTED(_cudaGraphExecDestroy)
UNSUPPORTED(_cudaGraphInstantiate)
UNSUPPORTED(_cudaGraphLaunch)
UNSUPPORTED(_cudaLibraryGetGlobal)
UNSUPPORTED(_cudaLibraryGetKernelCount)
UNSUPPORTED(_cudaLibraryGetManaged)
UNSUPPORTED(_cudaLibraryGetUnifiedFunction)
UNSUPPORTED(_cudaLibraryLoadFromFile)
UNSUPPORTED(_cudaStreamAddCallback)
UNSUPPORTED(_cudaStreamBeginCapture)
UNSUPPORTED(_cudaStreamEndCapture)
UNSUPPORTED(CuteDSLRT_Function_Run)
UNSUPPORTED(CuteDSLRT_Module_Create_From_Bytes)
UNSUPPORTED(CuteDSLRT_Module_Destroy)
UNSUPPORTED(CuteDSLRT_Module_Get_Function)
