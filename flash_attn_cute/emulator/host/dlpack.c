/* Makes host tensors cross DLPack as CUDA tensors, and keeps the list of those that are held by a consumer.
 *
 * The list is what a launch's tensors are: the arguments of the call in progress, and tensors that the program keeps
 * converted. An entry goes when the consumer calls the tensor's deleter. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

enum { ON_CPU = 1, ON_CUDA = 2, MAX_DIMENSIONS = 8 };

typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } ElementType;

typedef struct {
    void *data;
    Device device;
    int32_t dimensions;
    ElementType type;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} Tensor;

typedef struct Managed { /* DLManagedTensor */
    Tensor tensor;
    void *context;
    void (*deleter)(struct Managed *);
} Managed;

typedef struct Versioned { /* DLManagedTensorVersioned */
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct Versioned *);
    uint64_t flags;
    Tensor tensor;
} Versioned;

typedef struct {
    uint32_t major, minor;
    void *previous;
    int (*allocate)(Tensor *, Versioned **, void *, void (*)(void *, const char *, const char *));
    int (*from_object)(void *, Versioned **);
    int (*to_object)(Versioned *, void **);
    int (*borrow)(void *, Tensor *);
    int (*current_stream)(int32_t, int32_t, void **);
} ExchangeApi;

/* One tensor that a consumer holds, as Python reads it. */
typedef struct {
    uint64_t address, size;
    int64_t shape[MAX_DIMENSIONS];
    int32_t dimensions;
    uint8_t code, bits;
    uint16_t lanes;
} View;

typedef struct Held {
    struct Held *next;
    void *owner;     /* the managed tensor */
    void *deleter;   /* its own */
    View view;
} Held;

static Held *held;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static View describe(const Tensor *t) {
    View view = {.dimensions = t->dimensions, .code = t->type.code, .bits = t->type.bits, .lanes = t->type.lanes};
    int64_t low = 0, high = 1, compact = 1; /* in elements, relative to the first */
    for (int d = t->dimensions - 1; d >= 0; d--) {
        int64_t extent = t->shape[d], stride = t->strides ? t->strides[d] : compact;
        if (d < MAX_DIMENSIONS) view.shape[d] = extent;
        compact *= extent;
        int64_t reach = extent > 0 ? (extent - 1) * stride : 0;
        if (reach < 0) low += reach;
        else high += reach;
    }
    int64_t bits = (int64_t)t->type.bits * t->type.lanes;
    view.address = (uint64_t)t->data + t->byte_offset + (uint64_t)(low * bits / 8);
    view.size = compact > 0 ? (uint64_t)(((high - low) * bits + 7) / 8) : 0;
    return view;
}

static void hold(void *owner, void *deleter, const Tensor *tensor) {
    Held *entry = malloc(sizeof *entry);
    *entry = (Held){.owner = owner, .deleter = deleter, .view = describe(tensor)};
    pthread_mutex_lock(&lock);
    entry->next = held;
    held = entry;
    pthread_mutex_unlock(&lock);
}

static void *release(void *owner) {
    void *deleter = NULL;
    pthread_mutex_lock(&lock);
    for (Held **link = &held; *link; link = &(*link)->next) {
        if ((*link)->owner != owner) continue;
        Held *entry = *link;
        deleter = entry->deleter;
        *link = entry->next;
        free(entry);
        break;
    }
    pthread_mutex_unlock(&lock);
    return deleter;
}

static void delete_managed(Managed *self) {
    void (*deleter)(Managed *) = (void (*)(Managed *))release(self);
    if (deleter) deleter(self);
}

static void delete_versioned(Versioned *self) {
    void (*deleter)(Versioned *) = (void (*)(Versioned *))release(self);
    if (deleter) deleter(self);
}

/* For the capsules that __dlpack__ returns. */
void emulator_present_managed(Managed *managed) {
    if (managed->tensor.device.type != ON_CPU) return;
    managed->tensor.device = (Device){ON_CUDA, 0};
    hold(managed, (void *)managed->deleter, &managed->tensor);
    managed->deleter = delete_managed;
}

void emulator_present_versioned(Versioned *managed) {
    if (managed->tensor.device.type != ON_CPU) return;
    managed->tensor.device = (Device){ON_CUDA, 0};
    hold(managed, (void *)managed->deleter, &managed->tensor);
    managed->deleter = delete_versioned;
}

/* --- the table of functions that torch.Tensor.__dlpack_c_exchange_api__ leads to ------------------------------------- */

static ExchangeApi original, presented;

static int from_object(void *object, Versioned **out) {
    int status = original.from_object(object, out);
    if (status == 0) emulator_present_versioned(*out);
    return status;
}

static int to_object(Versioned *managed, void **out) {
    if (managed->tensor.device.type == ON_CUDA) managed->tensor.device.type = ON_CPU;
    return original.to_object(managed, out);
}

static int borrow(void *object, Tensor *out) {
    int status = original.borrow(object, out);
    if (status == 0 && out->device.type == ON_CPU) out->device = (Device){ON_CUDA, 0};
    return status;
}

static int allocate(Tensor *prototype, Versioned **out, void *context,
                    void (*set_error)(void *, const char *, const char *)) {
    Tensor on_host = *prototype;
    on_host.device = (Device){ON_CPU, 0};
    int status = original.allocate(&on_host, out, context, set_error);
    if (status == 0) emulator_present_versioned(*out);
    return status;
}

static int current_stream(int32_t type, int32_t id, void **stream) {
    (void)type, (void)id;
    *stream = NULL;
    return 0;
}

ExchangeApi *emulator_present_exchange_api(const ExchangeApi *given) {
    original = presented = *given;
    presented.previous = NULL;
    presented.allocate = allocate;
    presented.from_object = from_object;
    presented.to_object = to_object;
    if (given->borrow) presented.borrow = borrow;
    presented.current_stream = current_stream;
    return &presented;
}

/* Writes up to `capacity` views, latest first; returns how many there are. */
uint64_t emulator_views(View *out, uint64_t capacity) {
    uint64_t count = 0;
    pthread_mutex_lock(&lock);
    for (Held *entry = held; entry; entry = entry->next, count++)
        if (count < capacity) out[count] = entry->view;
    pthread_mutex_unlock(&lock);
    return count;
}
