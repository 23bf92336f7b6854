#!/usr/bin/env bash
# What a GPU has to show for this program, for when one is to be had for minutes: steps in the order of their worth, each
# with a time limit of its own, in groups that keep theirs.
#
#   scripts/prove_on_gpu.sh OUT GROUP…     contact perf deep
#   scripts/prove_on_gpu.sh --limits       what every step may take, and that the groups keep their limits
#
#   contact  4 min    does it compute right, and first numbers; where `check` fails, which part of it is to blame
#   perf     4.5 min  every operation against its bound, decode with energy, PyTorch on the same card, prefill
#   deep     2.5 min  a profile, sensors, kernels compiled by the driver, A/A through `compare`, compute-sanitizer
#
# OUT/proof-GROUP.tar.gz (16 MiB at most, rewritten after each step) holds all records and logs. What matters of them is
# printed last, then a row for each step, together under 10,000 characters. A step that fails or is out of time does not
# stop the others; one whose tool is missing or refused is skipped.
# Exit codes: 0 nothing failed, 1 something did, 2 usage.
#
# TOKMETER names the program (target/release/tokmeter), DEVICE the card (cuda:0), MODEL the shapes (llama-3.1-8b); paths
# are from the root of the checkout. It needs the driver, for PyTorch's part python3 with torch, and for the deeper steps
# compute-sanitizer and ncu; no network, and no rights beyond those of a user. No setting of the card is changed.
# For a rehearsal: PROOF_BATCH, PROOF_DEPTH, PROOF_OSL, PROOF_ISL and PROOF_SMALL_MODEL are sizes, PROOF_LIMIT_SCALE
# and PROOF_WINDOW_SCALE factors of the time limits and of the timed windows.
set -uo pipefail
cd "$(dirname "$0")/.."

readonly GROUPS_IN_ORDER=(contact perf deep)
declare -rA LIMIT_S=([contact]=240 [perf]=270 [deep]=150)
readonly RESERVE_S=10           # of a group's limit, for archives and the end
readonly KILL_AFTER_S=2         # of a step's limit, from asking it to stop to killing it
readonly MOST_ARCHIVE_BYTES=$((16 << 20))
readonly MOST_CLOSING_BYTES=9900
readonly SANITIZER_REFUSES='[Dd]evice not supported|Unable to find injection library|not supported on this'
# Of the log of a step that held, what the results leave out: remarks, and what the numbers mean.
readonly REMARKS='^ *$|^(–|!|\{|warning:|NOT A |SYNTHETIC |remark)|^[a-z][a-z0-9 ]*: '
readonly NCU_REFUSES='ERR_NVGPUCTRPERM|LibraryNotLoaded|Failed to initialize the profiler|No supported GPUs'

