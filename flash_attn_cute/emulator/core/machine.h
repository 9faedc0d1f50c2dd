/* The machine: what a launch is made of while it runs. Every file of the core works on these structures.
 *
 * Registers are lanes first: a 32-bit register is 32 consecutive uint32_t, a 64-bit one 32 uint64_t (two slots), a
 * 128-bit one a low and a high 64-bit register (four slots). Predicates are 32-bit registers of 0 or ~0. Constants and
 * special registers are slots too, filled when a warp starts, so every operand is a slot number. */
#ifndef EMULATOR_MACHINE_H
#define EMULATOR_MACHINE_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

#define LANES 32
#define FULL_MASK 0xffffffffu
#define SHARED_WINDOW (1ull << 60) /* generic addresses of shared memory: window | rank << 24 | offset */
#define LOCAL_WINDOW (2ull << 60)
#define SHARED_FIRST 1024 /* the first offset a program may use: the hardware keeps the first KiB for itself */
#define SHARED_OFFSET_MASK 0xffffffu
#define TMEM_LANES 128
#define TMEM_COLUMNS 512
#define MAX_WARPS 32
#define NAMED_BARRIERS 16
#define MAX_FRAGMENTS 32
#define MAX_CLUSTER 16

/* Vectorised loops are compiled twice, for the baseline and for AVX2; the loader picks. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONED __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define CLONED
#endif

/* One instruction, as engine.py lays it out (numpy dtype INSTRUCTION in assembler.py). */
typedef struct Instr {
    uint16_t op;     /* index into opcodes.def */
    uint8_t guarded; /* 0: always, 1: where the guard holds, 2: where it does not */
    uint8_t cls;     /* what the report counts it as; the core does not look */
    int32_t guard;   /* slot of the guard */
    int32_t r[8];    /* operand slots; -1 where absent */
    int32_t pool;    /* first entry of longer operand lists in Program.pool */
    int32_t line;    /* PTX line */
    uint32_t sub;    /* variant: comparison, rounding, element size, ... as the handler defines */
    int32_t target;  /* branch target */
    int64_t imm;     /* immediate: address offset, barrier count, ... */
} Instr;

typedef struct { int32_t slot, wide; uint64_t value; } Constant; /* wide: 0 32-bit, 1 64-bit */

typedef enum {
    SPECIAL_TID_X, SPECIAL_TID_Y, SPECIAL_TID_Z, SPECIAL_NTID_X, SPECIAL_NTID_Y, SPECIAL_NTID_Z,
    SPECIAL_CTAID_X, SPECIAL_CTAID_Y, SPECIAL_CTAID_Z, SPECIAL_NCTAID_X, SPECIAL_NCTAID_Y, SPECIAL_NCTAID_Z,
    SPECIAL_LANEID, SPECIAL_WARPID, SPECIAL_NWARPID, SPECIAL_SMID, SPECIAL_NSMID,
    SPECIAL_CLUSTERID_X, SPECIAL_CLUSTERID_Y, SPECIAL_CLUSTERID_Z,
    SPECIAL_NCLUSTERID_X, SPECIAL_NCLUSTERID_Y, SPECIAL_NCLUSTERID_Z,
    SPECIAL_CLUSTER_CTAID_X, SPECIAL_CLUSTER_CTAID_Y, SPECIAL_CLUSTER_CTAID_Z,
    SPECIAL_CLUSTER_NCTAID_X, SPECIAL_CLUSTER_NCTAID_Y, SPECIAL_CLUSTER_NCTAID_Z,
    SPECIAL_CLUSTER_CTARANK, SPECIAL_CLUSTER_NCTARANK, SPECIAL_IS_EXPLICIT_CLUSTER,
    SPECIAL_LANEMASK_EQ, SPECIAL_LANEMASK_LT, SPECIAL_LANEMASK_LE, SPECIAL_LANEMASK_GT, SPECIAL_LANEMASK_GE,
    SPECIAL_DYNAMIC_SMEM_SIZE, SPECIAL_TOTAL_SMEM_SIZE, SPECIAL_GRIDID,
    SPECIAL_SHARED_ADDRESS, /* value is the offset; the slot gets rank << 24 | offset */
    SPECIAL_ZERO
} Special;
typedef struct { int32_t slot, wide, special; uint32_t value; } SpecialSlot;

