#!/usr/bin/env python3
"""What to read of train_moe.c in one evening, and one token's way through it: the calls of a training step of a
sparse layer, in the order in which a reader meets them for the first time, forward and backward:

    python3 dev/walk.py            prints them with their lines; fails over the bounds, or if dev/reading.md is another
    python3 dev/walk.py --write    takes them into dev/reading.md

A jump is a move of more than 60 lines to the next definition, from the last one or, after a return, from its caller.
The matrix products are a black box: matmul_*, grouped_matmul_* and multiply_block are named, not counted. Both lists
are checked against the source: each function is called, by its name, in the body of the one that it is indented under,
and what else is called there and has its definition in this project stands in ASIDE. Needs universal-ctags.
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
# Calls that the lists leave out, as a reader would not follow them, or not on this way.
ASIDE = {
    "their names say it": """
        attention_scratch copy_rows count_sparse dataset_read experts_input fast_exp has_router_variant hash_string imin
        is_due layer_experts layer_width lmin max_of qkv_width random_key random_permutation score_stride seconds
        shared_width sum_columns sum_of_block work_deal work_take""",
    "other routers, a shared expert": """
        router_before_step router_after_step variant_router_forward variant_router_backward shared_expert_forward
        shared_expert_backward""",
    "around the step": """
        batch_create catch_signals end_progress learning_rate nothing_to_do observe_layer position_after print_sample
        report_problem report_signal report_step reports_close reports_open resume_validation save_step take_losses
        validate"""}
# What to read first: from the line with the first text up to the one with the second, which does not belong to it.
EVENING = (
    ("1, the block", "One block, repeated L times", "typedef enum { LLAMA"),
    ("2, the three formulas of a linear layer", "A linear layer, C numbers in", "sum_products and the loops below"),
    ("... and their loops, for many experts", "E products at once, one for", "The three products of one matrix"),
    ("3, RMSNorm, forward and backward", "RMSNorm (", "Rotary positions ("),
    ("4, the mixture of experts, all of it", "4. Mixture of experts", "5. The model"),
    ("5, what each layer keeps", "The arrays of the forward and backward", "What is written and used up within"),
    ("... the router and the five steps of a layer", "From ffn_in to the token's", "Runs B sequences of T tokens"),
    ("6, a training step", "Step number `step`, counted", "Trains from run->begun"))
LINES = 450
# (functions, jumps) at most; the backward walk counts what the forward walk has not shown
BOUNDS = {"forward": (25, 12), "backward": (15, 8)}


def definitions():
    """{function: (path, first line, last line)} of train_moe.c and dev/lib."""
    files = ["train_moe.c", *sorted(str(p) for p in pathlib.Path("dev/lib").glob("*.h"))]
    tags = subprocess.run(["ctags", "--languages=C", "--langmap=C:+.h", "--c-kinds=f", "-x",
                           "--_xformat=%N %F %n %{end}", *files], capture_output=True, text=True, check=True).stdout
    return {name: (path, int(first), int(last)) for name, path, first, last in map(str.split, tags.splitlines())}


def body_of(place):
    path, first, last = place
    text = re.sub(r"//.*", "", "".join(pathlib.Path(path).read_text().splitlines(True)[first - 1:last]))
    return text[text.index("{"):]


def walk(name, listing, places, known):
    functions = jumps = 0
    stack, before, problems = [], None, 0
    print(f"{name}:")
    for line in listing.strip().splitlines():
        function, depth = line.strip(), (len(line) - len(line.lstrip())) // 2
        path, first, _ = places[function]
        stack[depth:] = [function]
        if depth and not re.search(rf"\b{function}\(", body_of(places[stack[depth - 1]])):
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


def left_out(places):
    """How many calls of functions on the way are neither on it nor in ASIDE, or are in ASIDE and not called."""
    listed = {line.strip() for line in (FORWARD + BACKWARD).splitlines() if line.strip()}
    aside = {function for group in ASIDE.values() for function in group.split()}
    called = {}
    for caller in sorted(f for f in listed if not PRODUCTS.match(f)):
        for function in re.findall(r"\b(\w+)\(", body_of(places[caller])):
            if function in places and function not in listed and not PRODUCTS.match(function):
                called.setdefault(function, caller)
    for function in sorted(called.keys() - aside):
        print(f"{called[function]} calls {function}, which is neither listed nor in ASIDE")
    for function in sorted(aside - called.keys()):
        print(f"{function} is in ASIDE, but is not called")
    return len(called.keys() ^ aside)


def evening():
    """The table of what to read first, and how many lines that is."""
    lines, rows, total = pathlib.Path("train_moe.c").read_text().splitlines(), [], 0
    last = 35                                       # behind the map at the top
    for what, begin, end in EVENING:
        first = next(n for n, line in enumerate(lines) if n >= last and begin in line)
        last = next(n for n, line in enumerate(lines) if n > first and end in line)
        while not lines[last - 1].strip(" /-"):
            last -= 1
        rows.append(f"| {what} | {first + 1} to {last} |")
        total += last - first
    return "\n".join(["| section | lines of train_moe.c |", "|---|---|", *rows, f"| all | {total} lines |"]), total


def page(table):
    """dev/reading.md with the present lists and the table."""
    def fenced(listing):
        return "\n".join(["```", *(f"  {line}{'  (a product)' if PRODUCTS.match(line.strip()) else ''}"
                                   for line in listing.strip().splitlines()), "```"])

    text = pathlib.Path("dev/reading.md").read_text()
    for name, new in ("evening", table), ("forward", fenced(FORWARD)), ("backward", fenced(BACKWARD)):
        text = re.sub(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m: m[1] + new + m[2], text, flags=re.S)
    return text


def main():
    places, known = definitions(), set()
    problems = walk("forward", FORWARD, places, known) + walk("backward", BACKWARD, places, known) + left_out(places)
    table, lines = evening()
    print(table, f"\none evening: {lines} lines (at most {LINES})")
    if "--write" in sys.argv:
        pathlib.Path("dev/reading.md").write_text(page(table))
    elif pathlib.Path("dev/reading.md").read_text() != page(table):
        print("dev/reading.md is another: python3 dev/walk.py --write")
        problems += 1
    return problems > 0 or lines > LINES


if __name__ == "__main__":
    sys.exit(main())