tokmeter=${TOKMETER:-target/release/tokmeter}
model=${MODEL:-llama-3.1-8b}
batch=${PROOF_BATCH:-1,8,32,64}
ends=${batch%%,*},${batch##*,}
depth=${PROOF_DEPTH:-1024}
osl=${PROOF_OSL:-64}
isl=${PROOF_ISL:-2048,8192}
small=${PROOF_SMALL_MODEL:-smollm2-135m}
limit_scale=${PROOF_LIMIT_SCALE:-1}
device=(--device "${DEVICE:-cuda:0}")
tiny=("${device[@]}" -m models/tiny/llama --offline)
synthetic=("${device[@]}" -m "$model" --weights synthetic --offline)

usage() {
    sed -n '2,24s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# Of decimals, which bash has not.
product() { awk -v a="$1" -v b="$2" 'BEGIN { print a * b }'; }
window() { product "$1" "${PROOF_WINDOW_SCALE:-1}"; }

# ---- steps ----------------------------------------------------------------------------------------------------------

planning=       # `held` or `failed`: no step runs, the limits are added up as if check-own had ended so
planned=()      # "GROUP NAME LIMIT"
rows=()         # of the table
shown=()        # "LOG LINES EXIT-CODE", of the results
group=
work=           # this group's logs and records
skip=           # why the next step is skipped
refuses=        # what a tool that may not run says
failures=0
is_wrong=       # check-own failed
running=        # process of the step
clock_log=      # process of nvidia-smi

# The next step needs this program, and is skipped too where the program says that it may not run (a pattern).
needs() {
    command -v "$1" > /dev/null || skip="there is no $1"
    refuses=${2:-}
}

# step NAME LIMIT_S LINES COMMAND…: runs it under its limit and notes how it went; results show the log's last LINES.
step() {
    local name=$1 limit_s=$2 lines=$3 why=$skip says=$refuses code begin=$SECONDS
    shift 3
    skip='' refuses=''
    if [ -n "$planning" ]; then
        planned+=("$group $name $limit_s")
        [ "$planning" = held ] || [ "$name" != check-own ]
        return
    fi
    if [ -n "$why" ]; then
        row "$name" - 0 "skipped: $why"
        return 0
    fi
    local log=$work/$name.log
    timeout --kill-after "$(product $KILL_AFTER_S "$limit_scale")" \
        "$(product $((limit_s - KILL_AFTER_S)) "$limit_scale")" "$@" > "$log" 2>&1 < /dev/null &
    running=$!
    wait "$running"
    code=$?
    running=
    if [ "$code" -ne 0 ] && [ -n "$says" ] && grep -aqE "$says" "$log"; then
        row "$name" "$code" $((SECONDS - begin)) "skipped: $(grep -aE -m 1 "$says" "$log")"
        lines=0 code=0
    elif [ "$code" -ne 0 ]; then
        failures=$((failures + 1))
        row "$name" "$code" $((SECONDS - begin)) "$(first_failing_line "$code" "$log")"
    else
        row "$name" 0 $((SECONDS - begin)) ok
    fi
    [ "$lines$code" = 00 ] || shown+=("$log $lines $code")
    archive
    return "$code"
}

first_failing_line() { # code log
    case $1 in 124 | 137) printf 'out of time: ' ;; esac
    grep -aE -m 1 '^(error|FAILED|Traceback)|panicked at|FAILED|^=+ (Invalid|Error|Program hit)|[A-Za-z]Error:' "$2" ||
        grep -av '^ *$' "$2" | tail -n 1
}

row() { # name code seconds words
    local text
    text=$(printf '%-8s %-16s %4s %4s s  %.100s' "$group" "$1" "$2" "$3" "$(tr -d '\r' <<< "$4")")
    rows+=("$text")
    printf '%s\n' "$text"
}

# Everything of this group into one file of limited size; the largest logs stay out first.
archive() {
    local archive=$out/proof-$group.tar.gz largest
    printf '%s\n' "${rows[@]}" > "$work/steps.txt"
    while :; do
        tar -C "$work" -cf - . 2> /dev/null | gzip -1 > "$archive.new"
        [ "$(stat -c %s "$archive.new")" -gt "$MOST_ARCHIVE_BYTES" ] || break
        largest=$(cd "$work" && { ls -S -- *.log; ls -S -- *; } 2> /dev/null | head -n 1)
        [ -n "$largest" ] || break
        printf '%s: %s bytes, left out of the archive\n' "$largest" "$(stat -c %s "$work/$largest")" |
            tee -a "$work/left-out.txt"
        rm -f "${work:?}/$largest"
    done
    mv "$archive.new" "$archive"
}

# Clocks, power and temperature of the whole group. It also keeps the driver loaded between processes.
begin_clock_log() {
    command -v nvidia-smi > /dev/null || return 0
    local fields=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active
    nvidia-smi --query-gpu=$fields --format=csv,noheader --loop-ms=500 > "$work/clocks.csv" 2>&1 < /dev/null &
    clock_log=$!
}

end_clock_log() {
    [ -n "$clock_log" ] || return 0
    kill "$clock_log" 2> /dev/null
    wait "$clock_log" 2> /dev/null
    clock_log=
}

run_group() {
    group=$1
    [ -n "$planning" ] || { work=$scratch/$group && mkdir -p "$work" && begin_clock_log; }
    "$group"
    [ -n "$planning" ] || { end_clock_log && archive; }
}

# ---- checks: the numbers as JSON for a program, and in the log as lines for a person ---------------------------------

readonly CHECK_LINES='
import json, sys
report = json.load(open(sys.argv[1]))
used = lambda part: "no number" if part["tolerance_used"] is None else "%.2f" % part["tolerance_used"]
for op in report["ops"]:
    for failed in op["failed"][:4]:
        print("FAILED %s: %s, %s of the tolerance" % (op["op"], failed["case"], used(failed)))
for way in report["forward"]:
    if not way["passed"]:
        print("FAILED forward pass: %s, %s of the tolerance" % (way["case"], used(way)))
print("Tolerance used:", ", ".join("%s %s" % (op["op"], used(op)) for op in report["ops"]))
if report["forward"]:
    print("Forward pass, the most in any of %d ways: %s" % (len(report["forward"]), max(map(used, report["forward"]))))
'

# What a step runs: the check, whose report becomes a file, and in the log lines. Its exit code is the check's.
check_and_tell() { # report check…
    local report=$1 code
    shift
    "$@" --format json > "$report"
    code=$?
    [ ! -s "$report" ] || python3 -c "$CHECK_LINES" "$report" || head -c 4000 "$report"
    return $code
}
export CHECK_LINES
export -f check_and_tell

check() { # name limit_s [VARIABLE=VALUE] argument…
    local name=$1 limit_s=$2 setting=()
    shift 2
    case $1 in *=*) setting=("$1") && shift ;; esac
    step "$name" "$limit_s" 2 env "${setting[@]}" bash -c 'check_and_tell "$@"' check "$work/$name.json" \
        "$tokmeter" check "$@"
}

