#!/usr/bin/env python3
"""One token's way through train_moe.c: the calls of a training step of a sparse layer, in the order in which a reader meets
them for the first time, forward and backward. From the project's folder:

    python3 dev/walk.py            prints both lists with their lines, counts functions and jumps, and fails over the bounds

A jump is a move of more than 60 lines to the next definition, from the last one or, after a return, from its caller. The matrix products are a black
box: matmul_*, grouped_matmul_* and multiply_block are named, not counted. Every line of the lists is checked against the
source: the function must be called, by its name, in the body of the one that it is indented under. Needs universal-ctags.
"""
import pathlib
import re
import subprocess
import sys

FORWARD = """
train
  train_step
    dataset_training_sequence
    model_forward
      embedding_forward
      attention_layer_forward
        rmsnorm_forward
        matmul_forward
        qk_norm_forward
        rope
        layer_keys_values
        attention_forward
          multiply_block
        add_rows
      ffn_layer_forward
        router_forward
          softmax_router_forward
            choose_topk
          group_by_expert
          count_balance
        gather_rows
        grouped_matmul_forward
        swiglu_forward
        combine_rows
      cross_entropy_forward
"""
BACKWARD = """
train_step
  model_backward
    cross_entropy_backward
    matmul_backward_input
    rmsnorm_backward
    ffn_layer_backward
      gather_rows
      grouped_matmul_backward_input
      swiglu_backward
      combine_rows
      router_backward
        softmax_router_backward
        balance_backward
    attention_layer_backward
      attention_backward
      rope
      qk_norm_backward
    embedding_backward
  model_update
    gradient_norm
    adamw
"""
PRODUCTS = re.compile("matmul_|grouped_matmul_|multiply_block")
# (functions, jumps) at most; the backward walk counts what the forward walk has not shown
BOUNDS = {"forward": (25, 12), "backward": (15, 8)}


def definitions():
    """{function: (path, first line, last line)} of train_moe.c and dev/lib."""
    files = ["train_moe.c", *sorted(str(p) for p in pathlib.Path("dev/lib").glob("*.h"))]
    tags = subprocess.run(["ctags", "--languages=C", "--langmap=C:+.h", "--c-kinds=f", "-x",
                           "--_xformat=%N %F %n %{end}", *files], capture_output=True, text=True, check=True).stdout
    return {name: (path, int(first), int(last)) for name, path, first, last in map(str.split, tags.splitlines())}


def walk(name, listing, places, known):
    functions = jumps = 0
    stack, before, problems = [], None, 0
    print(f"{name}:")
    for line in listing.strip().splitlines():
        function, depth = line.strip(), (len(line) - len(line.lstrip())) // 2
        path, first, last = places[function]
        stack[depth:] = [function]
        if depth:
            caller = places[stack[depth - 1]]
            body = "".join(pathlib.Path(caller[0]).read_text().splitlines(True)[caller[1] - 1:caller[2]])
            if not re.search(rf"\b{function}\(", body):
                print(f"    {stack[depth - 1]} does not call {function}")
                problems += 1
        note = ""
        if PRODUCTS.match(function):
            note = "  (a product)"
        elif function not in known:
            known.add(function)
            functions += 1
            near = [at for at in (before, depth and places[stack[depth - 1]]) if at and at[0] == path]
            if before and all(abs(first - at[1]) > 60 for at in near):
                jumps += 1
                note = "  <- jump"
            before = (path, first)
        print(f"  {'  ' * depth}{function}  {path}:{first}{note}")
    most_functions, most_jumps = BOUNDS[name]
    print(f"{name}: {functions} functions (at most {most_functions}), {jumps} jumps (at most {most_jumps})\n")
    return problems + (functions > most_functions) + (jumps > most_jumps)


def main():
    places, known = definitions(), set()
    problems = walk("forward", FORWARD, places, known) + walk("backward", BACKWARD, places, known)
    return problems > 0


if __name__ == "__main__":
    sys.exit(main())
