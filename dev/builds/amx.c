// amx.c: a processor's AMX for programs built with it, on one without: their instructions trap and are executed here.
//
//     cc -O2 -shared -fPIC dev/builds/amx.c -o amx.so -lm && LD_PRELOAD=$PWD/amx.so ./train_moe --precision bf16
//
// Knows LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED and TDPBF16PS, decoded and executed as Intel's manual
// says, one number at a time, and says that Linux permits tiles. AMX=wrong adds otherwise, AMX=refused permits nothing.
#define _GNU_SOURCE
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

#define PER_THREAD static __thread __attribute__((tls_model("initial-exec")))
PER_THREAD uint8_t config[64];          // palette, 15 bytes, 16 row sizes of 2 bytes, 16 numbers of rows
PER_THREAD uint8_t tiles[8][16][64];
static void (*of_the_program)(int);     // its handler for all other instructions
static int is_wrong, is_refused;

static int rows_of(int t) { return config[48 + t]; }
static int bytes_of(int t) { return config[16 + 2 * t] + 256 * config[17 + 2 * t]; }

static float bf16(int t, int row, int i) {
    uint16_t half;
    memcpy(&half, &tiles[t][row][2 * i], 2);
    union { uint32_t bits; float value; } u = {(uint32_t)half << 16};
    return u.value;
}

static void fault(const char* why) { if (write(2, why, strlen(why)) < 0) _exit(3); _exit(3); }

static void multiply(int c, int a, int b) {
    if (!rows_of(c) || rows_of(c) != rows_of(a) || bytes_of(c) != bytes_of(b) || bytes_of(a) != 4 * rows_of(b) ||
        bytes_of(c) % 4 || c == a || c == b || a == b)
        fault("TDPBF16PS: #UD\n");
    _mm_setcsr(0x9FC0);                 // round to even, no exceptions, denormals are zero
    for (int m = 0; m < rows_of(c); m++) {
        for (int n = 0; n < bytes_of(c) / 4; n++) {
            volatile float even = 0, odd = 0, sum;
            memcpy((float*)&sum, &tiles[c][m][4 * n], 4);
            for (int k = 0; k < rows_of(b); k++) {
                even = __builtin_fmaf(bf16(a, m, 2 * k), bf16(b, k, 2 * n), even);
                odd = __builtin_fmaf(bf16(a, m, 2 * k + 1), bf16(b, k, 2 * n + 1), odd);
            }
            if (is_wrong) sum = (sum + even) + odd;
            else sum = sum + (even + odd);
            memcpy(&tiles[c][m][4 * n], (float*)&sum, 4);
        }
        memset(&tiles[c][m][bytes_of(c)], 0, 64 - bytes_of(c));
    }
}

// One instruction at `at`: VEX prefix C4, opcode 49, 4B or 5C, ModRM. Returns where the next one is, NULL for others.
static const uint8_t* execute(const uint8_t* at, const greg_t* gregs) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    if (at[0] != 0xC4 || (at[1] & 31) != 2 || (at[2] & 0x84)) return NULL;
    int opcode = at[3], prefix = at[2] & 3, third = ~at[2] >> 3 & 15, mod = at[4] >> 6, reg = at[4] >> 3 & 7;
    int rm = at[4] & 7, extend_index = ~at[1] >> 6 & 1, extend_base = ~at[1] >> 5 & 1;
    const uint8_t* next = at + 5;
    long base = 0, index = 0, offset = 0;
    if (mod != 3) {
        int low = rm;
        if (rm == 4) {
            int sib = *next++, number = (sib >> 3 & 7) + 8 * extend_index;
            index = number == 4 ? 0 : (long)gregs[order[number]] << (sib >> 6);
            low = sib & 7;
        }
        if (mod != 0 || low != 5) base = (long)gregs[order[low + 8 * extend_base]];
        int32_t far = 0;
        if (mod == 1) offset = (int8_t)*next++;
        else if (mod == 2 || low == 5) memcpy(&far, next, 4), next += 4, offset = far;
        if (mod == 0 && rm == 5) base = (long)next;
    }
    uint8_t* memory = (uint8_t*)(base + offset);
    if (opcode == 0x49 && prefix == 0 && mod != 3 && reg == 0) {        // LDTILECFG
        memcpy(config, memory, 64);
        memset(tiles, 0, sizeof tiles);
        if (config[0] != 1) fault("LDTILECFG: #GP\n");
        for (int t = 0; t < 16; t++)
            if (rows_of(t) > (t < 8 ? 16 : 0) || bytes_of(t) > 64) fault("LDTILECFG: #GP\n");
    } else if (opcode == 0x49 && prefix == 0 && at[4] == 0xC0) {        // TILERELEASE
        memset(config, 0, sizeof config);
        memset(tiles, 0, sizeof tiles);
    } else if (config[0] != 1) {
        fault("AMX without a configuration: #UD\n");
    } else if (opcode == 0x49 && prefix == 3 && mod == 3) {             // TILEZERO
        memset(tiles[reg], 0, sizeof tiles[reg]);
    } else if (opcode == 0x4B && prefix >= 2 && rm == 4 && mod != 3) {  // TILELOADD, TILESTORED
        if (prefix == 3) memset(tiles[reg], 0, sizeof tiles[reg]);
        for (int i = 0; i < rows_of(reg); i++) {
            if (prefix == 3) memcpy(tiles[reg][i], memory + i * index, (size_t)bytes_of(reg));
            else memcpy(memory + i * index, tiles[reg][i], (size_t)bytes_of(reg));
        }
    } else if (opcode == 0x5C && prefix == 2 && mod == 3) {
        multiply(reg, rm, third);
    } else {
        return NULL;
    }
    return next;
}

static void trapped(int number, siginfo_t* info, void* context) {
    greg_t* gregs = ((ucontext_t*)context)->uc_mcontext.gregs;
    const uint8_t* next = execute((const uint8_t*)gregs[REG_RIP], gregs);
    (void)info;
    if (next) gregs[REG_RIP] = (greg_t)next;
    else if (of_the_program) of_the_program(number);
    else _exit(3);
}

void (*signal(int number, void (*handler)(int)))(int) {
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = SA_RESTART;
    if (number == SIGILL) {
        const char* how = getenv("AMX");
        is_wrong = how && !strcmp(how, "wrong");
        is_refused = how && !strcmp(how, "refused");
        of_the_program = handler;
        action.sa_sigaction = trapped;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
    }
    return sigaction(number, &action, &before) ? SIG_ERR : before.sa_handler;
}

long syscall(long number, ...) {
    long a[6], result;
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_arch_prctl && (int)a[0] == 0x1023 && (int)a[1] == 18) return is_refused ? -1 : 0;
    register long r10 __asm__("r10") = a[3], r8 __asm__("r8") = a[4], r9 __asm__("r9") = a[5];
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    if (result >= -4095 && result < 0) errno = (int)-result, result = -1;
    return result;
}
