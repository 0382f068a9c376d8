// The CPU stand-in for CUDA: the scheduler, device memory, and the part of the CUDA runtime that a trainer uses.
// README.md says what it is good for, and lists the environment variables. In this file:
//
//   1  Settings and reports            5  Asynchronous copies, matrix instructions
//   2  Device memory                   6  Launches, and the order check
//   3  Stacks                          7  The CUDA runtime
//   4  The threads of a block
#include "standin.h"
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __has_feature  // clang
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace standin {

// ---------------------------------------------------------------------------------------------------------------------
// 1. Settings and reports

static long setting(const char* name, long otherwise) {
    const char* s = getenv(name);
    return s && *s ? atol(s) : otherwise;
}

enum Order { FORWARD, REVERSE, SHUFFLE };
static const char* const order_names[] = {"forward", "reverse", "shuffle"};
static Order setting_order() {
    std::string s = getenv("STANDIN_ORDER") ? getenv("STANDIN_ORDER") : "forward";
    for (Order order : {FORWARD, REVERSE, SHUFFLE})
        if (s == order_names[order]) return order;
    fprintf(stderr, "standin: STANDIN_ORDER is forward, reverse or shuffle, not %s\n", s.c_str());
    exit(1);
}

const int lazy = (int)setting("STANDIN_LAZY", 0);
enum { LAZY_COPIES = 1, LAZY_WGMMA = 2, LAZY_STREAM = 4 };
static const Order the_order = setting_order();
static const bool check = setting("STANDIN_CHECK", 0), trace = setting("STANDIN_TRACE", 0);
static const bool protect = check || setting("STANDIN_PROTECT", 0);
static const bool print_times = setting("STANDIN_TIME", 0), print_counts = setting("STANDIN_COUNT", 0);
static const long seed = setting("STANDIN_SEED", 1);
static const int devices = (int)setting("STANDIN_DEVICES", 1), arch = (int)setting("STANDIN_ARCH", 90);
static const size_t memory_limit = (size_t)setting("STANDIN_MEMORY", 16384) << 20;

int cpu_threads() {
#ifdef _OPENMP
    // the order check wants the exact order of blocks, which several CPU threads do not keep
    static const int n = (int)std::max(1L, setting("STANDIN_THREADS", check ? 1 : omp_get_max_threads()));
    return n;
#else
    return 1;
#endif
}

static const size_t SHARED_DEFAULT = 48 << 10;  // what a kernel gets without asking
// CUDA C++ Programming Guide, Compute Capabilities: RTX cards have less
static size_t shared_limit() {
    return (size_t)(arch == 80 || arch == 87 ? 163 : arch >= 90 && arch < 120 ? 227 : 99) << 10;
}

double now_ms() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

static __thread const char* kernel_name;  // what runs on this CPU thread; null outside of kernels

void fail(const char* format, ...) {
    fflush(stdout);
    fprintf(stderr, "standin: ");
    if (kernel_name)
        fprintf(stderr, "%s, block (%u, %u, %u), thread (%u, %u, %u): ", kernel_name, blockIdx.x, blockIdx.y,
                blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    va_list a;
    va_start(a, format);
    vfprintf(stderr, format, a);
    va_end(a);
    fprintf(stderr, "\n");
    abort();
}

static cudaError_t last_error = cudaSuccess;
static cudaError_t result(cudaError_t error) {
    if (error) last_error = error;
    return error;
}

cudaError_t refuse(cudaError_t error, const char* format, ...) {
    fflush(stdout);
    fprintf(stderr, "standin: ");
    va_list a;
    va_start(a, format);
    vfprintf(stderr, format, a);
    va_end(a);
    fprintf(stderr, "\n");
    return result(error);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Device memory
//
// It lies in a large reserved range of addresses. Every allocation has pages of its own and ends where they end, up to
// the 256 bytes to which it is aligned; then comes a page that cannot be touched. Addresses are never used twice. So
// what runs past an end by 256 bytes, or uses memory that was freed, is caught even without a sanitizer, which catches
// it to the byte. Fresh memory has all bits set, which floats read as NaN.
//
// Behind that range lie two more of its size, for copies of device memory at the same distance. The order check needs
// the state before a kernel and the one after its first run, of what the kernel writes. To know what that is, device
// memory is read-only meanwhile: the first write to a piece of it ends in on_fault, which saves the piece.

static const size_t PAGE = 4096;
static const size_t PIECE = 16 * PAGE;  // what on_fault saves at a time: to copy it takes about as long as the fault

struct Allocation {
    char* at;
    size_t bytes;        // as asked for
    char* pages;         // its pages, and their size
    size_t page_bytes;
    bool host;           // memory that the host may touch as well
    long number;
};
static std::map<char*, Allocation> allocations;
static std::mutex allocations_lock;
static char *arena, *arena_next;
static size_t arena_bytes, memory_used;

static bool in_arena(const void* p) { return arena && (char*)p >= arena && (char*)p < arena + arena_bytes; }

// The allocation whose pages hold this address; null if none
static const Allocation* allocation_at(const void* p) {
    auto a = allocations.upper_bound((char*)p);
    if (a != allocations.end() && (char*)p >= a->second.pages) return &a->second;
    if (a == allocations.begin()) return nullptr;
    --a;
    return (char*)p < a->second.pages + a->second.page_bytes ? &a->second : nullptr;
}

bool on_device(const void* p, size_t bytes) {
    const Allocation* a = allocation_at(p);
    return a && (char*)p >= a->at && (char*)p + bytes <= a->at + a->bytes;
}

static void set_access(int device, int host) {
    for (auto& [at, a] : allocations) mprotect(a.pages, a.page_bytes, a.host ? host : device);
}
static int memory_open;
OpenMemory::OpenMemory() {
    if (protect && memory_open++ == 0) set_access(PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE);
}
OpenMemory::~OpenMemory() {
    if (protect && --memory_open == 0) set_access(PROT_NONE, PROT_READ | PROT_WRITE);
}

struct Piece { char* at; size_t bytes, page; };
static std::vector<Piece> pieces;              // what was saved since saving began
static std::vector<bool> saved;                // by page number, for the first page of a piece
static bool saving;
static std::atomic_flag saving_lock = ATOMIC_FLAG_INIT;
static char* before(char* at) { return at + arena_bytes; }
static char* after_first(char* at) { return at + 2 * arena_bytes; }

static void save_piece(const Allocation& a, char* at) {
    while (saving_lock.test_and_set()) {}
    char* begin = std::max(a.pages, arena + (at - arena) / PIECE * PIECE);
    char* end = std::min(a.pages + a.page_bytes, arena + ((at - arena) / PIECE + 1) * PIECE);
    size_t page = (begin - arena) / PAGE;
    if (saved.size() <= page) saved.resize(page + page / 2 + 1);
    if (!saved[page]) {  // else another CPU thread has just done it
        saved[page] = true;
        char *from = std::max(a.at, begin), *to = std::min(a.at + a.bytes, end);
        size_t bytes = from < to ? to - from : 0;
        memcpy(before(from), from, bytes);
        pieces.push_back({from, bytes, page});
        mprotect(begin, end - begin, PROT_READ | PROT_WRITE);
    }
    saving_lock.clear();
}

static struct sigaction previous_handler;
static bool in_stack_guard(const char* at);

static void on_fault(int signal, siginfo_t* info, void*) {
    char* at = (char*)info->si_addr;
    if (in_arena(at)) {
        const Allocation* a = allocation_at(at);
        if (a && saving) return save_piece(*a, at);
        if (a && !kernel_name)
            fail("the host touches device memory: byte %ld of an allocation of %zu bytes", at - a->at, a->bytes);
        auto next = allocations.upper_bound(at);
        if (next != allocations.begin()) {
            const Allocation& b = (--next)->second;
            if (at < b.pages + b.page_bytes + PAGE)
                fail("touches device memory %ld bytes past the end of an allocation of %zu bytes",
                     at - (b.at + b.bytes), b.bytes);
        }
        fail("touches device memory that is not allocated (freed, or out of bounds)");
    }
    if (kernel_name) {
        if (in_stack_guard(at)) fail("the thread's stack is full: its variables need more, see STANDIN_STACK");
        if (info->si_code == SI_KERNEL)
            fail("an access of 16 bytes or more at an address that is not a multiple of its size");
        if (at < (char*)PAGE) fail("touches address %p", at);
    }
    sigaction(signal, &previous_handler, nullptr);  // the instruction runs again, and meets the previous handler
}

// The handler has a stack of its own in every CPU thread, because a fiber's may be full.
static void install_handler() {
    static __thread char* stack;
    if (stack) return;
    const size_t bytes = 256 << 10;
    stack = (char*)malloc(bytes);
    stack_t s = {};
    s.ss_sp = stack, s.ss_size = bytes;
    sigaltstack(&s, nullptr);
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &previous_handler);
    });
}

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

