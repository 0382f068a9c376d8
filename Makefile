# make         builds the programs and says what it found
# make run     trains, upcycles and trains on: the whole story on this project's own source files, in a few minutes
# make test    runs every check
# make bench   how fast training is
# make references   makes what the tests compare with anew, with PyTorch and transformers, and compares

CC     ?= cc
ARCH   ?= -march=native
CFLAGS ?= -O3
# gnu11 and not c11: the latter switches off the contraction of a * b + c into one instruction, which halves the speed
# no-math-errno: nobody asks errno about a square root, and without that promise loops with one do not become vector code
FLAGS   = -std=gnu11 $(CFLAGS) $(ARCH) -fno-math-errno -Wall -Wextra

# clang splits 64-byte vectors unless told otherwise
WIDE   := $(shell $(CC) --version 2>/dev/null | grep -q clang && $(CC) $(ARCH) -dM -E - </dev/null 2>/dev/null | \
                  grep -q __AVX512F__ && echo -mprefer-vector-width=512)
OPENMP := $(shell echo 'int main(void){return 0;}' >.openmp.c; $(CC) -fopenmp .openmp.c -o .openmp.out 2>/dev/null && \
                  echo -fopenmp; rm -f .openmp.c .openmp.out)
ifeq ($(OPENMP),)
# without the library loops can still become vector code
FLAGS  += -fopenmp-simd -Wno-unknown-pragmas
endif
FLAGS  += $(OPENMP) $(WIDE)

all: train_moe upcycle
	@echo "compiler: $(CC)"
ifeq ($(OPENMP),)
	@echo "OpenMP:   not found, the programs will use one core."
	@echo "          Debian, Ubuntu: apt install gcc (or libomp-dev for clang); macOS: brew install libomp, then"
	@echo "          make CC='clang -Xclang' CFLAGS=\"-O3 -I\$$(brew --prefix libomp)/include -L\$$(brew --prefix libomp)/lib -lomp\""
else
	@echo "OpenMP:   found"
endif
	@echo "next:     ./train_moe (a minute), make run (a few), make test, ./train_moe --help, ./upcycle --help"

train_moe: train_moe.c build/embedded.h
	$(CC) $(FLAGS) train_moe.c -o $@ -lm

upcycle: upcycle.c train_moe.c build/embedded.h
	$(CC) $(FLAGS) upcycle.c -o $@ -lm

test_moe: test_moe.c upcycle.c train_moe.c build/embedded.h
	$(CC) $(FLAGS) test_moe.c -o $@ -lm

# The text that ./train_moe trains on without --data: the project's own source files, also as an array.
build/embedded.txt: train_moe.c upcycle.c test_moe.c
	@mkdir -p build
	@cat train_moe.c upcycle.c test_moe.c >$@

build/embedded.h: build/embedded.txt
	@{ echo "static const unsigned char embedded_text[] = {"; od -An -v -tu1 build/embedded.txt | \
	   sed 's/  */,/g; s/^,//; s/$$/,/'; echo "0}; static const long embedded_size = sizeof embedded_text - 1;"; } >$@.new
	@mv $@.new $@

run: train_moe upcycle
	dev/story.sh

test: test_moe
	./test_moe

# how fast training is, in about two minutes; BENCH=--short: only whether it works
build/bench: dev/bench/bench.c dev/bench/timed.h train_moe.c build/embedded.h
	$(CC) $(FLAGS) dev/bench/bench.c -o $@ -lm

bench: build/bench
	build/bench $(BENCH)

references:
	python3 dev/reference/make_references.py --check
	python3 dev/reference/make_router_references.py --check

clean:
	rm -rf build train_moe upcycle test_moe

.PHONY: all run test bench references clean