# `--op NAME --case TEXT` of the first operation that failed, a word a line; nothing where only the whole pass is wrong.
first_failed_case() { # report
    python3 -c '
import json, sys
for op in json.load(open(sys.argv[1]))["ops"]:
    for failed in op["failed"]:
        sys.exit(print("--op", op["op"], "--case", failed["case"], sep="\n"))
' "$1" 2> /dev/null
}

# ---- contact --------------------------------------------------------------------------------------------------------

contact() {
    step environment 8 0 bash -c 'nvidia-smi; uname -a; nproc; free -g; id; ldd --version | head -n 1; ldd "$0"
        command -v python3 nvcc ncu compute-sanitizer; sha256sum "$0"; "$0" --version' "$tokmeter"
    step doctor 12 0 "$tokmeter" doctor "${device[@]}"
    check check-own 35 "${tiny[@]}" --gemm own || { isolation && return; }
    check check-cublaslt 25 "${tiny[@]}" --gemm cublaslt
    step peaks 30 14 "$tokmeter" peaks "${device[@]}" --seconds "$(window 0.2)" --out "$work/peaks.json"
    step decode 35 8 "$tokmeter" run "${synthetic[@]}" --batch "$ends" --depth "$depth" --osl "$osl" --repeat 1 \
        --min-seconds "$(window 1)" --out "$work/decode.json"
    step prefill 20 6 "$tokmeter" run "${synthetic[@]}" --batch 1 --isl "${isl%%,*}" --repeat 1 \
        --min-seconds "$(window 1)" --out "$work/prefill.json"
    check check-model 25 "${device[@]}" -m "$model" --offline
    check check-f16 20 "${tiny[@]}" --dtype f16
    check check-det 20 "${tiny[@]}" --deterministic
}

