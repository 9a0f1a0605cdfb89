#!/bin/bash
# What docs/steps.md, docs/attention.md, docs/generate.md and kernels/README.md say of one Hopper GPU, compared and timed
# again: about half an hour on an H200, tests of the kernels first; a quarter of an hour more with TEXT.
#
#   bash benchmarks/hopper.sh                    # all parts; those that are done in KEEP are left out
#   bash benchmarks/hopper.sh distill decode     # these
#   KEEP=/tmp/hopper TEXT=rows.npz bash benchmarks/hopper.sh
#
# A part is ended at its limit of seconds, and says what it had printed. TEXT, by benchmarks/study_rows.py, lets `students`
# distil from teachers in float8, and `curves` by each form of the step; without it both are left out. Logs, rows and what
# is done are in KEEP.
set -u
cd "$(dirname "$0")/.."
KEEP=${KEEP:-runs/hopper} TEXT=${TEXT:-}
mkdir -p "$KEEP"
export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=$KEEP/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 began
    shift 2
    KNOWN+=" $name"
    [[ -z $WANTED || " $WANTED " == *" $name "* ]] || return
    [ -e "$KEEP/$name.done" ] && return
    echo "=== $name"
    began=$(date +%s)
    timeout -s INT -k 20 "$seconds" "$@" 2>&1 | tee "$KEEP/$name.log"
    local code=${PIPESTATUS[0]}
    if [ "$code" = 0 ]; then touch "$KEEP/$name.done"; else FAILED+=" $name"; fi
    echo "--- $name ended with $code after $(($(date +%s) - began)) s" | tee -a "$KEEP/summary.txt"
}
# Several processes share the GPU, and a compiled program that another is writing is no help.
compare() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" env -u JAX_COMPILATION_CACHE_DIR JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false \
        python -m pytest -o addopts=--import-mode=importlib -m gpu -v --tb=short "$@"
}
step() { part "$1" "$2" python benchmarks/step_speed.py --implementations pallas_gpu --chunk 2048 --steps 6 "${@:3}"; }
decode() { part "$1" "$2" python benchmarks/decode_speed.py "${@:3}" --output "$KEEP/decode.json"; }

WANTED=$* KNOWN= FAILED=
QWEN="--shape qwen2.5-1.5b-instruct"
FAST="distill.remat=mlp distill.unroll=true distill.float8_teacher=true"

compare linear 300 -n 12 kernels/tests/test_on_gpu.py
compare decoding 150 -n 4 tests/decoding
compare attention 240 -n 6 tests/model/test_attention_on_gpu.py

step distill 180 --stages distill $QWEN --rows 8 --length 4096 --remat mlp --unroll --float8-teacher
step distill-block 120 --stages distill $QWEN --rows 8 --length 4096 --remat block
step distill-3b 200 --stages distill --shape qwen2.5-3b-instruct --rows 4 --length 4096 --remat mlp --unroll --float8-teacher
step align 120 --stages align $QWEN --rows 8 --length 4096
step align-float8 120 --stages align $QWEN --rows 8 --length 4096 --float8-teacher
part one-document 180 python benchmarks/scaling.py context --gpus 1 --length 32768 --steps 4 --set $FAST \
    --output "$KEEP/scaling.json"

decode decode 150 floor batch --models teacher 0.25 --no-hlo
decode transformers 240 transformers --models 0.25
for model in teacher 0.125 0.25 0.5; do decode "contexts-$model" 240 contexts --models "$model"; done
part layer-attention 150 python benchmarks/softmax_attention.py --forms kernel windows causal
part kimi-delta 120 python kernels/benchmarks/gpu_compare.py --recurrence kimi_delta --shapes 8,4096,16,128 --no-check

[ -n "$TEXT" ] && part students 400 python benchmarks/float8_teacher.py configs/smollm2-135m.yaml --text "$TEXT" \
    --tokens 65536 --rows 16 --align 160 --distill 200
[ -n "$TEXT" ] && part curves 500 python benchmarks/kl_curves.py configs/smollm2-135m.yaml --text "$TEXT" \
    distill.batch_size=32 distill.learning_rate=2e-6 distill.mixer_learning_rate=3e-5 --align 160 --steps 200 \
    --output "$KEEP/kl_curves.json"
for name in $WANTED; do
    [[ "$KNOWN " == *" $name "* ]] || { echo "$name is no part; there are$KNOWN"; exit 2; }
done
cat "$KEEP/summary.txt"
[ -z "$FAILED" ] || { echo "not done:$FAILED"; exit 1; }
