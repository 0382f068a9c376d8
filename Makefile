# make         builds the programs and says what it found
# make run     trains a small mixture of experts on this project's own source files and samples from it
# make test    runs every check
# make help    lists everything else

CC     ?= cc
ARCH   ?= -march=native
CFLAGS ?= -O3
# gnu11 and not c11: the latter switches off the contraction of a * b + c into one instruction, which halves the speed
FLAGS   = -std=gnu11 $(CFLAGS) $(ARCH) -Wall -Wextra

# clang splits 64-byte vectors unless told otherwise
WIDE   := $(shell $(CC) --version 2>/dev/null | grep -q clang && $(CC) -march=native -dM -E - </dev/null 2>/dev/null | \
                  grep -q __AVX512F__ && echo -mprefer-vector-width=512)
OPENMP := $(shell echo 'int main(void){return 0;}' >.openmp.c; $(CC) -fopenmp .openmp.c -o .openmp.out 2>/dev/null && \
                  echo -fopenmp; rm -f .openmp.c .openmp.out)
NVCC   := $(shell command -v nvcc 2>/dev/null)
ifeq ($(OPENMP),)
# without the library loops can still become vector code
FLAGS  += -fopenmp-simd -Wno-unknown-pragmas
endif
FLAGS  += $(OPENMP) $(WIDE)

all: train_moe
	@echo "compiler: $(CC)"
ifeq ($(OPENMP),)
	@echo "OpenMP:   not found, the programs will use one core."
	@echo "          Debian, Ubuntu: apt install gcc (or libomp-dev for clang); macOS: brew install libomp, then"
	@echo "          make CC='clang -Xclang' CFLAGS=\"-O3 -I\$$(brew --prefix libomp)/include -L\$$(brew --prefix libomp)/lib -lomp\""
else
	@echo "OpenMP:   found"
endif
	@echo "next:     make run (two minutes), make test, ./train_moe --help"

train_moe: train_moe.c build/embedded.h
	$(CC) $(FLAGS) train_moe.c -o $@ -lm

test_moe: test_moe.c train_moe.c build/embedded.h
	$(CC) $(FLAGS) test_moe.c -o $@ -lm

# The text that ./train_moe trains on without --data: the project's own source files, as an array.
build/embedded.h: train_moe.c test_moe.c Makefile
	@mkdir -p build
	@{ echo "static const unsigned char embedded_text[] = {"; cat train_moe.c test_moe.c | od -An -v -tu1 | \
	   sed 's/  */,/g; s/^,//; s/$$/,/'; echo "0}; static const long embedded_size = sizeof embedded_text - 1;"; } >$@.new
	@mv $@.new $@

run: train_moe
	./train_moe

test: test_moe
	./test_moe

clean:
	rm -rf build train_moe test_moe

.PHONY: all run test clean
