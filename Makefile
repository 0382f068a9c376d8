# make         builds the programs and says what it found
# make run     trains, upcycles and trains on: the whole story on this project's own source files, in a few minutes
# make test    runs every check
# make single  each program as one file in build/;  make PLAIN=1  products by the plain loops of train_moe.c
# make BF16=model   with the semantics of VDPBF16PS as C functions in place of the instruction;  BF16=amx  AMX's, too
# make cut     kernels and functions as files that compile alone, in build/cut/;  make test_cut  compiles and runs them
# make bench   how fast training is;  make products BLAS="LIBRARY.so ..."   matrix products beside those of libraries
# make lessons six small programs about mixtures of experts;  make picture   a page that shows runs
# make references   makes what the tests compare with anew, with PyTorch and transformers, and compares
# make lab E=NAME   runs an experiment of dev/lab, or goes on with it
# make train_moe_cu   builds the GPU program with nvcc;  make test_gpu   runs every check of it on this machine's GPU
# make test_standin   runs the checks of the GPU program without a GPU, on a stand-in; STANDIN=WORD: only some groups
# make test_ptx   executes nvcc's PTX of the tensor-core kernels without a GPU, in an interpreter; PTX=--short: a part

CC     ?= cc
CFLAGS ?= -O3
# Which processor: the one at hand, if the compiler can find out (cross compilers and gcc on RISC-V cannot). A program
# that is to run on other machines too wants the oldest one's: make ARCH=-march=haswell, say.
ifeq ($(origin ARCH),undefined)
ARCH   := $(shell for a in -march=native -mcpu=native; do $(CC) $$a -E -x c /dev/null >/dev/null 2>&1 && echo $$a && break; done)
endif
# gnu11 and not c11: the latter switches off the contraction of a * b + c into one instruction, which halves the speed
# Promises without which gcc does not turn some loops into vector code: nobody asks errno about a square root, nobody
# wants to be stopped by a comparison with what is not a number. (dev/bench/README.md: what it bought. Loops that are
# vector code fuse a * b + c in other places, so last digits are those of these flags: `make single` wants the first.)
MATH    = -fno-math-errno -fno-trapping-math
FLAGS   = -std=gnu11 $(CFLAGS) $(ARCH) $(MATH) -Wall -Wextra $(if $(filter-out 0,$(PLAIN)),-DPLAIN=1) \
          $(if $(BF16),-DBF16_MODEL) $(if $(filter amx,$(BF16)),-DAMX_MODEL)
$(if $(filter-out model amx,$(BF16)),$(error BF16 is model or amx, not '$(BF16)'))
# what the compiler says of itself; --version is silent where CC is more than a name
MACROS := $(shell $(CC) $(CFLAGS) $(ARCH) -dM -E -x c /dev/null 2>/dev/null)
ifneq ($(findstring __clang__,$(MACROS)),)
# clang splits 64-byte vectors unless told otherwise
FLAGS  += $(if $(findstring __AVX512F__,$(MACROS)),-mprefer-vector-width=512)
# clang 13 would leave a * b + c as two instructions, and makes no vectors of -ffp-contract=on, the default from 14 on
FLAGS  += $(if $(findstring __clang_major__ 13,$(MACROS)),-ffp-contract=fast)
else
# gcc makes branches of the comparisons in fast_exp, which it cannot undo when it meets the loop around them
FLAGS  += -fno-thread-jumps
# at -O1 it would leave a * b + c as two instructions: the fast products would not be the plain loops, see train_moe.c
FLAGS  += -fexpensive-optimizations
endif
# OpenMP is there if a program that uses it can be linked, and its library is found when it starts (127: it is not; a
# cross compiler's program does not start at all, which says nothing). Apple's clang wants to be told by -Xclang, and
# finds neither header nor library where Homebrew puts them.
BREW   := $(firstword $(wildcard /opt/homebrew/opt/libomp /usr/local/opt/libomp))
OPENMP := $(shell p=.openmp$$$$; \
    echo 'int main(void) { int n = 0; _Pragma("omp parallel") n = omp_get_num_threads(); return n == 0; }' >$$p.c; \
    for f in -fopenmp "-Xclang -fopenmp $(if $(BREW),-I$(BREW)/include -L$(BREW)/lib) -lomp"; do \
    $(CC) $(CFLAGS) $$f -include omp.h $$p.c -o $$p.out >/dev/null 2>&1 || continue; \
    ./$$p.out >/dev/null 2>&1; [ $$? -eq 127 ] || { echo "$$f"; break; }; done; rm -f $$p.c $$p.out)