static cudaError_t allocate(void** p, size_t bytes, bool host) {
    *p = nullptr;
    if (!devices) return result(cudaErrorNoDevice);
    if (!bytes) return cudaSuccess;
    std::lock_guard<std::mutex> lock(allocations_lock);
    install_handler();
    if (!arena) {
        void* range = MAP_FAILED;
        for (arena_bytes = (size_t)256 << 30; range == MAP_FAILED && arena_bytes >= (size_t)1 << 30; arena_bytes /= 2) {
            range = mmap(nullptr, 3 * arena_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (range != MAP_FAILED) break;
        }
        if (range == MAP_FAILED) return result(cudaErrorMemoryAllocation);
        arena = arena_next = (char*)range;
        mprotect(before(arena), 2 * arena_bytes, PROT_READ | PROT_WRITE);
        madvise(arena, 3 * arena_bytes, MADV_DONTDUMP);
    }
    static long number;
    Allocation a = {};
    a.bytes = bytes, a.host = host, a.number = ++number;
    a.pages = arena_next;
    a.page_bytes = round_up(round_up(bytes, 256), PAGE);
    a.at = a.pages + a.page_bytes - round_up(bytes, 256);
    if (memory_used + bytes > memory_limit || a.pages + a.page_bytes + PAGE > arena + arena_bytes)
        return result(cudaErrorMemoryAllocation);
    arena_next = a.pages + a.page_bytes + PAGE;
    if (mprotect(a.pages, a.page_bytes, PROT_READ | PROT_WRITE)) return result(cudaErrorMemoryAllocation);
    ASAN_UNPOISON_MEMORY_REGION(a.pages, a.page_bytes);
    memset(a.pages, 0xff, a.page_bytes);
    ASAN_POISON_MEMORY_REGION(a.pages, a.page_bytes);
    ASAN_UNPOISON_MEMORY_REGION(a.at, bytes);
    if (protect && !host && !memory_open) mprotect(a.pages, a.page_bytes, PROT_NONE);
    memory_used += bytes;
    allocations[a.at] = a;
    *p = a.at;
    return cudaSuccess;
}

// What lies between the end of an allocation and its last page's is nobody's.
static void check_end(const Allocation& a) {
#ifdef __SANITIZE_ADDRESS__
    (void)a;  // it has seen such a write already, and does not let us look
#else
    OpenMemory open;
    for (const char* p = a.at + a.bytes; p < a.pages + a.page_bytes; p++)
        if (*p != (char)0xff)
            fail("something wrote past an end: to byte %ld of allocation %ld, which has %zu", p - a.at, a.number,
                 a.bytes);
#endif
}

static cudaError_t release_memory(void* p, bool host) {
    if (!p) return cudaSuccess;
    auto a = allocations.find((char*)p);
    if (a == allocations.end() || a->second.host != host)
        return refuse(cudaErrorInvalidValue, "%s: not the start of such an allocation (or freed twice)",
                      host ? "cudaFreeHost" : "cudaFree");
    check_end(a->second);
    std::lock_guard<std::mutex> lock(allocations_lock);
    char* pages = a->second.pages;
    size_t bytes = a->second.page_bytes;
    ASAN_POISON_MEMORY_REGION(pages, bytes);
    for (char* copy : {pages, before(pages), after_first(pages)}) madvise(copy, bytes, MADV_DONTNEED);
    mprotect(pages, bytes, PROT_NONE);
    memory_used -= a->second.bytes;
    allocations.erase(a);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Stacks
//
// A thread that must wait leaves its state on its stack, and another goes on from its own: a switch saves the
// registers that a function must preserve, and changes the stack pointer.

struct Stack {
    void* pointer;      // where it goes on
    char *bottom, *top;
    void* fake;         // for the address sanitizer
    Stack* next;        // in the list of unused ones
};

#if defined __x86_64__
extern "C" void standin_switch(void** save, void* to);
asm(".text\n"
    ".globl standin_switch\n"
    ".type standin_switch, @function\n"
    "standin_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n");
static void prepare(Stack& stack, void (*function)()) {
    void** p = (void**)stack.top;
    *--p = nullptr;             // where function would return to; also aligns its frame
    *--p = (void*)function;     // where standin_switch returns to
    p -= 6;                     // its registers
    stack.pointer = p;
}
#else
#include <ucontext.h>
static void standin_switch(void** save, void* to) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, (ucontext_t*)to);
}
static void prepare(Stack& stack, void (*function)()) {
    ucontext_t* context = (ucontext_t*)stack.bottom;    // lies at the far end of the stack
    getcontext(context);
    context->uc_stack.ss_sp = stack.bottom + sizeof *context;
    context->uc_stack.ss_size = stack.top - stack.bottom - sizeof *context;
    context->uc_link = nullptr;
    makecontext(context, function, 0);
    stack.pointer = context;
}
#endif