typedef struct {
    const Instr *code;
    int32_t length;
    const int32_t *pool;
    const Constant *constants;
    int32_t constant_count;
    const SpecialSlot *specials;
    int32_t special_count;
    int32_t slots;       /* 32-bit slots of a warp's register file */
    int32_t local_bytes; /* local memory of a thread */
    const char *const *names; /* of instructions that are not known, by Instr.pool */
    const char *kernel;
} Program;

typedef struct { uint64_t address, size; int32_t writable, pad; const char *name; } Allocation;

/* What a fragment of a warp waits for before it can go on. */
typedef enum { WAIT_NONE, WAIT_CONVERGE, WAIT_BARRIER, WAIT_CLUSTER, WAIT_WGMMA, WAIT_TCGEN05, WAIT_CP_ASYNC, WAIT_BULK, WAIT_WARP } WaitKind;

typedef struct {
    uint32_t mask;
    int32_t pc;
    WaitKind wait;
    uint32_t value;   /* convergence: lanes needed; barrier: its number; groups: how many may stay pending */
    uint32_t phase;   /* barrier: the phase that has to pass */
    int32_t yielded;  /* it gave its turn away, e.g. after a failed try_wait */
} Fragment;

/* Operations that complete after the instruction that starts them. */
typedef enum { ASYNC_TMA_LOAD, ASYNC_TMA_STORE, ASYNC_WGMMA, ASYNC_TCGEN05, ASYNC_CP, ASYNC_KINDS } AsyncKind;

struct Cta;
struct Machine;

typedef struct Warp {
    uint32_t *regs;
    struct Cta *cta;
    struct Machine *machine;
    int32_t index; /* in the CTA */
    /* The running fragment, unpacked. */
    int32_t pc, next;
    uint32_t mask;
    int32_t event; /* set by a handler: EVENT_* */
    int32_t current;
    uint32_t live; /* lanes that have not exited */
    Fragment fragments[MAX_FRAGMENTS];
    int32_t fragment_count;
    uint32_t carry; /* the carry flag of add.cc and friends, a bit a lane */
    uint8_t *local;
    int32_t last_allocation; /* most accesses of a warp go where its last one went */
    int32_t cluster_arrived; /* the cluster barrier's phase this warp arrived at */
    int32_t last_wait_line;  /* of the last failed wait, for dumps */
    uint32_t last_wait_address, last_wait_phase;
    int32_t commits[ASYNC_KINDS][LANES]; /* groups committed so far, by kind and thread */
    int64_t *executed, *skipped; /* of Machine, the rows of this warp's index */
    struct RaceWarp *race;       /* NULL without a race check, as in the structures below */
} Warp;

typedef struct {
    int32_t expected, arrived; /* in threads */
    uint32_t phase, result_and, result_or, result_count;
} NamedBarrier;

typedef struct Cta {
    struct Cluster *cluster;
    struct Machine *machine;
    uint8_t *shared, *shadow; /* shadow: 1 where a byte was written, 2 where it is (part of) a live mbarrier */
    uint32_t *tmem;           /* TMEM_LANES x TMEM_COLUMNS words */
    uint8_t *tmem_written;
    uint8_t tmem_owner[TMEM_COLUMNS]; /* nonzero where a column is allocated: number of its first column / 32 + 1 */
    int32_t tmem_permit_given_up;
    uint32_t shared_bytes;
    int32_t rank; /* in the cluster */
    uint32_t id[3];
    Warp *warps;
    int32_t warp_count, live_warps;
    NamedBarrier barriers[NAMED_BARRIERS];
    struct RaceCta *race;
} Cta;

typedef struct Cluster {
    Cta *ctas;
    int32_t size;
    int32_t running; /* warps that still live */
    uint32_t id[3];
    int32_t slot;
    uint32_t cluster_phase;
    int32_t cluster_arrived; /* threads */
    int32_t live_threads;
    int64_t index;
    struct RaceCluster *race;
} Cluster;

