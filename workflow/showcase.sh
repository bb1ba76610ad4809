#!/usr/bin/env bash
# All that is committed under outputs/showcase/, from nothing; called by `make showcase`. The runs have a folder of their
# own, named by the code, versions and data that they are of: stopped, this goes on; after a change there all is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
unset LVM_FAST OMP_NUM_THREADS
python=.venv/bin/python shown=outputs/showcase
versions="p6 v1 v2 v21 v22" ours="share pi margin bounded rank two_heads committee energy"
root=$("$python" -c 'from lvmlib.io.paths import ROOT; print(ROOT)')
code="lvmlib params :(exclude)lvmlib/share :(exclude)lvmlib/cli :(exclude)lvmlib/io :(exclude)lvmlib/report"
key() { { git -C "$root" ls-files -s -- "$@"; git -C "$root" diff HEAD -- "$@"; true; } 2>&1 | sha256sum | cut -c1-12; }
runs=$(key $code) pages=$(key $code notebooks)
export LVM_OUTPUTS=outputs/runs-$runs
export DONE=$LVM_OUTPUTS/done-$pages # a file for each command that ended well, by this state of all notebooks and rooms
mkdir -p "$DONE"

# As many at a time as there are cores, but eight: each has a GPU's memory or some gigabytes to share with the others.
cores=$("$python" -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
jobs=${JOBS:-$((cores < 8 ? cores : 8))}
threads=$((cores > jobs ? cores / jobs : 1))
# Terminated, all that was started ends, too. A shell that waits by `wait` hears of it at once, in a pipe only at its end.
trap 'trap - TERM; kill 0' TERM
# Lines on stdin, each the arguments of a `python -m lvmlib`; where one fails the others still run to their end.
each() {
    xargs -P "$1" -L 1 sh -c 'done=$DONE/$(printf %s "$*" | tr -c "A-Za-z0-9.-" _)
        if [ -e "$done" ] && { [ "$1" != render ] || [ -e "$3" ]; }; then exit 0; fi
        "$0" -m lvmlib "$@" && : >"$done" || { echo "FAILED: $*" >&2; exit 1; }' "$python" <&0 & wait $!
}
together() { OMP_NUM_THREADS=$threads each "$jobs"; }
alone() { each 1; }
family() { # MODEL, OPTIONS: every version of the family with three seeds
    for version in $versions; do
        for seed in 0 1 2; do echo train -p version $version -p model "$1" -p seed $seed "${@:2}"; done
    done
}
page() { echo render "notebooks/$1.ipynb" "$shown/$2.ipynb" "${@:3}"; }
put() { cp "$1" "$2.partial" && mv "$2.partial" "$2"; }
show() { put "$LVM_OUTPUTS/wikipedia/$1/train.ipynb" "$shown/$2.ipynb"; }

together < <(family amn && family amn -p direction backward) # compare-ours needs them

together < <( # the longest first
    page controls controls -p datasets 400 -p repetitions 200
    page compare compare-ours -p train True -p model amn -p versions "'p6 v22 $ours'"
    for seed in 0 1; do
        for version in p6 v22; do
            echo train -p version $version -p precision float32 -p seed $seed -p run_name seed$seed-transformer-float32
        done
    done
    family transformer
    for version in p6 v22; do
        for seed in 0 1 2; do echo train -p version $version -p seed $seed -p direction backward; done
    done
    for seed in 0 1 2; do
        echo train -p version v22 -p model lstm -p seed $seed
        echo train -p version v22 -p model lstm -p precision float32 -p seed $seed -p run_name seed$seed-lstm-float32
    done
    echo train -p version v22 -p model gru
    page data data
)

for version in $versions; do show $version/seed2 train-$version; done
for model in gru lstm amn; do show v22/seed0-$model train-v22-$model; done
together < <(
    page compare compare -p versions "'$versions'"
    page explore explore -p version v22 -p seed 2
    page fivecat fivecat-v22-amn -p version v22 -p model amn
    page compare compare-amn -p model amn -p versions "'$versions'"
    page fivecat fivecat-v22 -p version v22 -p seed 2
    page diagnostics diagnostics-v22 -p version v22 -p seed 2
    page fivecat fivecat-energy -p version energy
)

alone < <( # these measure times: one after the other, with all cores
    page encode encode -p benchmark True
    page inference inference -p version v22 -p seed 2
    page benchmark benchmark
)
"$python" -m lvmlib table
for kind in csv png; do put "$LVM_OUTPUTS/showcase/versions.$kind" "$shown/versions.$kind"; done
