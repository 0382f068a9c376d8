/*
timed.h: measures how long the functions of train_moe.c take, without a word about it in train_moe.c.

Each function to be timed becomes a macro of its own name, so that every `name(...)` in the file that is included next
passes through TIMED. A definition starts its parameters with a type and a call its arguments with a variable, and that
tells them apart: the first word is pasted to TYPE_, and TYPE_float, TYPE_int, ... are macros that turn it into a
definition. (A macro is not expanded inside itself, so `name` there is the function.)
*/
#ifndef TIMED_H
#define TIMED_H
#include <stddef.h>
#include <time.h>

enum {
    PHASE_PRODUCTS, PHASE_ATTENTION, PHASE_ROUTER, PHASE_SWIGLU, PHASE_NORMS, PHASE_LOSS, PHASE_ADAMW, PHASE_REST,
    NUM_PHASES
};
static const char* phase_names[] = {"products", "attention", "router", "swiglu", "norms", "loss", "AdamW", "rest"};
static double phase_seconds[NUM_PHASES], phase_since;
static int phase_now = PHASE_REST, phase_depth = 0;

static double phase_clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

// A timed function that calls another one keeps the time: only the outermost counts.
static void phase_enter(int phase) {
    if (phase_depth++) return;
    phase_now = phase;
    phase_since = phase_clock();
}
static void phase_leave(void) {
    if (--phase_depth == 0) phase_seconds[phase_now] += phase_clock() - phase_since;
}

// CHOOSE takes its second argument: in a definition TYPE_float * out, CALL, ~ becomes ~, DEFINITION, ~ * out, CALL, ~
#define TYPE_float  ~, DEFINITION, ~
#define TYPE_double ~, DEFINITION, ~
#define TYPE_int    ~, DEFINITION, ~
#define TYPE_Model  ~, DEFINITION, ~
#define CHOOSE(...)                     SECOND(__VA_ARGS__)
#define SECOND(first, second, ...)      second
#define DEFINITION(phase, name, ...)    name(__VA_ARGS__)
#define CALL(phase, name, ...)          (phase_enter(phase), name(__VA_ARGS__), phase_leave())
#define TIMED(phase, name, first, ...)  CHOOSE(TYPE_##first, CALL, ~)(phase, name, first, __VA_ARGS__)

#define grouped_matmul_forward(...)         TIMED(PHASE_PRODUCTS, grouped_matmul_forward, __VA_ARGS__)
#define grouped_matmul_backward_input(...)  TIMED(PHASE_PRODUCTS, grouped_matmul_backward_input, __VA_ARGS__)
#define grouped_matmul_backward_weight(...) TIMED(PHASE_PRODUCTS, grouped_matmul_backward_weight, __VA_ARGS__)
#define matmul_forward(...)                 TIMED(PHASE_PRODUCTS, matmul_forward, __VA_ARGS__)
#define matmul_backward_input(...)          TIMED(PHASE_PRODUCTS, matmul_backward_input, __VA_ARGS__)
#define matmul_backward_weight(...)         TIMED(PHASE_PRODUCTS, matmul_backward_weight, __VA_ARGS__)
#define attention_forward(...)              TIMED(PHASE_ATTENTION, attention_forward, __VA_ARGS__)
#define attention_backward(...)             TIMED(PHASE_ATTENTION, attention_backward, __VA_ARGS__)
#define rope(...)                           TIMED(PHASE_ATTENTION, rope, __VA_ARGS__)
#define softmax_router_forward(...)         TIMED(PHASE_ROUTER, softmax_router_forward, __VA_ARGS__)
#define softmax_router_backward(...)        TIMED(PHASE_ROUTER, softmax_router_backward, __VA_ARGS__)
#define count_balance(...)                  TIMED(PHASE_ROUTER, count_balance, __VA_ARGS__)
#define balance_backward(...)               TIMED(PHASE_ROUTER, balance_backward, __VA_ARGS__)
#define observe_layer(...)                  TIMED(PHASE_ROUTER, observe_layer, __VA_ARGS__)
#define group_by_expert(...)                TIMED(PHASE_ROUTER, group_by_expert, __VA_ARGS__)
#define gather_rows(...)                    TIMED(PHASE_ROUTER, gather_rows, __VA_ARGS__)
#define combine_rows(...)                   TIMED(PHASE_ROUTER, combine_rows, __VA_ARGS__)
#define swiglu_forward(...)                 TIMED(PHASE_SWIGLU, swiglu_forward, __VA_ARGS__)
#define swiglu_backward(...)                TIMED(PHASE_SWIGLU, swiglu_backward, __VA_ARGS__)
#define rmsnorm_forward(...)                TIMED(PHASE_NORMS, rmsnorm_forward, __VA_ARGS__)
#define rmsnorm_backward(...)               TIMED(PHASE_NORMS, rmsnorm_backward, __VA_ARGS__)
#define cross_entropy_forward(...)          TIMED(PHASE_LOSS, cross_entropy_forward, __VA_ARGS__)
#define cross_entropy_backward(...)         TIMED(PHASE_LOSS, cross_entropy_backward, __VA_ARGS__)
#endif
