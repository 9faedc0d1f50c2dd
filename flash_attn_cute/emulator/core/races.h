/* The race check: which accesses to memory does nothing order? Happens-before with vector clocks (Lamport 1978; Fidge 1988; Mattern
 * 1989) and shadow memory that keeps, as FastTrack does (Flanagan and Freund, PLDI 2009), a few (actor, time) pairs for each place.
 *
 * Actors are warps, the asynchronous units of each warp (wgmma, bulk stores, cp.async, tcgen05), and mbarriers: a bulk load completes
 * on one, and what is known of a phase of the barrier is known of every load that completed in it. Local numbers of actors count
 * within a cluster; with the cluster's number above they name it in the whole launch.
 *
 * With no check Machine.races is NULL, every hook is behind a test of it, and warps run a loop without one. */
#ifndef EMULATOR_RACES_H
#define EMULATOR_RACES_H

#include "machine.h"

/* A vector clock: what is known of each actor (Known: machine.h). */
typedef struct { Known *at; uint32_t length, capacity; } Clock;

/* What is known of another cluster; shared and never changed. */
typedef struct Remote { uint32_t refs; Clock generic, async; } Remote;
typedef struct { uint32_t cluster; Remote *known; } Foreign;

/* What is ordered before a point of the program, for an access through the generic proxy, through the async proxy, and for tcgen05
 * operations on tensor memory. A completed asynchronous operation is known to the first two alike; what was written through the
 * generic proxy is known to the second only after fence.proxy.async (PTX ISA, "Proxies" and "Causality order"). */
typedef struct View {
    Clock generic, async, tensor;
    Foreign *foreign;
    uint32_t foreign_count, foreign_capacity;
} View;

typedef enum {
    UNIT_WARP, UNIT_WGMMA, UNIT_BULK_READ, UNIT_BULK_WRITE, UNIT_CP_ASYNC, UNIT_TENSOR, UNIT_TENSOR_LOAD, UNIT_TENSOR_STORE,
    UNIT_BARRIER, UNIT_COUNT
} Unit;

/* Groups of asynchronous operations: up to which operation each of the last ones reaches, and whose they are. */
#define COMMITS 64
typedef struct { uint32_t count; struct { uint32_t clock, lanes; } ring[COMMITS]; } Commits;

/* A register that wgmma or tcgen05.ld uses. */
typedef struct {
    uint32_t touched;          /* number of wgmma.fences when an ordinary instruction used it last */
    uint32_t product, loading; /* the unit's operation that has it last */
    int32_t touched_line, product_line, loading_line;
    uint32_t shape;            /* of that product */
    int32_t accumulates;
} RegisterUse;

typedef struct RaceWarp {
    uint32_t now;   /* time */
    uint32_t self;  /* local actors, 0 while there is none */
    uint32_t units[UNIT_COUNT], issued[UNIT_COUNT];
    View all, some; /* what every lane knows, of the other lanes too; what some_lanes know */
    uint32_t some_lanes;
    Known copied;         /* cp.async that lanes have waited for, each for its own: to the others known when they synchronise */
    View fenced, observed; /* at the last fence.acq_rel; what relaxed reads saw and the next such fence will make known */
    int32_t fence_scope;
    Clock tensor_seen, tensor_said; /* behind the next fence::after_thread_sync; in front of the last fence::before_thread_sync */
    Commits commits[ASYNC_KINDS];
    uint32_t fences; /* wgmma.fence */
    RegisterUse *registers;
} RaceWarp;

/* An mbarrier, a named barrier or the cluster's barrier. */
typedef struct RaceBarrier {
    View gathered, passed; /* from the arrivals so far; when the last phase ended */
    uint32_t actor, phase;
    uint32_t init_actor, init_clock, init_lanes; /* who initialised it */
    int32_t init_line, init_warp, init_fenced;
    uint32_t offset;
} RaceBarrier;

typedef struct RaceCta {
    uint32_t *cells;                   /* of shared memory, four bytes each: a state's number */
    uint8_t *writers, *readers;        /* of each byte: the lane that did so last */
    uint32_t touched_from, touched_to; /* cells that may hold something */
    uint32_t *tensor_cells;            /* of tensor memory: sixteen lanes of a column */
    uint16_t *barrier_at;              /* of each eight bytes: number in `barriers`, plus one */
    RaceBarrier *barriers;
    uint32_t barrier_count, barrier_capacity;
    RaceBarrier named[NAMED_BARRIERS];
    RaceWarp *warps;
} RaceCta;

