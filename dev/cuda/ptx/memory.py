"""Memory of the interpreter. Global memory knows what was allocated. Shared memory keeps for each word of four bytes
who touched it last, which is enough to tell whether every access was ordered by a barrier, a wait or a fence.

What it finds begins with one of these words:
    RAW     a read of what another thread wrote since the last barrier (PTX ISA 9.7.13.1, bar), or of what a cp.async
            has yet to fill (9.7.9.25.3.3: before the wait nothing is visible, after it only to the thread that waited)
    WAR     a write over what another thread read since the last barrier, or what a wgmma in flight may still read
    WAW     two threads write a word between two barriers, or a word that a cp.async has yet to fill is written
    UNSET   a read of what nobody has written
    PROXY   wgmma reads, in the async proxy, what was written in the generic proxy without fence.proxy.async by the
            writer and a barrier after it (9.7.15.4, 9.7.15.7.1)
    ALIGN   an address that is not a multiple of the access's size (6.4.1)
    BOUNDS  an address outside of what was allocated
"""
import numpy as np


class Fault(Exception):
    """What a GPU would leave undefined."""


class Global:
    BASE = 0x7000000000

    def __init__(self, size=48 << 20):
        self.next = 4096
        self.bytes = np.full(size, 0xff, np.uint8)      # bf16 and float read it as NaN
        self.valid = np.zeros(size, np.bool_)

    def take(self, size):
        """The address of `size` bytes, with a gap after them."""
        at, self.next = self.next, -(-(self.next + size + 512) // 256) * 256
        self.valid[at:at + size] = True
        return self.BASE + at

    def put(self, array):
        """The address of a copy of the array."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        address = self.take(data.size)
        self.bytes[address - self.BASE:][:data.size] = data
        return address

    def get(self, address, dtype, shape):
        at = address - self.BASE
        return self.bytes[at:at + int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape).copy()

    def offsets(self, addresses, size, align=None):
        """Where in `bytes` these accesses go; complains if one may not."""
        at = addresses - self.BASE
        if (at % (align or size)).any():
            raise Fault(f"ALIGN: {size} bytes of global memory at an address that is not a multiple of {align or size}")
        inside = (at >= 0) & (at + size <= self.bytes.size)
        if not inside.all() or not (self.valid[at] & self.valid[at + size - 1]).all():
            raise Fault(f"BOUNDS: {size} bytes outside of what was allocated in global memory")
        return at


MANY = -2       # in `reader`: more threads than one, or a wgmma


class Shared:
    SPACE = 256 << 10
    RESERVED = 1024         # what the system keeps of each block (CUDA C++ Programming Guide, Compute Capabilities)

    def __init__(self):
        words = self.SPACE // 4
        self.bytes = np.full(self.SPACE, 0xff, np.uint8)
        self.epoch = 0                                  # barriers so far
        self.end = self.RESERVED                        # of what the block has
        self.writer = np.full(words, -1, np.int32)      # the last thread to write, -1: nobody
        self.written = np.full(words, -1, np.int32)     # in which epoch
        self.reader = np.full(words, -1, np.int32)
        self.read_in = np.full(words, -1, np.int32)
        self.copier = np.full(words, -1, np.int32)      # whose cp.async has yet to fill it
        self.fenced = np.full(words, -1, np.int32)      # epoch of the writer's proxy fence since it wrote, -1: none
        self.multiplied = np.zeros(words, np.int32)     # how many wgmma in flight read it

    def check(self, addresses, size):
        if (addresses % size).any():
            raise Fault(f"ALIGN: {size} bytes of shared memory at {int(addresses[addresses % size != 0][0])}")
        if (addresses < self.RESERVED).any() or (addresses + size > self.end).any():
            raise Fault(f"BOUNDS: {size} bytes of shared memory at {int(addresses.max())} of {self.end}")

    @staticmethod
    def words(addresses, size):
        """(accesses, words of each)"""
        return (addresses >> 2)[:, None] + np.arange(max(1, size // 4))

    def read(self, addresses, size, threads):
        self.check(addresses, size)
        words, threads = self.words(addresses, size), threads[:, None]
        writer = self.writer[words]
        if (self.copier[words] >= 0).any():
            raise Fault("RAW: reads shared memory that a cp.async has yet to fill")
        if (writer == -1).any():
            raise Fault("UNSET: reads shared memory that nobody has written")
        if ((writer != threads) & (self.written[words] == self.epoch)).any():
            raise Fault("RAW: reads shared memory that another thread has written since the last barrier")
        others = (self.read_in[words] == self.epoch) & (self.reader[words] != threads)
        self.reader[words] = np.where(others, MANY, threads)
        # threads of this instruction that share a word: the last one's number stands there now
        self.reader[words[self.reader[words] != np.where(others, MANY, threads)]] = MANY
        self.read_in[words] = self.epoch

    def write(self, addresses, size, threads, copy=False):
        """A store, or (copy) the beginning of a cp.async."""
        self.check(addresses, size)
        words, threads = self.words(addresses, size), threads[:, None]
        if self.multiplied[words].any():
            raise Fault("WAR: writes shared memory that a wgmma in flight may still read")
        if ((self.read_in[words] == self.epoch) & (self.reader[words] != threads)).any():
            raise Fault("WAR: writes shared memory that another thread has read since the last barrier")
        if ((self.written[words] == self.epoch) & (self.writer[words] != threads)).any():
            raise Fault("WAW: two threads write a word between two barriers")
        if (self.copier[words] >= 0).any():
            raise Fault("WAW: writes shared memory that a cp.async has yet to fill")
        owner = self.copier if copy else self.writer
        owner[words] = threads
        if (owner[words] != threads).any():
            raise Fault("WAW: two threads write a word with one instruction")
        if not copy:
            self.mark_written(words)

    def mark_written(self, words):
        self.written[words] = self.epoch
        self.fenced[words] = -1

    def finish_copy(self, addresses, threads, data):
        """The end of cp.async of 16 bytes each."""
        self.bytes[addresses[:, None] + np.arange(16)] = data
        words = self.words(addresses, 16)
        self.copier[words] = -1
        self.writer[words] = threads[:, None]
        self.mark_written(words)

    def fence(self, threads, count):
        """fence.proxy.async of these of `count` threads, for all that they have written."""
        those = np.zeros(count + 1, np.bool_)           # writer -1 is the last place, which stays false
        those[threads] = True
        self.fenced[those[self.writer] & (self.fenced < 0)] = self.epoch

    def multiply(self, words):
        """wgmma begins to read these words."""
        if (self.copier[words] >= 0).any():
            raise Fault("RAW: wgmma reads what a cp.async has yet to fill")
        if (self.writer[words] < 0).any():
            raise Fault("UNSET: wgmma reads shared memory that nobody has written")
        if (self.fenced[words] < 0).any():
            raise Fault("PROXY: wgmma reads what was written without fence.proxy.async after it")
        if (self.fenced[words] == self.epoch).any():
            raise Fault("PROXY: no barrier between the writer's fence.proxy.async and wgmma")
        self.multiplied[words] += 1

    def multiplied_by_now(self, words):
        """A wgmma that read these words has been waited for; other warps know that after the next barrier."""
        self.multiplied[words] -= 1
        self.reader[words] = MANY
        self.read_in[words] = self.epoch