typedef enum { EVENT_NONE, EVENT_YIELD, EVENT_SWITCH, EVENT_EXIT } Event;

typedef enum {
    FAULT_NONE, FAULT_UNKNOWN_INSTRUCTION, FAULT_OUT_OF_BOUNDS, FAULT_MISALIGNED, FAULT_UNINITIALISED,
    FAULT_BARRIER, FAULT_DEADLOCK, FAULT_LEAK, FAULT_TRAP, FAULT_CONVERGENCE, FAULT_UNSUPPORTED, FAULT_INTERNAL, FAULT_RACE
} FaultKind;

typedef enum { SCHEDULE_IN_ORDER, SCHEDULE_RANDOM, SCHEDULE_DELAYED } Schedule;
enum { CHECK_BOUNDS = 1, CHECK_UNINITIALISED = 2, CHECK_ALIGNMENT = 4, CHECK_BARRIERS = 8, CHECK_LEAKS = 16, CHECK_RACES = 32, CHECK_TCGEN05 = 64 };

/* Accesses to shared memory by warps: instructions, wavefronts that they took, and how many of those to conflicts of banks. */
typedef enum { SHARED_LOAD, SHARED_STORE, SHARED_LDMATRIX, SHARED_STMATRIX, SHARED_ACCESSES } SharedAccess;
typedef struct { int64_t accesses, wavefronts, conflicts; } SharedTotals;

/* The launch's totals, copied out for the report (ctypes mirror: engine.py). */
typedef struct {
    int64_t mma_flops;      /* multiply-adds issued to the tensor cores */
    int64_t mma_cycles_x16; /* their cost in sixteenths of a clock of one SM */
    int64_t tma_load_bytes, tma_store_bytes, tma_reduce_bytes; /* of boxes, also what lies outside the tensor */
    int64_t global_load_bytes, global_store_bytes;             /* by anybody; of TMA what lies inside */
    SharedTotals shared[SHARED_ACCESSES];
    int64_t ctas, slices, deferred_operations;
} Totals;

struct AsyncOp;

typedef struct Machine {
    Program program;
    const Allocation *allocations;
    int32_t allocation_count;
    uint32_t grid[3], block[3], cluster_shape[3];
    uint32_t shared_bytes, dynamic_shared;
    int32_t sms, arch; /* arch: 90, 100, ... */
    Schedule schedule;
    uint32_t checks;
    uint64_t random;
    Cluster *clusters; /* resident slots */
    int32_t resident;
    int64_t next_cluster, cluster_count;
    int64_t progress; /* grows whenever something happened that could release a waiting warp */
    struct AsyncOp *pending, **pending_tail;
    int64_t pending_count;
    Totals totals;
    /* [warp's index in its CTA][instruction], over all CTAs: how often it ran, and how often its guard held in no lane. */
    int64_t *executed, *skipped;
    jmp_buf escape;
    FaultKind fault;
    int32_t fault_line, other_line; /* other: of the access that a race is with */
    struct Races *races;            /* NULL without a race check */
    char message[16384];
} Machine;

typedef void (*Handler)(Warp *w, const Instr *in, uint32_t mask);

/* lanes of an operand */
static inline uint32_t *lanes32(Warp *w, int32_t slot) { return w->regs + (size_t)slot * LANES; }
static inline uint64_t *lanes64(Warp *w, int32_t slot) { return (uint64_t *)(w->regs + (size_t)slot * LANES); }
#define R32(n) lanes32(w, in->r[n])
#define R64(n) lanes64(w, in->r[n])
#define RF(n) ((float *)lanes32(w, in->r[n]))
#define RD(n) ((double *)lanes32(w, in->r[n]))
#define POOL(n) (w->machine->program.pool[in->pool + (n)])

/* Runs `body` for each active lane i, one after another: for bodies that touch more than their own lane of registers. */
#define EACH_LANE(...)                                           \
    do {                                                         \
        for (uint32_t left_ = mask; left_; left_ &= left_ - 1) { \
            int i = __builtin_ctz(left_);                        \
            __VA_ARGS__;                                         \
        }                                                        \
    } while (0)

