#!/bin/sh
# Fits the law of serving to every group of NVIDIA's measured serving rows and prints the errors of leaving one row out.
# The rows are aiconfigurator's silicon_sample.csv (Apache-2.0), which is not kept in this repository.
# Fails when the pooled errors are worse than those known of the law: dense 5.4 % MAPE and 2.7 % median, experts 6.4 and 2.9.
set -eu
[ $# -eq 1 ] || { echo "usage: $0 PATH/silicon_sample.csv" >&2; exit 2; }
# TOKMETER names another build of the program.
[ -n "${TOKMETER:-}" ] || { cargo build --release --quiet; TOKMETER=target/release/tokmeter; }
"$TOKMETER" calibrate --from csv "$1" | awk '
  { print }
  /all groups, dense/   { seen++; if ($2 > 5.4 || $4 > 2.7) worse = 1 }
  /all groups, experts/ { seen++; if ($2 > 6.4 || $4 > 2.9) worse = 1 }
  END { if (seen != 2 || worse) { print "worse than known" > "/dev/stderr"; exit 1 } }'
