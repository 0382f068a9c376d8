#!/usr/bin/env python3
"""The numbers of log.csv and val.csv for TensorBoard or Weights & Biases:
    python3 dev/report/export.py tensorboard OUT [OUT2 ...]     writes OUT/events.out.tfevents.0.train_moe
    python3 dev/report/export.py wandb OUT [OUT2 ...]           one run for each OUT; WANDB_MODE=offline: here
"""
import csv
import pathlib
import struct
import sys


def masked_crc(data):           # CRC-32C, by which TensorBoard checks its records
    c = 0xFFFFFFFF
    for byte in data:
        c ^= byte
        for _ in range(8):
            c = c >> 1 ^ (0x82F63B78 if c & 1 else 0)
    c ^= 0xFFFFFFFF
    return struct.pack("<I", ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def field(number, data):        # protobuf: bytes with their length
    return varint(number << 3 | 2) + varint(len(data)) + data


def record(event):
    size = struct.pack("<Q", len(event))
    return size + masked_crc(size) + event + masked_crc(event)


def rows(out):                  # (step, {name: number}) of each row
    for name in ("log.csv", "val.csv"):
        for row in csv.DictReader(open(out / name, newline="")) if (out / name).exists() else ():
            if None not in row.values():                # a killed run's last row may be cut
                yield int(row.pop("step")), {k: float(v) for k, v in row.items() if v}


def main(how, outs):
    for out in map(pathlib.Path, outs):
        if not (out / "log.csv").is_file():
            sys.exit(f"export.py: {out}: there is no log.csv; give what train_moe --out wrote")
        if how == "wandb":
            import wandb
            run = wandb.init(project="train_moe", name=out.name)
            for step, numbers in sorted(rows(out), key=lambda r: r[0]):
                run.log(numbers, step=step)
            run.finish()
            continue
        records = [record(b"\x09" + struct.pack("<d", 0) + field(3, b"brain.Event:2"))]
        for step, numbers in rows(out):
            values = [field(1, field(1, k.encode()) + b"\x15" + struct.pack("<f", v)) for k, v in numbers.items()]
            time = b"\x09" + struct.pack("<d", step) + b"\x10" + varint(step)
            records.append(record(time + field(5, b"".join(values))))
        (out / "events.out.tfevents.0.train_moe").write_bytes(b"".join(records))


if __name__ == "__main__":
    if sys.argv[1:2] not in (["tensorboard"], ["wandb"]) or not sys.argv[2:]:
        sys.exit(__doc__.strip())
    main(sys.argv[1], sys.argv[2:])
