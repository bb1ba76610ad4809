#!/usr/bin/env bash
# All that is committed under outputs/showcase/, from nothing; called by `make showcase`. The runs have a folder of their
# own, named by the code that trains them: stopped, this goes on; after a change of that code all is trained anew.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python shown=outputs/showcase
LVM_OUTPUTS=outputs/runs-$("$python" -c "from lvmlib import fingerprint; print(fingerprint.training())")
export LVM_OUTPUTS

# As many at a time as there are cores, but eight: each has a GPU's memory or some gigabytes to share with the others.
cores=$(getconf _NPROCESSORS_ONLN)
jobs=${JOBS:-$((cores < 8 ? cores : 8))}
threads=$((cores > jobs ? cores / jobs : 1))
# Lines on stdin, each the arguments of a `python -m lvmlib`; where one fails the others still run to their end.
together() { OMP_NUM_THREADS=$threads xargs -P "$jobs" -L 1 "$python" -m lvmlib; }
family() { # MODEL, OPTIONS: every version of the family with three seeds
    for version in p6 v1 v2 v21 v22; do
        for seed in 0 1 2; do echo train -p version $version -p model "$1" -p seed $seed "${@:2}"; done
    done
}
page() { echo render "notebooks/$1.ipynb" "$shown/$2.ipynb" "${@:3}"; }
show() { cp "$LVM_OUTPUTS/wikipedia/$1/train.ipynb" "$shown/$2.ipynb"; }

{ family amn && family amn -p direction backward; } | together # compare-ours needs them

{ # the longest first
    page controls controls -p datasets 400 -p repetitions 200
    page compare compare-ours -p train True -p model amn -p versions '"p6 v22 margin bounded rank two_heads energy"'
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
} | together

for version in p6 v1 v2 v21 v22; do show $version/seed2 train-$version; done
for model in gru lstm amn; do show v22/seed0-$model train-v22-$model; done
{
    page compare compare -p versions '"p6 v1 v2 v21 v22"'
    page explore explore -p version v22 -p seed 2
    page fivecat fivecat-v22-amn -p version v22 -p model amn
    page compare compare-amn -p model amn -p versions '"p6 v1 v2 v21 v22"'
    page fivecat fivecat-v22 -p version v22 -p seed 2
    page diagnostics diagnostics-v22 -p version v22 -p seed 2
} | together

# These measure times: one after the other, with all cores.
jobs=1 threads=$cores
{
    page encode encode -p benchmark True
    page inference inference -p version v22 -p seed 2
    page benchmark benchmark
} | together
"$python" -m lvmlib table
cp "$LVM_OUTPUTS"/showcase/versions.* "$shown"
