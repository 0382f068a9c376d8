#!/bin/sh
# Builds the lessons, runs them and compares what they print with NAME.txt. Numbers may differ by one unit of their last
# digit, and bars by one sign: another processor rounds other sums. Ends with `N passed, N failed`.
#
#     dev/lessons/run.sh [NAME ...]             all of them, or some;  CC, CFLAGS and ARCH as for make
#     dev/lessons/run.sh --write [NAME ...]     writes NAME.txt anew
cd "$(dirname "$0")/../.." || exit 1
write=
[ "$1" != --write ] || { write=1; shift; }
[ $# -gt 0 ] || set -- router_gradient twins balance transpose drop batch_bits
passed=0 failed=0

compare() { # expected, printed: says the first line that differs
    awk '
    function last_unit(s) { return s ~ /\./ ? 10 ^ -(length(s) - index(s, ".")) : 1 }
    function plain(s) { sub(/%$/, "", s); return s }
    NR == FNR { expected[NR] = $0; lines = NR; next }
    { count = FNR; same = split(expected[FNR], a) == NF
      for (i = 1; i <= NF && same; i++) {
          x = plain(a[i]); y = plain($i)
          if (x == y) continue
          if (x ~ /^-?[0-9]+\.[0-9]+$/ && y ~ /^-?[0-9]+\.[0-9]+$/) same = (x - y) ^ 2 <= (1.01 * last_unit(x)) ^ 2
          else if (x ~ /^\|?[#<>]*\|?$/ && y ~ /^\|?[#<>]*\|?$/) same = (length(x) - length(y)) ^ 2 <= 1
          else same = 0
      }
      if (!same) { print "line " FNR ", expected and printed:\n" expected[FNR] "\n" $0; bad = 1; exit 1 } }
    END { if (!bad && count != lines) { print "expected " lines " lines, printed " count + 0; exit 1 } }' "$1" "$2"
}

for name; do
    program=build/lessons/$name
    if said=$(make -s CFLAGS="${CFLAGS:--O1}" "$program" 2>&1) && "$program" >"$program.out"; then
        [ -z "$write" ] || cp "$program.out" "dev/lessons/$name.txt"
        if said=$(compare "dev/lessons/$name.txt" "$program.out"); then
            passed=$((passed + 1))
            echo "ok     $name"
            continue
        fi
    fi
    failed=$((failed + 1))
    echo "FAILED $name"
    echo "$said"
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