/* The same for bodies whose lanes are independent of each other, which the compiler may believe; without a mask when all are active, so that it becomes vector code. */
#define FOR_LANES(...)                                               \
    do {                                                             \
        if (mask == FULL_MASK) {                                     \
            _Pragma("GCC ivdep") for (int i = 0; i < LANES; i++) {   \
                __VA_ARGS__;                                         \
            }                                                        \
        } else {                                                     \
            for (uint32_t left_ = mask; left_; left_ &= left_ - 1) { \
                int i = __builtin_ctz(left_);                        \
                __VA_ARGS__;                                         \
            }                                                        \
        }                                                            \
    } while (0)

#define UNUSED(x) ((void)(x))

static inline uint32_t bits_of(float value) { union { float f; uint32_t u; } both = {value}; return both.u; }
static inline float float_of(uint32_t bits) { union { uint32_t u; float f; } both = {bits}; return both.f; }

/* A predicate register's lanes as a bit mask. */
uint32_t mask_of(const uint32_t *lanes);
void lanes_of(uint32_t *lanes, uint32_t bits, uint32_t mask);

/* checks.c */
_Noreturn void fault(Warp *w, const Instr *in, FaultKind kind, const char *format, ...) __attribute__((format(printf, 4, 5)));
_Noreturn void machine_fault(Machine *m, FaultKind kind, int32_t line, const char *format, ...) __attribute__((format(printf, 4, 5)));
_Noreturn void report_deadlock(Machine *m, const char *why);
void check_leaks(Cluster *cluster);

/* memory.c */
uint8_t *global_span(Warp *w, const Instr *in, uint64_t address, uint64_t size, int write);
uint8_t *global_range(Machine *m, int32_t *hint, uint64_t address, uint64_t size, int write, const char **why);
Cta *shared_owner(Warp *w, const Instr *in, uint32_t address);
uint8_t *shared_read(Warp *w, const Instr *in, uint32_t address, uint32_t size);
uint8_t *shared_write(Warp *w, const Instr *in, uint32_t address, uint32_t size);
uint8_t *generic_span(Warp *w, const Instr *in, int lane, uint64_t address, uint32_t size, int write);
void shared_mark(Cta *cta, uint32_t offset, uint32_t size);
void shared_check_written(Machine *m, int32_t line, Cta *cta, uint32_t offset, uint32_t size, const char *who);

/* banks.c */
void count_wavefronts(Machine *m, SharedAccess access, const uint32_t *addresses, uint32_t mask, uint32_t size);

/* warp.c */
int warp_pick(Warp *w);
int warp_run(Warp *w, int budget);
int gather_lanes(Warp *w, uint32_t needed);
int require_lanes(Warp *w, uint32_t needed);
void warp_retry(Warp *w);
void warp_block(Warp *w, WaitKind kind, uint32_t value, uint32_t phase);
void warp_save(Warp *w);

/* barrier.c */
void mbarrier_complete_tx(Machine *m, int32_t line, Cta *cta, uint32_t offset, int32_t bytes);
void mbarrier_arrive(Machine *m, int32_t line, Cta *cta, uint32_t offset, uint32_t count);
int mbarrier_describe(Warp *w, char *out, size_t size);
int mbarrier_outstanding(const Cta *cta, uint32_t offset);
void barrier_lanes_exited(Warp *w, uint32_t lanes);
int fragment_ready(Warp *w, Fragment *fragment);

/* scheduler.c */
uint32_t machine_random(Machine *m, uint32_t below);
int launch_next(Machine *m, int slot);
int engine_run(Machine *m);

/* What somebody knows of an actor (races.h): everything that all its lanes did up to `all`, and what `lanes` did up to `some`. */
typedef struct Known { uint32_t all, some, lanes; } Known;