static inline void switch_stack(Stack& from, Stack& to, bool from_is_done) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(from_is_done ? nullptr : &from.fake, to.bottom, to.top - to.bottom);
    standin_switch(&from.pointer, to.pointer);
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#else
    (void)from_is_done;
    standin_switch(&from.pointer, to.pointer);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. The threads of a block
//
// Warps run in some order, each until all of its lanes wait for the block or have ended; within a warp, lanes run in
// some order, each until it must wait. So a thread runs as far ahead of the next one as the program allows: in the
// forward order the first warp reaches the next __syncthreads() before the second one begins, in the reverse order
// it is the last warp. That is what brings missing barriers to light.
//
// A thread gets a stack when it begins. One that ends without having waited leaves its stack to the next, so kernels
// without barriers run as plain loops.

struct Copy { void* to; const void* from; bool wanted; int group; };
struct Product { int n; bool transposed_a, transposed_b; float* d[32]; uint64_t a, b; int group; };
template <class T> struct Queue {  // of asynchronous work, in committed groups
    std::vector<T> work;
    size_t done = 0;
    int groups = 0;
    void clear() { work.clear(), done = 0, groups = 0; }
    template <class Do> void wait(int n, Do run) {
        while (done < work.size() && work[done].group < groups - n) run(work[done++]);
        if (done == work.size()) work.clear(), done = 0;
    }
};

struct Grid {  // a launch that runs
    const Launch& launch;
    void (*call)(const void*);
    const void* argument;
    Order order;
    long number;                       // of the launch, for the shuffled order
    std::vector<uint3> thread_index;   // of each thread of a block
};

struct Worker {  // a CPU thread that runs blocks, and the state of its block
    const Grid* grid;
    int threads, alive;                // of the block
    Warp warps[32];
    Stack* stack[1024];                // of each thread, null before it has begun
    int num_warps, warp_order[32], lane_order[32];
    int warp_place, lane_place;        // in those orders: what runs now

    int arrived;                       // threads at the barrier, and which one it is
    const char* barrier_file;
    int barrier_line, barrier_id;

    Stack main;                        // the CPU thread's own
    Stack* unused;
    char* stacks;
    size_t shared_used, variables;     // shared memory: up to where it is used, and the bytes of static variables
    Queue<Copy> copies[1024];
    Queue<Product> products[32];
};
static __thread Worker* worker;
__thread Running running;
__thread long block_number;

static const size_t STACK_GUARD = 256 << 10;  // below each stack, for variables that do not fit; only addresses
static size_t stack_bytes() {
#ifdef __SANITIZE_ADDRESS__
    static const size_t bytes = round_up(setting("STANDIN_STACK", 256) << 10, PAGE);
#else
    static const size_t bytes = round_up(setting("STANDIN_STACK", 64) << 10, PAGE);
#endif
    return bytes;
}

