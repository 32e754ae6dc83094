#!/usr/bin/env bash
# Stages of the reference study one after another on all GPUs of this host, each ended after so many seconds:
#   benchmarks/study.sh OUT DATA TOKENIZER BASE STAGE[@DATA]=SECONDS...
#   benchmarks/study.sh study corpus.parquet gpt2-tokenizer study-base repeatability=70 front=130 members=110
#   benchmarks/study.sh study corpus.parquet gpt2-tokenizer study-base long@mixed.parquet=300
#   CUDA_VISIBLE_DEVICES=1 benchmarks/study.sh ... front-cv2=300   # a third of the front, on one board
# The first stage measures the anchor workload on its boards, so that stages of different boards compare.
# Sweeps of one OUT may run side by side. A stage that was begun goes on. STAGE@DATA has text of its own, as `long` must. The space of stage members is written
# first, from the front's results under OUT.
set -uo pipefail
out=$1 data=$2 tokenizer=$3 base=$4 failed=0 anchor=(--anchor)
shift 4
for stage in "$@"; do
    name=${stage%=*} hours=$(awk "BEGIN { print ${stage##*=} / 3600 }") text=$data
    [ "$name" = "${name#*@}" ] || text=${name#*@}
    name=${name%%@*}
    space=tune_spaces/study/${name%%-*}.yaml more=()
    [ "$name" = "${name#front-}" ] || more=(--set "regularizer=${name#front-}")
    if [ "$name" = members ]; then
        space=$out/members.yaml
        [ -e "$space" ] || python -m benchmarks.study_members "$out" --out "$space" || { failed=1; continue; }
    fi
    joulemoe sweep "$space" --out "$out" --sweep-id "$name" --base "$base" --tokenizer "$tokenizer" --data "$text" \
        --max-hours "$hours" ${anchor[@]+"${anchor[@]}"} ${more[@]+"${more[@]}"} || { echo "study: stage $name ended with $?" >&2; failed=1; }
    anchor=()
done
exit $failed