/* async.c */
typedef struct AsyncOp {
    struct AsyncOp *next;
    AsyncKind kind;
    const void *stream; /* operations of one stream run in the order they were issued; NULL: no order */
    Cluster *cluster;
    Warp *warp; /* who issued it */
    const Instr *in;
    uint32_t lane; /* that issued it, for groups a thread */
    int32_t group; /* commit group it belongs to, or -1 while it is not committed */
    void (*run)(Machine *m, struct AsyncOp *op);
    uint64_t args[10];
    uint32_t words[24];
    uint32_t race_clock;    /* its number among those of its unit */
    Known race_self;        /* what the issuing lane knows of its warp */
    struct View *race_view; /* what it knows beside, where it runs later; NULL: what its warp knows */
} AsyncOp;
void async_issue(Machine *m, const AsyncOp *op);
int async_run_one(Machine *m);
void async_drain(Machine *m, const Cluster *cluster);
int async_pending_groups(Warp *w, AsyncKind kind, uint32_t lanes);
void async_commit_group(Warp *w, AsyncKind kind, uint32_t lanes);

/* mma.c */
void decode_row(float *out, const uint8_t *bytes, int count, int format);
void matmul_rows(float *d, size_t d_stride, const float *a, size_t a_stride, const float *b, size_t b_stride, int m, int n, int k);
/* Of the last four, the first is two numbers a byte; of the others sixteen lie at the start of sixteen bytes. */
enum { FORMAT_F16, FORMAT_BF16, FORMAT_TF32, FORMAT_E4M3, FORMAT_E5M2, FORMAT_S8, FORMAT_U8, FORMAT_E2M3, FORMAT_E3M2, FORMAT_E2M1,
       FORMAT_E2M1_PACKED, FORMAT_E2M1_SPREAD, FORMAT_E2M3_SPREAD, FORMAT_E3M2_SPREAD };
void widen_chunk(uint8_t out[16], const uint8_t *bytes, int bits); /* sixteen spread numbers, a byte each */
void decode_bytes(float *out, const uint8_t *bytes, int count, int format); /* of a spread format, as widen_chunk leaves them */
int format_bytes(int format);    /* that one number takes, where it takes whole bytes */
int format_elements(int format); /* numbers in 32 bytes, what a tensor instruction takes of a row */

/* A matrix in shared memory as a tensor instruction describes it. */
typedef struct {
    uint32_t start, lbo, sbo; /* bytes */
    uint32_t width, swizzle;  /* bytes of a swizzled row; address bits that the row number is mixed into */
    uint32_t shift, group;    /* how far those bits are from the row number's; rows of an atom along k, MN-major */
    int mn_major, format;
} SharedOperand;
uint32_t operand_address(const SharedOperand *o, int mn, int k_byte, int mn_byte, int k);
void decode_operand(Machine *m, int32_t line, Cta *cta, const SharedOperand *o, int first, int count, int k_count, float *out,
                    size_t row_stride, size_t k_stride);
uint64_t atomic_combine(uint32_t what, uint32_t type, int bytes, uint64_t old, uint64_t value, uint64_t other); /* atomics.c */

/* tcgen05.c: `count` columns of a lane, checked as any read of tensor memory. */
const uint32_t *tmem_read(Machine *m, int32_t line, Cta *cta, uint32_t lane, uint32_t column, uint32_t count);

/* block_scale.c */
typedef struct { uint32_t address, first_byte, count, is_exponent; } ScaleVector; /* `count` bytes a row, from a byte of each word on */
void apply_scales(Machine *m, int32_t line, Cta *cta, const ScaleVector *scales, uint32_t lane, int rows, int k_count, float *out,
                  size_t row_stride, size_t k_stride);

float float_minmax(float a, float b, uint32_t sub); /* alu_float.c; sub: 4 ftz, 32 NaN, 64 xorsign, 128 maximum, 256 abs */

/* number formats, convert.c */
float small_to_float(int format, uint8_t v);
float half_to_float(uint16_t h);
float bfloat_to_float(uint16_t b);
uint16_t float_to_half(float f);
uint16_t double_to_half(double d);
uint16_t float_to_bfloat(float f);
float e4m3_to_float(uint8_t v);
float e5m2_to_float(uint8_t v);
uint8_t float_to_e4m3(float f);
uint8_t float_to_e5m2(float f);

