#!/usr/bin/env bash
# Sessions without any change between them: what `tokmeter compare --noise` learns chance from, and the set against which
# its tests are held (results/<date>-<machine>-aa-sessions/).
#
#   scripts/make_sessions.sh FOLDER COUNT [arguments of tokmeter run…]
#   scripts/make_sessions.sh results/2026-12-01-cpu-2-cores-aa-sessions 24 --suite quick --dtype quantized
#
# A session is a boot. Where a machine cannot be booted COUNT times, each session is one process, declared with --session
# and recorded as declared; PAUSE_SECONDS (60) pass between them. Run it on an idle machine. Records that exist are kept,
# so that an interrupted series goes on where it stopped; after a reboot it goes on as well.
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 FOLDER COUNT [arguments of tokmeter run…]" >&2
    exit 2
fi
folder=$1
count=$2
shift 2
tokmeter=${TOKMETER:-$(dirname "$0")/../target/release/tokmeter}
mkdir -p "$folder"
for ((index = 1; index <= count; index++)); do
    name=$(printf 'session-%02d' "$index")
    if [ -e "$folder/$name.json" ]; then
        continue
    fi
    raw=$(mktemp -d)
    "$tokmeter" run --session "$name" --out "$raw/record.json" "$@"
    "$tokmeter" validate --redact "$raw/record.json" --out "$folder/$name.json"
    rm -r "$raw"
    if ((index < count)); then
        sleep "${PAUSE_SECONDS:-60}"
    fi
done