# Where the fault is. Right without overlap of kernels: in what one kernel sees of the one before it. Right without
# graphs: in capturing. Right when every launch is waited for: in the order of the queue. Else in a kernel, and
# compute-sanitizer looks at its first failing case (exit code 9: it found something; 1: it did not, and the result is
# wrong all the same).
isolation() {
    local only=() sanitizer=(compute-sanitizer --error-exitcode 9 --tool)
    is_wrong=yes
    check no-overlap 25 TOKMETER_CUDA_PDL=0 "${tiny[@]}" --gemm own
    check no-graphs 25 TOKMETER_CUDA_GRAPHS=0 "${tiny[@]}" --gemm own
    check one-by-one 30 CUDA_LAUNCH_BLOCKING=1 "${tiny[@]}" --gemm own
    [ -n "$planning" ] || mapfile -t only < <(first_failed_case "$work/check-own.json")
    needs compute-sanitizer "$SANITIZER_REFUSES"
    step memcheck 45 12 "${sanitizer[@]}" memcheck "$tokmeter" check "${tiny[@]}" --gemm own "${only[@]}"
    needs compute-sanitizer "$SANITIZER_REFUSES"
    step racecheck 45 12 "${sanitizer[@]}" racecheck "$tokmeter" check "${tiny[@]}" --gemm own "${only[@]}"
    return 0
}

# ---- perf -----------------------------------------------------------------------------------------------------------

perf() {
    local decode=(run "${synthetic[@]}" --depth "$depth" --osl "$osl" --repeat 1)
    step ops 70 29 "$tokmeter" peaks --ops "${device[@]}" -m "$model" --offline --batch "$batch" \
        --depth "$depth" --seconds "$(window 0.1)" --out "$work/ops.json"
    # Windows of ten seconds: energy of shorter ones is in doubt.
    step decode 75 10 "$tokmeter" "${decode[@]}" --batch "$batch" --min-seconds "$(window 10)" \
        --out "$work/decode.json"
    needs python3
    [ -n "$skip" ] || has_torch || skip="the python3 on PATH has no torch"
    [ -s "$work/decode.json" ] || skip=${skip:-"there is no record to set it against"}
    step torch 65 12 python3 -u scripts/torch_baseline.py --against "$work/decode.json" --device "${device[1]}" \
        --seconds "$(window 1)" --repeat 2 --budget "$(product 45 "$limit_scale")" --out "$work/torch.json"
    step prefill 25 8 "$tokmeter" run "${synthetic[@]}" --batch 1 --isl "$isl" --repeat 1 \
        --min-seconds "$(window 2)" --out "$work/prefill.json"
    # Ours stands on both sides of theirs, so that a drift of the card shows.
    step decode-again 25 8 "$tokmeter" "${decode[@]}" --batch "$ends" --min-seconds "$(window 1)" \
        --out "$work/again.json"
}

has_torch() { python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2> /dev/null; }

# ---- deep -----------------------------------------------------------------------------------------------------------

deep() {
    local cases sanitizer=(compute-sanitizer --error-exitcode 9 --tool)
    needs ncu "$NCU_REFUSES"
    step ncu 36 16 bash -c 'profile "$@"' profile "$work/ncu" "$(launches_before_decode)" \
        "$tokmeter" run "${synthetic[@]}" --batch 8 --depth "$depth" --chunk $((8 * depth)) --osl 8 --repeat 1 \
        --min-seconds 0.1 --power none --out "$work/profiled.json"
    step sensors 40 12 bash -c 'sensors_and_tell "$@"' sensors "$work/sensors.json" \
        "$tokmeter" doctor --sensors "${device[@]}" --seconds "$(at_least 0.1 "$(window 0.5)")"
    refuses='is in no binary' # without the kernel compiler there is nothing for the driver to compile
    check driver-jit 24 "${tiny[@]}" --jit ptx
    refuses='is not a measurement' # what the stand-in driver gives
    step same-twice 14 12 bash -c 'same_twice "$@"' same-twice "$work" "$tokmeter" "${device[@]}" -m "$small" \
        --weights synthetic --offline --batch 1 --depth $((depth / 8)) --osl $((osl / 2)) --repeat 1 \
        --min-seconds "$(window 0.5)"
    cases="GQA 4, decode of 19 sequences"
    needs compute-sanitizer "$SANITIZER_REFUSES"
    step memcheck 9 3 "${sanitizer[@]}" memcheck "$tokmeter" check "${device[@]}" --op attention --case "$cases"
    needs compute-sanitizer "$SANITIZER_REFUSES"
    step racecheck 9 3 "${sanitizer[@]}" racecheck "$tokmeter" check "${device[@]}" --op mlp_out --case "$cases"
    step sampler-effect 8 4 "$tokmeter" doctor --sampler-effect "${device[@]}" -m "$small" --pairs 8 \
        --seconds "$(at_least 0.1 "$(window 0.25)")"
}