typedef struct RaceCluster {
    uint32_t number;      /* of the cluster in the launch */
    uint32_t actor_count; /* local ones given out */
    RaceBarrier barrier;
} RaceCluster;

/* One access as the shadow keeps it. */
typedef struct {
    uint32_t cluster, actor, clock, lanes;
    int32_t line;
    uint8_t bytes, flags, unit, rank, warp;
} Record;

typedef struct { uint32_t refs, count, dying; Record records[]; } State;

/* Who accesses memory now. */
typedef struct {
    const View *view;
    Warp *warp;       /* that executes, or that issued the operation */
    int own;          /* an instruction of the warp itself, not an operation that it issued */
    Known self;       /* what the executing or issuing lanes know of their own warp's accesses */
    Record record;
} Accessor;

#define MEMO 16
typedef struct { uint32_t from, to, serial; uint8_t bytes, flags, pending; } Transition; /* pending: PENDING_* */
enum { PENDING_WRITE = 1, PENDING_READ = 2 };

typedef struct Page { uint64_t number; uint32_t cells[1024]; uint8_t writers[4096], readers[4096]; } Page;

/* A global or shared address that somebody released or acquired. */
typedef struct { uint64_t key; View views[3]; uint32_t cluster[3], rank; } SyncPlace; /* views, and whose, by scope */

typedef struct Races {
    Accessor who;
    uint32_t serial;
    State **states;
    uint32_t state_count, state_capacity, *free_states, free_count, free_capacity, *dying, dying_count, dying_capacity;
    Transition memo[MEMO];
    Page **pages;
    uint64_t page_count, page_capacity;
    Page *last_page;
    SyncPlace **places;
    uint64_t place_count, place_capacity;
    View scratch;
    RaceTables tables;
} Races;

/* race_clocks.c */
void known_join(Known *to, Known from);
Known *clock_at(Clock *clock, uint32_t actor);
int clock_knows(const Clock *clock, uint32_t actor, uint32_t time, uint32_t lanes);
void clock_join(Clock *to, const Clock *from);
void clock_copy(Clock *to, const Clock *from);
void view_join(View *to, const View *from);
void view_join_memory(View *to, const View *from);
void view_fence_foreign(View *view, uint32_t number);
void view_copy(View *to, const View *from);
void view_clear(View *view);
void view_free(View *view);
int view_knows(const View *view, uint32_t own_cluster, const Record *record, int async);
void view_publish(View *to, const View *from, uint32_t cluster, int replace);
void view_receive(View *to, const View *from, uint32_t cluster);

/* race_warps.c */
uint32_t race_new_actor(Cluster *cluster);
View *race_lanes_view(Warp *w, uint32_t mask);
void race_know_tensor(Warp *w, const Clock *from);
const View *race_view(const Warp *w, uint32_t mask);
void race_release(Warp *w, uint32_t mask, View *into);
void race_acquire(Warp *w, uint32_t mask, const View *from);
uint32_t race_unit(Warp *w, Unit unit);
void race_know_unit(Warp *w, uint32_t mask, Unit unit, uint32_t clock);
Known race_self(const Warp *w, uint32_t mask);
int race_own_copy(const Accessor *who, const Record *then);
void race_tell_copies(Warp *w, uint32_t mask, Clock *to);
int race_ordered(const Accessor *who, const Record *then, uint32_t flags);

/* race_barriers.c */
RaceBarrier *race_barrier_at(Cta *cta, uint32_t offset);
void race_fence_inits(Warp *w);
void race_mbarrier_bring(Machine *m, Cta *cta, uint32_t offset, const View *view);

/* race_async.c */
void race_wait_tensor(Warp *w, Unit unit, uint32_t number);

/* race_shadow.c */
void race_begin(Races *races);
void race_forget(Races *races, uint32_t *cells, uint32_t count);
_Noreturn void race_report(Machine *m, const Record *now, const Record *then, const char *where, const char *why);

#endif
