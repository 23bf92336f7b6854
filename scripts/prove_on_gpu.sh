#!/usr/bin/env bash
# What a GPU has to show for this program, in the order in which each step is worth having only if the one before it held.
# Needs the program, and for single steps python3 with torch, compute-sanitizer or ncu. Changes no setting of the card.
#
#   scripts/prove_on_gpu.sh OUT [STEP…]        all steps, or these: correct sensors ceilings bench peer sanitize profile
#
# Each step leaves its records and logs in OUT, and a step that fails does not stop the others: the list at the end says
# how each went. TOKMETER names the program (target/release/tokmeter), DEVICE the card (cuda:0), MODEL the shapes
# (llama-3.1-8b).
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=$1
shift
[ $# -gt 0 ] && steps=("$@") || steps=(correct sensors ceilings bench peer sanitize profile)
tokmeter=${TOKMETER:-target/release/tokmeter}
device=${DEVICE:-cuda:0}
model=${MODEL:-llama-3.1-8b}
mkdir -p "$out"
device_and_model=(--device "$device" -m "$model")
synthetic=("${device_and_model[@]}" --weights synthetic)

# Numbers of a device that computes wrong are worth nothing.
correct() {
    "$tokmeter" doctor --device "$device" &&
        "$tokmeter" check --device "$device" -m models/tiny/llama &&
        "$tokmeter" check "${device_and_model[@]}" &&
        "$tokmeter" check "${device_and_model[@]}" --dtype f16
}

sensors() { "$tokmeter" doctor --device "$device" --sensors --format json > "$out/sensors.json"; }

ceilings() {
    "$tokmeter" peaks --device "$device" --out "$out/peaks.json" &&
        "$tokmeter" peaks --ops "${device_and_model[@]}" --batch 1,8,32,64,256 --depth 1024 --out "$out/ops-decode.json" &&
        "$tokmeter" peaks --ops "${device_and_model[@]}" --batch 1 --isl 2048,8192 --out "$out/ops-prefill.json"
}

bench() {
    "$tokmeter" run --device "$device" --out "$out/quick.json" &&
        "$tokmeter" run "${synthetic[@]}" --batch 1,8,32,64,256 --depth 1024 --osl 64 --repeat 3 --min-seconds 3 \
            --out "$out/decode.json" &&
        "$tokmeter" run "${synthetic[@]}" --batch 1 --isl 2048,8192 --repeat 3 --min-seconds 3 --out "$out/prefill.json"
}

# In turns: ours stands on both sides of theirs, so that a drift of the card shows.
peer() {
    local decode=(run "${synthetic[@]}" --batch 1,8,64 --depth 1024 --osl 64 --repeat 2 --min-seconds 2)
    "$tokmeter" "${decode[@]}" --out "$out/peer-before.json" &&
        python3 scripts/torch_baseline.py "models/$model.toml" --device "$device" --against "$out/peer-before.json" \
            --out "$out/torch.json" &&
        "$tokmeter" "${decode[@]}" --out "$out/peer-after.json"
}

sanitize() {
    local tool status=0
    for tool in memcheck racecheck synccheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$tokmeter" check --device "$device" -m models/tiny/llama ||
            status=1
    done
    return $status
}

# Each decode kernel once, after the first steps; the clocks are left as they are.
profile() {
    ncu --clock-control none --set full --launch-skip 200 --launch-count 12 --force-overwrite --export "$out/decode" \
        "$tokmeter" run "${synthetic[@]}" --batch 8 --depth 1024 --osl 16 --repeat 1 --min-seconds 0.1 \
            --out "$out/profiled.json" &&
        ncu --import "$out/decode.ncu-rep" --page details > "$out/decode-ncu.txt"
}

for step in "${steps[@]}"; do
    declare -F "$step" > /dev/null || { echo "there is no step $step" >&2; exit 2; }
done
failed=0
summary=()
for step in "${steps[@]}"; do
    printf '\n== %s\n' "$step"
    begin=$SECONDS
    if "$step" 2>&1 | tee "$out/$step.log"; then
        summary+=("$step held, $((SECONDS - begin)) s")
    else
        summary+=("$step FAILED, $((SECONDS - begin)) s: $out/$step.log")
        failed=1
    fi
done
printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
