#!/bin/bash
# All of docs/study.md, and the plots of decoding, on one GPU in pieces: call it again until it says "all done".
#
#   QWEN=qwen2.5-coder-0.5b.gguf DATA=/data bash benchmarks/study.sh
#
# DATA has train-*.parquet and validation.parquet, text of any kind; QWEN is the second teacher as settings take it. MINUTES
# of one call, KEEP for what a later call needs (aligned mixers, compiled programs, what is done). The records in docs/study
# say what is measured already, and it is not measured again.
set -u
cd "$(dirname "$0")/.."
DATA=${DATA:?a folder of text} QWEN=${QWEN:?the second teacher} SMOL=${SMOL:-demo:smollm2-135m}
MINUTES=${MINUTES:-9} KEEP=${KEEP:-runs/study}
BEGAN=$(date +%s)
mkdir -p "$KEEP"
export JAX_COMPILATION_CACHE_DIR=$KEEP/compiled

left() { echo $((MINUTES - ($(date +%s) - BEGAN) / 60 - 2)); } # nothing is begun in the last two minutes

piece() { # NAME COMMAND...: until it says that it is through, which a file remembers
    [ -e "$KEEP/$1.done" ] && return
    [ "$(left)" -lt 1 ] && { echo "out of time before $1; call again"; exit 3; }
    local name=$1
    shift
    echo "=== $name"
    timeout $((60 * ($(left) + 2))) bash -c '"$@"' _ "$@" 2>&1 | tee "$KEEP/$name.log"
    local code=${PIPESTATUS[0]}
    if grep -q "out of time; call again" "$KEEP/$name.log" || [ "$code" = 124 ]; then
        echo "call again"
        exit 3
    fi
    touch "$KEEP/$name.done" # also when single methods failed: the log names them
    [ "$code" = 0 ] || echo "!!! $name ended with $code"
}

rows() { # CONFIG FILE, then what the teacher is and which prompts are made
    python benchmarks/study_rows.py "configs/$1.yaml" "$KEEP/$2" data.train="$DATA/train-*.parquet" \
        data.heldout="$DATA/validation.parquet" "${@:3}"
}
smol() {
    python benchmarks/selection_study.py configs/smollm2-135m.yaml teacher="$SMOL" --rows "$KEEP/smollm2-rows.npz" \
        --records docs/study/smollm2-135m.jsonl --mixers "$KEEP/smollm2.npz" --align-tokens 9_830_400 \
        --distill-tokens 2_097_152 --distill-batch 64 --minutes "$(left)" "$@"
}
mixers() {
    python benchmarks/mixer_study.py configs/smollm2-135m.yaml teacher="$SMOL" --rows "$KEEP/smollm2-rows.npz" \
        --records docs/study/smollm2-135m-mixers.jsonl --layers 0 1 8 17 18 20 23 24 --align-tokens 3_276_800 \
        --distill-tokens 2_097_152 --distill-batch 64 --seeds 1 --minutes "$(left)" "$@"
}
qwen() {
    python benchmarks/selection_study.py configs/qwen2.5-coder-0.5b.yaml teacher="$QWEN" score.batch_size=32 \
        --rows "$KEEP/qwen-rows.npz" --records docs/study/qwen2.5-coder-0.5b.jsonl --mixers "$KEEP/qwen.npz" \
        --kl-chunk 4096 --align-tokens 6_553_600 --distill-tokens 1_048_576 --distill-batch 64 --score-tokens 131_072 \
        --minutes "$(left)" "$@"
}
stability() {
    python benchmarks/ranking_stability.py configs/smollm2-135m.yaml teacher="$SMOL" --rows "$KEEP/smollm2-rows.npz" \
        --records docs/study/smollm2-135m-stability.jsonl --batch-size 4 --test-batches 48 --align-tokens 9_830_400 \
        --minutes "$(left)"
}
speed() { python benchmarks/decode_speed.py "$@" --output docs/decode_speed.json; }
export -f rows smol mixers qwen stability speed left
export KEEP SMOL QWEN DATA MINUTES BEGAN

MAIN=(greedy_kl kl_guided uniform perplexity random:seed=0)
piece smollm2-rows rows smollm2-135m smollm2-rows.npz teacher="$SMOL"
piece qwen-rows rows qwen2.5-coder-0.5b qwen-rows.npz teacher="$QWEN" --lengths 4096 8192 --long-prompts 32 \
    --needle-prompts 64
piece finetuned smol --main greedy_kl --others --random 0 --budgets 8 --seeds 1 --finetune-tokens 2_097_152
piece mixers mixers
piece qwen-main qwen --main uniform greedy_kl kl_guided greedy_kl:text=long perplexity:text=long --others --random 0 \
    --budgets 6 3 --seeds 2 --finetune-tokens 1_048_576
piece qwen-others qwen --main --others perplexity answer_likelihood removal single_kl associative_recall --random 2 \
    --budgets 6 3 --seeds 1
piece smollm2-8 smol --main "${MAIN[@]}" --random 6 --budgets 8 --seeds 3
piece smollm2-4 smol --main "${MAIN[@]}" --random 6 --budgets 8 4 --seeds 3
piece stability stability
piece longest speed longest --models teacher 0.125 0.25 0.5
for model in teacher 0.125 0.25 0.5; do piece "contexts-$model" speed contexts --models "$model"; done
piece plots speed plot --images docs/images
python benchmarks/study_tables.py docs/study/smollm2-135m.jsonl --mixers docs/study/smollm2-135m-mixers.jsonl \
    --plot docs/images/study-smollm2.png >"$KEEP/smollm2.md"
python benchmarks/study_tables.py docs/study/qwen2.5-coder-0.5b.jsonl --plot docs/images/study-qwen.png >"$KEEP/qwen.md"
echo "all done: the tables are $KEEP/smollm2.md and $KEEP/qwen.md"