extern const Handler handlers[];

/* The race check's hooks: races.h explains it. Call them only where Machine.races is set. */
enum { TOUCH_WRITE = 1, TOUCH_STRONG = 2, TOUCH_ASYNC = 4, TOUCH_TENSOR = 8, TOUCH_SCOPE_SHIFT = 4, TOUCH_READS_FENCED = 64 };
enum { SCOPE_CTA, SCOPE_CLUSTER, SCOPE_GPU };
enum { LANE_NONE = -1, LANE_WARP = -2 }; /* instead of a lane: an asynchronous operation; the warp as a whole */
typedef enum {
    FENCE_WARP, FENCE_PROXY_ASYNC, FENCE_MEMORY, FENCE_MBARRIER_INIT, FENCE_WGMMA, FENCE_TENSOR_BEFORE, FENCE_TENSOR_AFTER,
    FENCE_TENSOR_LOADS, FENCE_TENSOR_STORES
} FenceKind;

/* Which registers of wgmma and tcgen05.ld each instruction names (engine.py), and which fences of tcgen05 the kernel uses at all. */
typedef struct {
    const int32_t *ordinary, *asynchronous, *list; /* of an instruction: from where to where in the list */
    int32_t count, copy_operation, before_fences, after_fences;
} RaceTables;

void race_create(Machine *m, const RaceTables *tables);
void race_destroy(Machine *m);
void race_start_cluster(Cluster *cluster);
void race_end_cluster(Cluster *cluster);
void race_registers(Warp *w, const Instr *in);
void race_product_registers(Warp *w, const Instr *in, int sums);
void race_loaded_registers(Warp *w, const Instr *in);
void race_warp_sync(Warp *w, uint32_t members);
void race_begin_warp(Warp *w, const Instr *in, uint32_t mask);
void race_free_columns(Warp *w, const Instr *in, uint32_t column, uint32_t count);
void race_take_columns(Cta *cta, uint32_t column, uint32_t count);
void race_begin_tensor(Warp *w, const Instr *in, int loading);
void race_touch_shared(Machine *m, Cta *cta, uint32_t offset, uint32_t size, int lane, uint32_t flags);
void race_touch_global(Machine *m, uint64_t address, uint64_t size, int lane, uint32_t flags);
void race_touch_tensor(Machine *m, Cta *cta, uint32_t lane, uint32_t column, uint32_t count, uint32_t flags);
int race_may_write(const Warp *w);
void race_touch(Warp *w, uint64_t address, uint32_t size, int lane, uint32_t flags);
void race_order(Warp *w, int lane, uint64_t address, uint32_t order, int write, int read);
void race_mbarrier_init(Warp *w, const Instr *in, int lane, Cta *cta, uint32_t offset);
void race_mbarrier_arrive(Warp *w, const Instr *in, uint32_t mask, Cta *cta, uint32_t offset, int release);
void race_mbarrier_waited(Warp *w, const Instr *in, uint32_t mask, Cta *cta, uint32_t offset, int acquire);
void race_mbarrier_passed(Cta *cta, uint32_t offset);
void race_on_barrier(Machine *m, Cta *cta, uint32_t offset);
void race_bring(Machine *m, const AsyncOp *op, Cta *cta, uint32_t offset);
void race_named_arrive(Warp *w, uint32_t mask, uint32_t number);
void race_named_complete(Warp *last, uint32_t mask, uint32_t number, int waits);
void race_cluster_arrive(Warp *w, uint32_t mask, int release);
void race_cluster_complete(Cluster *cluster);
void race_cluster_wait(Warp *w, uint32_t mask);
void race_issue(AsyncOp *op, int later);
void race_run(Machine *m, const AsyncOp *op);
void race_ran(const AsyncOp *op);
void race_store_global(Machine *m, uint64_t address, uint64_t size, int atomic);
void race_commit_group(Warp *w, AsyncKind kind, uint32_t lanes);
void race_wait_group(Warp *w, AsyncKind kind, uint32_t lanes, int pending, int read_only);
void race_fence(Warp *w, const Instr *in, uint32_t mask);

#endif