static Worker* new_worker() {
    Worker* w = new Worker();
    size_t each = STACK_GUARD + stack_bytes();
    w->stacks = (char*)mmap(nullptr, 1024 * each, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    running.shared = (char*)mmap(nullptr, SHARED_SPACE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (w->stacks == MAP_FAILED || running.shared == MAP_FAILED) fail("no memory for the stacks of 1024 threads");
    for (int i = 1023; i >= 0; i--) {
        Stack* s = new Stack();
        s->bottom = w->stacks + i * each + STACK_GUARD;
        mprotect(s->bottom, stack_bytes(), PROT_READ | PROT_WRITE);
        // stacks begin at different places of their pages, or all would compete for the same few lines of the cache
        s->top = s->bottom + stack_bytes() - i * 576 % PAGE;
        s->next = w->unused;
        w->unused = s;
    }
    install_handler();
    return w;
}

static bool in_stack_guard(const char* at) {
    size_t each = STACK_GUARD + stack_bytes(), offset = at - worker->stacks;
    return offset < 1024 * each && offset % each < STACK_GUARD;
}

static void thread_main();

static inline void become(int thread) {
    running.warp = &worker->warps[thread / 32];
    running.thread = thread;
    running.lane = thread % 32;
    threadIdx = worker->grid->thread_index[thread];
}

static inline Stack& stack_of(int thread) {
    Worker& w = *worker;
    if (!w.stack[thread]) {
        Stack* s = w.stack[thread] = w.unused;
        w.unused = s->next;
        prepare(*s, thread_main);
    }
    return *w.stack[thread];
}

[[noreturn]] static void deadlock() {
    Worker& w = *worker;
    int at_operation = 0, thread = 0;
    for (int i = 0; i < w.num_warps; i++) {
        at_operation += __builtin_popcount(w.warps[i].at_operation);
        if (w.warps[i].at_operation) thread = i * 32 + __builtin_ctz(w.warps[i].at_operation);
    }
    char text[400] = "", *p = text;
    if (w.arrived) p += sprintf(p, "; %d wait at __syncthreads() in line %d", w.arrived, w.barrier_line);
    if (at_operation)
        sprintf(p, "; %d wait for lanes of their warp (thread %d for lanes %08x, of which %08x have come)",
                at_operation, thread, w.warps[thread / 32].masks[thread % 32], w.warps[thread / 32].at_operation);
    fail("deadlock: of %d threads %d have ended%s", w.threads, w.threads - w.alive, text);
}

// The thread to run now, -1 if all have ended
static inline int choose() {
    Worker& w = *worker;
    Warp* warp = &w.warps[w.warp_order[std::max(w.warp_place, 0)]];
    if (w.warp_place < 0 || !warp->ready) {
        int tried = 0;
        do {
            if (tried++ == w.num_warps) {
                if (w.alive) deadlock();
                return -1;
            }
            if (++w.warp_place == w.num_warps) w.warp_place = 0;
            warp = &w.warps[w.warp_order[w.warp_place]];
        } while (!warp->ready);
        w.lane_place = -1;
    }
    do w.lane_place = (w.lane_place + 1) % 32;
    while (!(warp->ready >> w.lane_order[w.lane_place] & 1));
    return w.warp_order[w.warp_place] * 32 + w.lane_order[w.lane_place];
}

// Lets other threads run, and returns when it is this one's turn again.
static void give_way() {
    int self = running.thread, next = choose();
    if (next == self) return;
    Stack& to = stack_of(next);
    become(next);
    switch_stack(*worker->stack[self], to, false);
}

static void open_barrier() {
    Worker& w = *worker;
    for (int i = 0; i < w.num_warps; i++) w.warps[i].ready |= w.warps[i].at_barrier, w.warps[i].at_barrier = 0;
    w.arrived = 0;
    w.warp_place = -1;  // from the beginning of the order
}

void barrier(const char* file, int line, int id) {
    Worker& w = *worker;
    if (!w.arrived) w.barrier_file = file, w.barrier_line = line, w.barrier_id = id;
    else if (w.barrier_id != id)
        fail("threads of a block meet in different __syncthreads(): %s:%d and %s:%d", w.barrier_file, w.barrier_line,
             file, line);
    running.warp->ready &= ~(1u << running.lane);
    running.warp->at_barrier |= 1u << running.lane;
    if (++w.arrived == w.alive) open_barrier();
    give_way();
}

// True for the last of the lanes, false for the others, after the last one's release().
bool arrive(unsigned mask, void* operands, const void* operation) {
    Warp& w = *running.warp;
    unsigned self = 1u << running.lane;
    if (!(mask & self)) fail("lane %d is not in its own mask %08x", running.lane, mask);
    if (mask & ~w.alive) fail("waits for lanes %08x of its warp, which have ended", mask & ~w.alive);
    w.operands[running.lane] = operands;
    w.operations[running.lane] = operation;
    w.masks[running.lane] = mask;
    w.at_operation |= self;
    if (mask & ~w.at_operation) {
        w.ready &= ~self;
        give_way();
        return false;
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        int l = __builtin_ctz(rest);
        if (w.operations[l] != operation || w.masks[l] != mask)
            fail("lanes %d and %d of a warp meet in different operations, or with different masks (%08x, %08x)",
                 running.lane, l, mask, w.masks[l]);
    }
    return true;
}

void release(unsigned mask) {
    running.warp->at_operation &= ~mask;
    running.warp->ready |= mask;
    worker->lane_place = -1;
    give_way();
}

static void end_thread() {
    Worker& w = *worker;
    Warp& warp = *running.warp;
    warp.alive &= ~(1u << running.lane);
    warp.ready &= warp.alive;
    for (unsigned rest = warp.at_operation; rest; rest &= rest - 1)
        if (warp.masks[__builtin_ctz(rest)] & ~warp.alive)
            fail("ends while lane %d of its warp waits for it", __builtin_ctz(rest));
    if (--w.alive == w.arrived && w.arrived) open_barrier();
}

// The first function on every stack
static void thread_main() {
    Worker& w = *worker;
#ifdef __SANITIZE_ADDRESS__
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!w.main.bottom) w.main.bottom = (char*)bottom, w.main.top = (char*)bottom + bytes;  // where the first came from
#endif
    for (;;) {
        w.grid->call(w.grid->argument);
        Stack* stack = w.stack[running.thread];
        end_thread();
        int next = choose();
        if (next >= 0 && !w.stack[next]) {  // another begins: on this stack
            w.stack[next] = stack;
            become(next);
            continue;
        }
        stack->next = w.unused;
        w.unused = stack;
        if (next >= 0) become(next);
        switch_stack(*stack, next >= 0 ? *w.stack[next] : w.main, true);
    }
}

static unsigned random_below(uint64_t* state, unsigned n) {  // splitmix64
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (unsigned)((z ^ z >> 31) % n);
}
static void arrange(int* list, int n, Order order, uint64_t* state) {
    for (int i = 0; i < n; i++) list[i] = order == REVERSE ? n - 1 - i : i;
    if (order == SHUFFLE)
        for (int i = n - 1; i > 0; i--) std::swap(list[i], list[random_below(state, i + 1)]);
}

// Shared memory begins with 1 KB that belongs to the system, then comes dynamic memory, then the variables.
static const size_t DYNAMIC_SHARED = 1024, SHARED_GAP = 32;

static void fresh_shared_memory(size_t dynamic) {
    Worker& w = *worker;
    ASAN_UNPOISON_MEMORY_REGION(running.shared, SHARED_SPACE);
    size_t used = std::max(w.shared_used, DYNAMIC_SHARED + dynamic);
    // NaN, which a maximum ignores: so in one of the three orders something else
    memset(running.shared, w.grid->order == REVERSE ? 0x7e : 0xff, used);
    ASAN_POISON_MEMORY_REGION(running.shared, SHARED_SPACE);
    running.dynamic_shared = running.shared + DYNAMIC_SHARED;
    ASAN_UNPOISON_MEMORY_REGION(running.dynamic_shared, dynamic);
    w.shared_used = DYNAMIC_SHARED + dynamic;
    w.variables = 0;
}

void* new_shared_variable(SharedVariable* variable, size_t bytes, size_t alignment) {
    Worker& w = *worker;
    size_t at = round_up(w.shared_used + SHARED_GAP, alignment);
    w.variables += bytes;
    if (w.variables > SHARED_DEFAULT) fail("more than 48 KB of shared variables");
    if (w.variables + w.grid->launch.shared > shared_limit() || at + bytes > SHARED_SPACE)
        fail("%zu bytes of shared variables and %zu dynamic ones are more than the device has", w.variables,
             w.grid->launch.shared);
    w.shared_used = at + bytes;
    variable->block = block_number;
    variable->at = running.shared + at;
    ASAN_UNPOISON_MEMORY_REGION(variable->at, bytes);
    return variable->at;
}

void launch_bounds(int threads) {
    if (worker->threads > threads)
        fail("%d threads in a block, more than its __launch_bounds__(%d)", worker->threads, threads);
}

static void run_block(const Grid& grid, long index) {
    Worker& w = *worker;
    const dim3 &g = grid.launch.grid, &b = grid.launch.block;
    w.grid = &grid;
    w.threads = w.alive = b.x * b.y * b.z;
    w.num_warps = (w.threads + 31) / 32;
    w.arrived = 0;
    blockIdx = {(unsigned)(index % g.x), (unsigned)(index / g.x % g.y), (unsigned)(index / ((long)g.x * g.y))};
    block_number++;
    uint64_t state = (uint64_t)seed * 1000003 + grid.number * 1009 + index;
    arrange(w.warp_order, w.num_warps, grid.order, &state);
    arrange(w.lane_order, 32, grid.order, &state);
    for (int i = 0; i < w.num_warps; i++) {
        Warp& warp = w.warps[i];
        warp.lanes = w.threads - i * 32 >= 32 ? ~0u : (1u << (w.threads - i * 32)) - 1;
        warp.alive = warp.ready = warp.lanes;
        warp.at_barrier = warp.at_operation = 0;
        if (lazy & LAZY_WGMMA) w.products[i].clear();
    }
    memset(w.stack, 0, w.threads * sizeof w.stack[0]);
    if (lazy & LAZY_COPIES)
        for (int i = 0; i < w.threads; i++) w.copies[i].clear();
    fresh_shared_memory(grid.launch.shared);
    w.warp_place = -1;
    int first = choose();
    Stack& stack = stack_of(first);
    become(first);
    switch_stack(w.main, stack, false);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Asynchronous copies, matrix instructions

void queue_copy(void* to, const void* from, bool wanted) {
    Queue<Copy>& queue = worker->copies[running.thread];
    queue.work.push_back({to, from, wanted, queue.groups});
}
void commit_copies() { worker->copies[running.thread].groups++; }
void wait_for_copies(int groups) {
    worker->copies[running.thread].wait(groups, [](const Copy& c) {
        if (c.wanted) memcpy(c.to, c.from, 16);
        else memset(c.to, 0, 16);
    });
}

typedef float Floats8 __attribute__((vector_size(32)));
static inline float low_bf16(unsigned x) { return standin_bits<float>(x << 16); }
static inline float high_bf16(unsigned x) { return standin_bits<float>(x & 0xffff0000u); }

// The fragments of PTX's mma.m16n8k16. With i = l / 4 and j = 2 (l % 4), lane l has these pairs of neighbours in j:
//     a[h + 2 q] = A (i + 8 h, j + 8 q)    b[q] = B (j + 8 q, i)    d[2 h] = D (i + 8 h, j)
void mma_16_8_16(float* const d[32], const unsigned* const a[32], const unsigned* const b[32]) {
    float A[16][16];
    Floats8 B[16], D[16];
    for (int l = 0; l < 32; l++) {
        int i = l / 4, j = l % 4 * 2;
        for (int q = 0; q < 2; q++) {
            for (int h = 0; h < 2; h++) {
                A[i + 8 * h][j + 8 * q] = low_bf16(a[l][h + 2 * q]);
                A[i + 8 * h][j + 8 * q + 1] = high_bf16(a[l][h + 2 * q]);
            }
            B[j + 8 * q][i] = low_bf16(b[l][q]);
            B[j + 8 * q + 1][i] = high_bf16(b[l][q]);
        }
        for (int h = 0; h < 2; h++) D[i + 8 * h][j] = d[l][2 * h], D[i + 8 * h][j + 1] = d[l][2 * h + 1];
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) D[i] += A[i][k] * B[k];
    for (int l = 0; l < 32; l++)
        for (int h = 0; h < 2; h++)
            for (int c = 0; c < 2; c++) d[l][2 * h + c] = D[l / 4 + 8 * h][l % 4 * 2 + c];
}

// 16 lines k of an operand of wgmma, and of its other index the numbers begin .. begin + count - 1: to[k][...].
//
// A descriptor holds, in units of 16 bytes, the address (bits 0 to 13) and two distances, "leading" (16 to 29) and
// "stride" (32 to 45); bits 62 and 63 are 1 for the 128-byte swizzle. Lines of 128 bytes lie 8 by 8, a group of 8 lines
// `stride` after the one before. A line holds 64 numbers k of one index or, transposed, 64 indices of one k; the next
// 64 indices lie `leading` further. Of every address, bits 4 to 6 are exclusive-ored with bits 7 to 9.
static void unpack_operand(uint64_t descriptor, bool transposed, int begin, int count, float (*to)[256]) {
    if (descriptor >> 62 != 1) fail("wgmma: descriptor %016lx is not of the 128-byte swizzle", (long)descriptor);
    size_t base = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    size_t stride = (descriptor >> 32 & 0x3fff) << 4;
    for (int i = 0; i < count * 2; i++) {  // 8 numbers at a time
        int index = begin + (transposed ? i / 16 * 8 : i / 2), k = transposed ? i % 16 : i % 2 * 8;
        size_t at = base + (transposed ? index / 64 * leading + k / 8 * stride + k % 8 * 128 + index % 64 * 2
                                       : index / 8 * stride + index % 8 * 128 + k * 2);
        at ^= (at >> 7 & 7) << 4;
        if (at + 16 > SHARED_SPACE) fail("wgmma: descriptor %016lx leads out of shared memory", (long)descriptor);
        uint16_t x[8];
        memcpy(x, running.shared + at, 16);
        for (int j = 0; j < 8; j++) {
            if (transposed) to[k][index - begin + j] = low_bf16(x[j]);
            else to[k + j][index - begin] = low_bf16(x[j]);
        }
    }
}

// One warp's part: 16 of the 64 rows. Lane l has d[4 j + 2 h + c] = D (l / 4 + 8 h, 8 j + 2 (l % 4) + c).
static void multiply(const Product& p) {
    alignas(64) static __thread float A[16][256], B[16][256];
    unpack_operand(p.a, p.transposed_a, running.thread / 32 % 4 * 16, 16, A);
    unpack_operand(p.b, p.transposed_b, 0, p.n, B);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < p.n / 8; j++) {
            float* const* lanes = p.d + i % 8 * 4;
            int at = 4 * j + i / 8 * 2;
            Floats8 d, b;
            for (int c = 0; c < 8; c++) d[c] = lanes[c / 2][at + c % 2];
            for (int k = 0; k < 16; k++) {
                memcpy(&b, &B[k][8 * j], sizeof b);
                d += A[k][i] * b;
            }
            for (int c = 0; c < 8; c++) lanes[c / 2][at + c % 2] = d[c];
        }
}

void wgmma(int n, bool transposed_a, bool transposed_b, float* const d[32], uint64_t a, uint64_t b) {
    if (arch != 90) fail("wgmma on a device of compute capability %d.%d", arch / 10, arch % 10);
    if (worker->threads % 128) fail("wgmma in a block of %d threads: it takes groups of 128", worker->threads);
    Queue<Product>& queue = worker->products[running.thread / 32];
    Product p = {n, transposed_a, transposed_b, {}, a, b, queue.groups};
    memcpy(p.d, d, sizeof p.d);
    if (lazy & LAZY_WGMMA) queue.work.push_back(p);
    else multiply(p);
}
void commit_wgmma() { worker->products[running.thread / 32].groups++; }
void wait_for_wgmma(int groups) { worker->products[running.thread / 32].wait(groups, multiply); }

// ---------------------------------------------------------------------------------------------------------------------
// 6. Launches, and the order check

static std::map<std::string, long> counts;
static std::map<std::string, std::pair<double, long>> times;
void count_launch(const char* name) { counts[name]++; }
void add_time(const char* name, double ms) {
    if (print_times) times[name].first += ms, times[name].second++;
}

static int current_device;
static std::map<std::pair<int, const void*>, int> dynamic_limits;  // of a device's kernels, by cudaFuncSetAttribute

bool Launch::valid() const {
    long threads = (long)block.x * block.y * block.z;
    char shape[200];
    snprintf(shape, sizeof shape, "launch of %s, grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory",
             name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    if (trace) fprintf(stderr, "standin: %s\n", shape);
    if (!devices) return result(cudaErrorNoDevice), false;
    if (threads < 1 || threads > 1024 || block.z > 64)
        return refuse(cudaErrorInvalidConfiguration, "%s: a block has 1 to 1024 threads (z up to 64)", shape), false;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return refuse(cudaErrorInvalidConfiguration, "%s: a grid is at least 1, y and z at most 65535", shape), false;
    size_t limit = SHARED_DEFAULT;
    for (auto& [f, bytes] : dynamic_limits)
        if (f.first == current_device && (f.second == kernel || !kernel)) limit = std::max(limit, (size_t)bytes);
    if (shared > limit)
        return refuse(cudaErrorInvalidValue, "%s: the limit is %zu until cudaFuncSetAttribute raises it", shape, limit),
               false;
    count_launch(name);
    return true;
}

void Launch::check_pointer(int number, const void* p) const {
    if (p && !in_arena(p)) fail("launch of %s: argument %d is a pointer to the host's memory", name, number);
}

static long launches;

static void run_blocks(const Grid& grid, std::atomic<long>* next, long blocks) {
    if (!worker) worker = new_worker();
    kernel_name = grid.launch.name;
    blockDim = grid.launch.block;
    gridDim = grid.launch.grid;
    // a step that has no factor in common with the number of blocks comes to every one
    long step = 1;
    if (grid.order == SHUFFLE && blocks > 1)
        for (step = 2654435761L % blocks; std::gcd(step, blocks) != 1;) step++;
    for (long i; (i = (*next)++) < blocks;)
        run_block(grid, grid.order == FORWARD ? i : grid.order == REVERSE ? blocks - 1 - i : (i + 1) * step % blocks);
    kernel_name = nullptr;
}

static void run_grid(const Grid& grid) {
    const dim3& g = grid.launch.grid;
    long blocks = (long)g.x * g.y * g.z;
    std::atomic<long> next(0);
    // one CPU thread is enough where starting the others takes longer
    int n = blocks * (long)grid.thread_index.size() < 2048 ? 1 : (int)std::min<long>(cpu_threads(), blocks);
    if (n == 1) return run_blocks(grid, &next, blocks);
    #pragma omp parallel num_threads(n)
    run_blocks(grid, &next, blocks);
}

static void compare(const Launch& launch, const Piece& piece, const char* expected, Order order) {
    if (!memcmp(piece.at, expected, piece.bytes)) return;
    long different = 0, first = -1, unit = piece.bytes % 4 || (size_t)piece.at % 4 ? 1 : 4;
    for (long i = 0; i < (long)piece.bytes; i += unit)
        if (memcmp(piece.at + i, expected + i, unit)) {
            if (!different++) first = i;
        }
    const Allocation* a = allocation_at(piece.at);
    unsigned x = 0, y = 0;
    memcpy(&x, expected + first, unit);
    memcpy(&y, piece.at + first, unit);
    fail("the result of %s depends on the order of threads: in the %s order byte %ld of allocation %ld (%zu bytes) is "
         "%08x (%g), in the forward order %08x (%g); %ld such differences in the %zu bytes from byte %ld on",
         launch.name, order_names[order], (long)(piece.at - a->at) + first, a->number, a->bytes, y,
         standin_bits<float>(y), x, standin_bits<float>(x), different, piece.bytes, (long)(piece.at - a->at));
}

// Runs the kernel three times from the same state of device memory, in three orders, and compares what it wrote.
static void run_in_all_orders(Grid& grid) {
    set_access(PROT_READ, PROT_READ);
    saving = true;
    size_t first_pieces = 0;
    for (Order order : {FORWARD, REVERSE, SHUFFLE}) {
        grid.order = order;
        run_grid(grid);
        if (order == FORWARD) {
            first_pieces = pieces.size();
            for (Piece& p : pieces) memcpy(after_first(p.at), p.at, p.bytes);
        } else
            for (size_t i = 0; i < pieces.size(); i++)
                compare(grid.launch, pieces[i], i < first_pieces ? after_first(pieces[i].at) : before(pieces[i].at),
                        order);
        if (order != SHUFFLE)
            for (Piece& p : pieces) memcpy(p.at, before(p.at), p.bytes);
    }
    saving = false;
    for (Piece& p : pieces) saved[p.page] = false;
    pieces.clear();
    set_access(PROT_NONE, PROT_READ | PROT_WRITE);
}

void Launch::run(void (*call)(const void*), const void* argument) const {
    double start = now_ms();
    Grid grid = {*this, call, argument, the_order, launches++, {}};
    for (unsigned z = 0; z < block.z; z++)
        for (unsigned y = 0; y < block.y; y++)
            for (unsigned x = 0; x < block.x; x++) grid.thread_index.push_back({x, y, z});
    if (check) run_in_all_orders(grid);
    else {
        OpenMemory open;
        run_grid(grid);
    }
    add_time(name, now_ms() - start);
}

// With STANDIN_LAZY & 4, what a GPU would do behind the program's back waits here until the program waits for it.
static std::vector<std::function<void()>> stream;
void Launch::submit(std::function<void()> work) {
    if (lazy & LAZY_STREAM) stream.push_back(std::move(work));
    else work();
}
static void finish_stream() {
    for (auto& work : stream) work();
    stream.clear();
}

static struct AtExit {
    ~AtExit() {
        for (auto& [at, a] : allocations) check_end(a);
        if (print_counts)
            for (auto& [name, n] : counts) fprintf(stderr, "standin: %8ld launches of %s\n", n, name.c_str());
        std::vector<std::pair<double, std::string>> sorted;
        for (auto& [name, t] : times) sorted.push_back({t.first, name});
        std::sort(sorted.rbegin(), sorted.rend());
        for (auto& [ms, name] : sorted)
            fprintf(stderr, "standin: %10.1f ms in %8ld launches of %s\n", ms, times[name].second, name.c_str());
        if (last_error) {
            fprintf(stderr, "standin: the program never asked for an error: %s\n", cudaGetErrorString(last_error));
            fflush(stdout);
            _exit(1);
        }
    }
} at_exit;

}  // namespace standin

long standin_launches(const char* part) {
    long sum = 0;
    for (auto& [name, n] : standin::counts)
        if (!part || strstr(name.c_str(), part)) sum += n;
    return sum;
}
void standin_reset_counts() { standin::counts.clear(); }

// ---------------------------------------------------------------------------------------------------------------------
// 7. The CUDA runtime

using namespace standin;

struct CUstream_st { int unused; };
struct CUevent_st { bool recorded; double time; };

static cudaError_t no_device_or_success() { return devices ? cudaSuccess : result(cudaErrorNoDevice); }

// Whether n bytes at p, which a call names as `what`, can be what the direction of the copy says
static bool fits(const void* p, size_t n, bool device, const char* what) {
    if (!in_arena(p)) {
        if (device) refuse(cudaErrorInvalidValue, "a copy: the %s is not device memory", what);
        return !device;
    }
    const Allocation* a = allocation_at(p);
    if (!on_device(p, n)) refuse(cudaErrorInvalidValue, "a copy: %zu bytes of the %s are not all allocated", n, what);
    else if (a->host == device) refuse(cudaErrorInvalidValue, "a copy: the %s is in the wrong memory", what);
    else return true;
    return false;
}
static bool copy_fits(const void* to, const void* from, size_t n, cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDefault) return true;
    return fits(to, n, kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice, "destination") &&
           fits(from, n, kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice, "source");
}
static void copy(void* to, const void* from, size_t n) {
    OpenMemory open;
    memmove(to, from, n);
}

