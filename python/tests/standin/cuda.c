// A stand-in for libcuda.so.1: "device" memory is a reserved range that no process can touch, its bytes lie in a shadow.
// Copies on a stream are only queued; they happen when the stream is waited for, so that a forgotten wait shows.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef unsigned long long u64;
enum { REGIONS = 256, INVALID = 1 };

struct region { u64 start; size_t size; char *shadow; int device; };
struct copy { int up; u64 device; void *host; size_t size; struct copy *next; };
struct stream { struct copy *first, **last; void *context; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct region regions[REGIONS];
static __thread void *contexts[64];
static __thread int depth;
static u64 counts[8]; // copies down, copies up, waits, pinned buffers, streams, wrong context, pushes - pops, bytes
static int fail_after = -1;
static int without_context;

static struct region *find(u64 address) {
    for (int i = 0; i < REGIONS; i++)
        if (regions[i].size && address >= regions[i].start && address < regions[i].start + regions[i].size) return &regions[i];
    return NULL;
}

// For the tests.
u64 standin_alloc(size_t size, int device) {
    pthread_mutex_lock(&lock);
    u64 start = 0;
    for (int i = 0; i < REGIONS && !start; i++) {
        if (regions[i].size) continue;
        void *reserved = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved == MAP_FAILED) break;
        regions[i] = (struct region){(u64)reserved, size, calloc(1, size), device};
        start = (u64)reserved;
    }
    pthread_mutex_unlock(&lock);
    return start;
}
int standin_write(u64 to, const void *from, size_t size) {
    struct region *r = find(to);
    if (!r || to + size > r->start + r->size) return INVALID;
    memcpy(r->shadow + (to - r->start), from, size);
    return 0;
}
int standin_read(void *to, u64 from, size_t size) {
    struct region *r = find(from);
    if (!r || from + size > r->start + r->size) return INVALID;
    memcpy(to, r->shadow + (from - r->start), size);
    return 0;
}
u64 standin_count(int which) { return __atomic_load_n(&counts[which], __ATOMIC_SEQ_CST); }
void standin_fail_after(int copies) { fail_after = copies; }
void standin_without_context(int yes) { without_context = yes; }

static void count(int which, long n) { __atomic_add_fetch(&counts[which], n, __ATOMIC_SEQ_CST); }

// The driver's functions that are used.
int cuInit(unsigned flags) { return flags ? INVALID : 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(u64)(0x1000 + device); return 0; }
int cuCtxPushCurrent_v2(void *context) {
    if (!context || depth == 64) return INVALID;
    contexts[depth++] = context;
    count(6, 1);
    return 0;
}
int cuCtxPopCurrent_v2(void **context) {
    if (!depth) return INVALID;
    *context = contexts[--depth];
    count(6, -1);
    return 0;
}
int cuCtxGetCurrent(void **context) {
    *context = depth ? contexts[depth - 1] : NULL;
    return 0;
}
int cuPointerGetAttribute(void *out, int attribute, u64 address) {
    struct region *r = find(address);
    if (!r) return INVALID;
    switch (attribute) {
    case 1: *(void **)out = without_context ? NULL : (void *)(u64)(0x1000 + r->device); return 0;
    case 2: *(unsigned *)out = 2; return 0;
    case 9: *(int *)out = r->device; return 0;
    case 11: *(u64 *)out = r->start; return 0;
    case 12: *(size_t *)out = r->size; return 0;
    }
    return INVALID;
}
int cuMemHostAlloc(void **out, size_t size, unsigned flags) {
    if (!depth || flags != 1) { count(5, 1); return INVALID; }
    *out = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    count(3, 1);
    return *out ? 0 : 2;
}
int cuMemFreeHost(void *pointer) { free(pointer); count(3, -1); return 0; }
int cuStreamCreate(void **out, unsigned flags) {
    if (!depth || flags) { count(5, 1); return INVALID; }
    struct stream *s = calloc(1, sizeof *s);
    s->last = &s->first;
    s->context = contexts[depth - 1];
    *out = s;
    count(4, 1);
    return 0;
}
int cuStreamSynchronize(void *stream) {
    struct stream *s = stream;
    int code = 0;
    count(2, 1);
    if (!s) return 0;
    for (struct copy *c = s->first; c;) {
        int wrong = c->up ? standin_write(c->device, c->host, c->size) : standin_read(c->host, c->device, c->size);
        if (wrong) code = INVALID;
        struct copy *next = c->next;
        free(c);
        c = next;
    }
    s->first = NULL;
    s->last = &s->first;
    return code;
}
static int queue(struct stream *s, struct copy copy) {
    struct region *r = find(copy.device);
    // A stream, its context and the memory belong to one device.
    if (!depth || contexts[depth - 1] != s->context || (r && s->context != (void *)(u64)(0x1000 + r->device))) {
        count(5, 1);
        return INVALID;
    }
    if (fail_after == 0) return 700;
    if (fail_after > 0) fail_after--;
    count(copy.up, 1);
    count(7, (long)copy.size);
    struct copy *c = malloc(sizeof *c);
    *c = copy;
    *s->last = c;
    s->last = &c->next;
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t size, void *stream) {
    return queue(stream, (struct copy){0, from, to, size, NULL});
}
int cuMemcpyHtoDAsync_v2(u64 to, const void *from, size_t size, void *stream) {
    return queue(stream, (struct copy){1, to, (void *)from, size, NULL});
}