at_least() { awk -v a="$1" -v b="$2" 'BEGIN { print (b > a ? b : a) }'; }

# Of the kernels that are profiled, the step that fills the context launches two norms and a rotation in each layer, one
# norm and the head's product. The profile begins in the first layers of a decode step.
launches_before_decode() {
    local layers
    layers=$(sed -n 's/^num_hidden_layers *= *//p' "models/$model.toml" 2> /dev/null)
    echo $((3 * ${layers:-32} + 2 + 8))
}

# Twelve launches: a layer and a half. Only what is asked for by name is counted, so that the making of weights is not.
profile() { # report launches-to-skip command…
    local report=$1 skip=$2
    shift 2
    ncu --clock-control none --graph-profiling node --section SpeedOfLight --section LaunchStats --section Occupancy \
        --section WarpStateStats --section MemoryWorkloadAnalysis --force-overwrite --export "$report" \
        --kernel-name 'regex:gemm_stream|attention_decode|rms_norm|rope_kv' --launch-skip "$skip" --launch-count 12 \
        "$@" &&
        ncu --import "$report.ncu-rep" --page details > "$report.txt" &&
        ncu --import "$report.ncu-rep" --page raw --csv > "$report.csv" &&
        python3 -c "$PROFILE_LINES" "$report.csv"
}

readonly PROFILE_LINES='
import csv, sys
head, units, *launches = csv.reader(open(sys.argv[1]))
share = ".avg.pct_of_peak_sustained_elapsed"
columns = ["Kernel Name", "Grid Size", "gpu__time_duration.sum", "gpu__dram_throughput" + share,
           "sm__throughput" + share, "launch__registers_per_thread"]
at = [head.index(column) for column in columns if column in head]
print(" | ".join(head[i].split(".")[0] + (" " + units[i] if units[i] else "") for i in at))
for launch in launches:
    print(" | ".join(launch[i][:40] for i in at))
'

sensors_and_tell() { # report command…
    local report=$1 code
    shift
    "$@" --format json > "$report"
    code=$?
    python3 -c "$SENSOR_LINES" "$report" || head -c 4000 "$report"
    return $code
}

readonly SENSOR_LINES='
import json, sys
report = json.load(open(sys.argv[1]))
for finding in report["findings"]:
    if finding["section"] == "sensor probe":
        print(" ", finding["status"], finding["what"], finding["value"])
for probe in report.get("sensor_probes", []):
    print(" ", json.dumps({name: value for name, value in probe.items() if name != "steps"}))
'

# Four sessions of the same in turns, two to a side. Whichever verdict so few give, there has to be one.
same_twice() { # folder program argument…
    local folder=$1 program=$2 session
    shift 2
    for session in a1 b1 a2 b2; do
        "$program" run "$@" --session "$session" --out "$folder/same-$session.json" > /dev/null || return
    done
    "$program" compare --baseline "$folder"/same-a?.json --candidate "$folder"/same-b?.json --out "$folder/same.json" \
        --out "$folder/same.txt" > /dev/null
    local code=$?
    [ ! -e "$folder/same.txt" ] || head -n 8 "$folder/same.txt"
    case $code in 0 | 10 | 11) ;; *) return "$code" ;; esac
}
export PROFILE_LINES SENSOR_LINES
export -f profile sensors_and_tell same_twice

# ---- limits ---------------------------------------------------------------------------------------------------------

# The steps of each group as they are when all holds, and when check-own fails. Exit code 1 where a sum is too large.
limits() {
    local path name code=0 sum
    for path in held failed; do
        planning=$path
        for name in "${GROUPS_IN_ORDER[@]}"; do
            [ "$path" = held ] || [ "$name" = contact ] || continue
            planned=()
            run_group "$name"
            printf '%s\n' "${planned[@]}"
            sum=$(printf '%s\n' "${planned[@]}" | awk '{ sum += $3 } END { print sum }')
            printf '%s, check %s: %d s and %d s in reserve, at most %d s\n' "$name" "$path" "$sum" "$RESERVE_S" \
                "${LIMIT_S[$name]}"
            [ $((sum + RESERVE_S)) -le "${LIMIT_S[$name]}" ] || code=1
        done
    done
    planning=
    return "$code"
}