extern "C" {

cudaError_t cudaMalloc(void** p, size_t n) { return allocate(p, n, false); }
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return allocate(p, n, false); }
cudaError_t cudaMallocHost(void** p, size_t n) { return allocate(p, n, true); }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return allocate(p, n, true); }
cudaError_t cudaMallocManaged(void** p, size_t n, unsigned) { return allocate(p, n, true); }
cudaError_t cudaFree(void* p) {
    finish_stream();
    return release_memory(p, p && allocations.count((char*)p) && allocations[(char*)p].host);  // managed memory too
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaFreeHost(void* p) {
    finish_stream();
    return release_memory(p, true);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *total = memory_limit;
    *free = memory_limit - memory_used;
    return no_device_or_success();
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
    finish_stream();
    if (!devices) return result(cudaErrorNoDevice);
    if (!n) return cudaSuccess;
    if (!copy_fits(to, from, n, kind)) return last_error;
    copy(to, from, n);
    return cudaSuccess;
}
// From and to pinned memory the copy happens later; from other host memory the call has read it when it returns, and
// to other host memory it has written.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind, cudaStream_t) {
    if (!in_arena(to)) return cudaMemcpy(to, from, n, kind);
    if (!devices) return result(cudaErrorNoDevice);
    if (!n) return cudaSuccess;
    if (!copy_fits(to, from, n, kind)) return last_error;
    if (in_arena(from)) Launch::submit([=] { copy(to, from, n); });
    else {
        std::vector<char> now((const char*)from, (const char*)from + n);
        Launch::submit([=] { copy(to, now.data(), n); });
    }
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t) {
    if (!devices) return result(cudaErrorNoDevice);
    if (!n) return cudaSuccess;
    if (!on_device(to, n)) return refuse(cudaErrorInvalidValue, "cudaMemset of %zu bytes: not device memory", n);
    Launch::submit([=] {
        OpenMemory open;
        memset(to, value, n);
    });
    return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t n) { return cudaMemsetAsync(to, value, n, 0); }