ifeq ($(OPENMP),)
# without the library loops can still become vector code
FLAGS  += -fopenmp-simd -Wno-unknown-pragmas
endif
FLAGS  += $(OPENMP)

# nvcc, and cuBLAS where the toolkit has none: make CUBLAS=DIR, with DIR/include and DIR/lib
# (make before 4.3 runs what looks simple without a shell, but `command` is the shell's: hence the redirection)
NVCC   ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
# A100 and RTX 30/40 (80), H100 and H200 (90a), B200 (100), RTX 50 (120); others compile the first one's PTX when started
GPUS   ?= 80 90a 100 120
CUFLAGS = -std=c++17 -O3 $(foreach g,$(GPUS),-gencode arch=compute_$(g),code=sm_$(g)) \
          -gencode arch=compute_$(firstword $(GPUS)),code=compute_$(firstword $(GPUS)) -diag-suppress 177 \
          -Xcompiler "$(ARCH) $(MATH) $(OPENMP)" -I.
ifeq ($(CUBLAS),)
CULIBS  = -lcublas
else
CUFLAGS += -I$(CUBLAS)/include
CULIBS  = -L$(CUBLAS)/lib -l:$(notdir $(firstword $(wildcard $(CUBLAS)/lib/libcublas.so*))) \
          -Xlinker -rpath=$(CUBLAS)/lib -Xlinker -rpath-link=$(CUBLAS)/lib
endif