# ---- the end --------------------------------------------------------------------------------------------------------

# Whole lines of stdin while they fit.
fit() { # bytes
    LC_ALL=C awk -v most="$1" '
        { size += length($0) + 1 }
        size > most - 30 { print "(more in the archive)"; exit }
        { print }'
}

# The shortest first: where room is short, long tables are cut.
excerpts() { # group
    local log lines code
    [ ${#shown[@]} -eq 0 ] || printf '%s\n' "${shown[@]}" | sort -s -n -k 2,2 | while read -r log lines code; do
        case $log in "$scratch/$1"/*) ;; *) continue ;; esac
        [ -s "$log" ] || continue
        printf -- '-- %s %s\n' "$1" "$(basename "$log" .log)"
        if [ "$code" = 0 ]; then
            grep -avE "$REMARKS" "$log" | tail -n "$lines"
        else
            grep -av '^ *$' "$log" | tail -n 8
        fi | cut -c 1-170
    done
}

clock_summary() { # group
    [ -s "$scratch/$1/clocks.csv" ] || { printf '%s: no log of clocks\n' "$1"; return; }
    awk -F', *' -v group="$1" '
        $4 + 0 > watts { watts = $4 + 0 }
        $2 + 0 > 0 && (!least || $2 + 0 < least) { least = $2 + 0 }
        $2 + 0 > most { most = $2 + 0 }
        END { printf "%s: %d readings, at most %.0f W, SM clock %d to %d MHz\n", group, NR, watts, least, most }
    ' "$scratch/$1/clocks.csv"
}

closing() {
    local table name share
    table=$(
        printf '%s\n' "${rows[@]}"
        for name in "${begun[@]}"; do clock_summary "$name" && ls -l "$out/proof-$name.tar.gz"; done
    )
    share=$(((MOST_CLOSING_BYTES - ${#table} - 100) / ${#begun[@]}))
    printf '== results\n'
    for name in "${begun[@]}"; do excerpts "$name" | fit "$share"; done
    printf '== steps: name, exit code, seconds, first failing line\n%s\n' "$table"
}

# Text alone: a line that was cut may end within a character.
readable() {
    LC_ALL=C tr -cd '\t\n\40-\176\200-\377' |
        if command -v iconv > /dev/null; then iconv -c -f UTF-8 -t UTF-8; else cat; fi
}

stop() {
    trap - INT TERM
    [ -z "$running" ] || kill "$running" 2> /dev/null
    end_clock_log
    row stopped - 0 "by a signal"
    archive
    closing | readable
    exit 143
}

# ---- all of it ------------------------------------------------------------------------------------------------------

scratch=/nowhere
if [ "${1:-}" = --limits ]; then
    work=/nowhere
    limits
    exit
fi
[ $# -ge 2 ] || usage
out=$1
shift
refuse() { # code error hint
    printf 'error: %s\nhint: %s\n' "$2" "$3" >&2
    exit "$1"
}
for name in "$@"; do
    [[ -v LIMIT_S[$name] ]] || refuse 2 "there is no group $name" "expected ${GROUPS_IN_ORDER[*]}"
done
(limits) > /dev/null || refuse 1 "the steps may take longer than their group" "$0 --limits adds them up"
command -v "$tokmeter" > /dev/null || refuse 2 "$tokmeter: there is no such program" "name it in TOKMETER"
mkdir -p "$out" || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap stop INT TERM
begun=()
for name in "$@"; do
    if [ -n "$is_wrong" ]; then
        group=$name
        row - - 0 "skipped: what computes wrong is not timed"
        continue
    fi
    begun+=("$name")
    run_group "$name"
done
closing | readable
[ "$failures" -eq 0 ]