cudaError_t cudaDeviceSynchronize() { return finish_stream(), no_device_or_success(); }
cudaError_t cudaDeviceReset() { return cudaDeviceSynchronize(); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
    *s = new CUstream_st();
    return no_device_or_success();
}
cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithFlags(s, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    finish_stream();
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
    *e = new CUevent_st();
    return no_device_or_success();
}
cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    finish_stream();
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    e->recorded = false;
    Launch::submit([=] { e->recorded = true, e->time = now_ms(); });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaDeviceSynchronize(); }
cudaError_t cudaEventQuery(cudaEvent_t e) { return e->recorded ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
    if (!from->recorded || !to->recorded) return result(cudaErrorNotReady);
    *ms = (float)(to->time - from->time);
    return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}

static const struct { cudaError_t error; const char *name, *text; } errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
};
const char* cudaGetErrorName(cudaError_t error) {
    for (auto& e : errors)
        if (e.error == error) return e.name;
    return "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t error) {
    for (auto& e : errors)
        if (e.error == error) return e.text;
    return "unknown error";
}

cudaError_t cudaGetDeviceCount(int* n) {
    *n = devices;
    return no_device_or_success();
}
static cudaError_t valid_device(int device) {
    if (!devices) return result(cudaErrorNoDevice);
    return device < 0 || device >= devices ? result(cudaErrorInvalidDevice) : cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (cudaError_t e = valid_device(device)) return e;
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return no_device_or_success();
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    *p = {};
    if (cudaError_t e = valid_device(device)) return e;
    strcpy(p->name, "CPU stand-in");
    p->major = arch / 10;
    p->minor = arch % 10;
    p->totalGlobalMem = memory_limit;
    p->multiProcessorCount = 4;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = 65536;
    p->sharedMemPerBlock = SHARED_DEFAULT;
    p->sharedMemPerBlockOptin = shared_limit();
    p->sharedMemPerMultiprocessor = shared_limit() + 1024;
    p->l2CacheSize = 50 << 20;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (cudaError_t e = cudaGetDeviceProperties(&p, device)) return e;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
        case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        default: return refuse(cudaErrorInvalidValue, "cudaDeviceGetAttribute: %d is not known here", (int)attribute);
    }
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = devices ? CUDART_VERSION : 0;  // as without a driver
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (!devices) return result(cudaErrorNoDevice);
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || (size_t)value > shared_limit())
            return refuse(cudaErrorInvalidValue, "cudaFuncSetAttribute: %d bytes, the device has %zu", value,
                          shared_limit());
        dynamic_limits[{current_device, kernel}] = value;
    }
    return cudaSuccess;
}

}  // extern "C"