# What the programs include; the text that ./train_moe trains on is these files, in this order.
LIB     = train_moe.c $(sort $(wildcard dev/lib/*.h))
UPCYCLE = upcycle.c $(sort $(wildcard dev/upcycle/*.h))
TESTS   = test_moe.c $(sort $(wildcard dev/test/*.[ch]))

# What else a program is made of: that text, and the compiler with its flags, as other flags want another build.
MORE    = build/embedded.h build/flags

all: train_moe upcycle
	@echo "compiler: $(CC) $(CFLAGS) $(ARCH)"
ifeq ($(ARCH),)
	@echo "ARCH:     $(CC) cannot tell the processor; make ARCH=-march=NAME (-mcpu=NAME) makes use of all it has"
endif
ifeq ($(OPENMP),)
	@echo "OpenMP:   not found, the programs will use one core."
	@echo "          Debian, Ubuntu: apt install gcc (or libomp-dev for clang); macOS: brew install libomp"
else
	@echo "OpenMP:   found"
endif
ifeq ($(NVCC),)
	@echo "nvcc:     not found; it is only needed for GPUs"
else
	@echo "nvcc:     found; make train_moe_cu builds the program for GPUs"
endif
	@echo "next:     ./train_moe (a minute), make run (a few), make test, ./train_moe --help, ./upcycle --help"

train_moe: $(LIB) $(MORE)
	$(CC) $(FLAGS) train_moe.c -o $@ -lm

upcycle: $(UPCYCLE) $(LIB) $(MORE)
	$(CC) $(FLAGS) upcycle.c -o $@ -lm

test_moe: $(TESTS) $(UPCYCLE) $(LIB) $(MORE)
	$(CC) $(FLAGS) test_moe.c -o $@ -lm

# Says what is missing, and refuses kernels that spill registers to memory.
find_nvcc = @[ -n "$(NVCC)" ] || \
	{ echo "nvcc was not found: install the CUDA toolkit (12.9 or newer), or make NVCC=/path/to/nvcc"; exit 1; }
define nvcc
$(find_nvcc)
@mkdir -p build
@echo '#include <cublas_v2.h>' >build/cublas.cu; $(NVCC) $(CUFLAGS) -E build/cublas.cu >/dev/null 2>&1 || \
	{ echo "cublas_v2.h was not found: the toolkit lacks cuBLAS, or make CUBLAS=DIR with its include and lib"; exit 1; }
$(NVCC) $(CUFLAGS) -Xptxas -v $(1) -o $@ $(CULIBS) 2>build/$@.log || { grep -v "ptxas info\|bytes stack" build/$@.log; exit 1; }
@awk '/Compiling entry/ {kernel = $$7 " " $$9} / bytes spill/ && !/ 0 bytes spill stores, 0 bytes spill loads/ \
	{print "spills registers: " kernel; bad = 1} END {exit bad}' build/$@.log || [ "$(SPILLS)" = allow ] || \
	{ rm -f $@; echo "with SPILLS=allow it is built all the same, and slower"; exit 1; }
endef

CUDA    = train_moe.cu $(wildcard dev/lib/cuda/*)

train_moe_cu: $(CUDA) $(LIB) build/embedded.h
	$(call nvcc,train_moe.cu)

test_moe_cu: $(TESTS) $(CUDA) $(UPCYCLE) $(LIB) build/embedded.h
	$(call nvcc,-DTEST_GPU -x cu test_moe.c)

# The tests on a CPU that plays a GPU; its headers come with nvcc. SANITIZE=-fsanitize=address,undefined
STANDIN_FILES = $(addprefix dev/cuda/standin/,standin.h standin.cpp cublas.cpp translate.py)
CUDA_TOP = $(or $(CUDA_HOME),$(shell $(NVCC) --dryrun -x cu /dev/null 2>&1 | sed -n 's/^\#$$ TOP=//p'))
build/test_standin: $(TESTS) $(CUDA) $(UPCYCLE) $(LIB) build/embedded.h $(STANDIN_FILES)
	python3 dev/cuda/standin/translate.py test_moe.c >build/test_standin.cpp
	$(CXX) -std=gnu++17 -O1 $(ARCH) $(MATH) $(OPENMP) $(SANITIZE) -DTEST_GPU -I. -Idev/cuda/standin \
		-include standin.h $(if $(CUBLAS),-I$(CUBLAS)/include) -I$(CUDA_TOP)/include build/test_standin.cpp \
		dev/cuda/standin/standin.cpp dev/cuda/standin/cublas.cpp -o $@ -lm

test_standin: build/test_standin
	build/test_standin "gpu $(STANDIN)"

# The kernels as nvcc's PTX, executed on the CPU (dev/cuda/ptx).
build/sm_%.ptx: $(CUDA) $(LIB) build/embedded.h
	$(find_nvcc)
	$(NVCC) -std=c++17 -O3 -arch=sm_$* -ptx -diag-suppress 177 -I. $(if $(CUBLAS),-I$(CUBLAS)/include) train_moe.cu -o $@

test_ptx: $(if $(findstring --short,$(PTX)),,build/sm_80.ptx) build/sm_90a.ptx
	python3 dev/cuda/ptx/test_ptx.py $(PTX) $^

# The text that ./train_moe trains on without --data: the project's own source files, also as an array.
build/embedded.txt: $(LIB) $(UPCYCLE) $(TESTS)
	@mkdir -p build
	@cat $(LIB) $(UPCYCLE) $(TESTS) >$@

# (macOS's od fills its last line up with blanks and adds an empty one)
build/embedded.h: build/embedded.txt
	@{ echo "static const unsigned char embedded_text[] = {"; od -An -v -tu1 build/embedded.txt | \
	   sed 's/  */,/g; s/^,//; s/,*$$/,/; /^,$$/d'; echo "0}; static const long embedded_size = sizeof embedded_text - 1;"; } >$@.new
	@mv $@.new $@

# (a file that does not change makes nothing anew)
build/flags: always
	@mkdir -p build; echo '$(CC) $(FLAGS)' | cmp -s - $@ || echo '$(CC) $(FLAGS)' >$@

# Each program as one file that compiles alone: cc -O3 -march=native -fno-math-errno -fopenmp FILE -lm.
# Every file is put where it is first included.
build/%_single.c: %.c $(UPCYCLE) $(LIB) build/embedded.h
	@awk 'function emit(path, line, parts, folder) { \
	        if (path in seen) return; seen[path]; folder = path; sub(/[^\/]*$$/, "", folder); \
	        while ((getline line <path) > 0) \
	            if (line ~ /^#include "/) { split(line, parts, "\""); \
	                emit(parts[2] ~ /embedded/ ? "build/embedded.h" : parts[2] ~ /^dev|\.c$$/ ? parts[2] : folder parts[2]) } \
	            else if (line !~ /^#pragma once/) { sub(/__has_include\("[^)]*embedded.h"\)/, "1", line); print line } } \
	      BEGIN { emit("$<") }' >$@

single: build/train_moe_single.c build/upcycle_single.c

# Kernels and functions, each with what it needs, a manual, a test and a benchmark; CUT=cpu, gpu or a NAME: some
cut:
	python3 dev/cut/cut.py

test_cut:
	NVCC="$(NVCC)" CUDA_TOP="$(if $(NVCC),$(CUDA_TOP))" python3 dev/cut/test_cut.py $(CUT)

run: train_moe upcycle
	dev/story.sh

test: test_moe
	./test_moe

test_gpu: test_moe_cu
	./test_moe_cu

# how fast training is, in about two minutes; BENCH=--short: only whether it works
build/bench: dev/bench/bench.c dev/bench/timed.h $(LIB) $(MORE)
	$(CC) $(FLAGS) dev/bench/bench.c -o $@ -lm

bench: build/bench
	build/bench $(BENCH)

# our matrix products beside those of other libraries; BLAS="libmkl_rt.so libopenblas.so": which
build/products: dev/bench/products.c $(LIB) $(MORE)
	$(CC) $(FLAGS) -rdynamic dev/bench/products.c -o $@ -lm -ldl

products: build/products
	build/products $(BLAS)

# dev/lessons/run.sh builds, runs and compares them
build/lessons/%: dev/lessons/%.c dev/lessons/lesson.h $(LIB) $(MORE)
	@mkdir -p build/lessons
	$(CC) $(FLAGS) $< -o $@ -lm

lessons:
	dev/lessons/run.sh

# a page that shows a small story: out/picture/report.html
picture: train_moe upcycle
	dev/report/picture.sh

# the tokens of a text by dev/lib/tokenizer.h, for dev/tokenizer/check.py
build/encode: dev/tokenizer/encode.c $(LIB) $(MORE)
	$(CC) $(FLAGS) dev/tokenizer/encode.c -o $@ -lm

# JOBS, THREADS, LAB, TRAINER, OPTIONS: dev/lab/README.md
lab: train_moe upcycle
	@dev/lab/run.sh $(E)

references:
	python3 dev/reference/make_references.py --check
	python3 dev/reference/make_router_references.py --check
	python3 dev/reference/make_shrinking_references.py --check
	python3 dev/reference/make_shared_references.py --check
	python3 dev/reference/make_growth_references.py --check

clean:
	rm -rf build train_moe train_moe_cu upcycle test_moe test_moe_cu

.PHONY: all single cut test_cut run test test_gpu test_standin test_ptx bench products lessons picture lab references clean \
        always
