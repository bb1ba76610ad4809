#!/usr/bin/env bash
# All that is committed under outputs/showcase/, from nothing; called by `make showcase`. The runs have a folder of their
# own, named by the code that trains them: stopped, this goes on; after a change of that code all is trained anew.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python shown=outputs/showcase
LVM_OUTPUTS=outputs/runs-$("$python" -c "from lvmlib import fingerprint; print(fingerprint.training())")
export LVM_OUTPUTS

train() { "$python" -m lvmlib train "$@"; }
render() { "$python" -m lvmlib render "notebooks/$1.ipynb" "$shown/$2.ipynb" "${@:3}"; }
show() { cp "$LVM_OUTPUTS/wikipedia/$1/train.ipynb" "$shown/$2.ipynb"; }

for version in p6 v1 v2 v21 v22; do
    for seed in 0 1 2; do train -p version $version -p seed $seed; done
    show $version/seed2 train-$version
    for seed in 0 1 2; do train -p version $version -p model amn -p seed $seed; done
done
for model in gru lstm; do train -p version v22 -p model $model; done
for model in gru lstm amn; do show v22/seed0-$model train-v22-$model; done
for seed in 1 2; do train -p version v22 -p model lstm -p seed $seed; done
for seed in 0 1 2; do
    train -p version v22 -p model lstm -p precision float32 -p seed $seed -p run_name seed$seed-lstm-float32
done
for version in p6 v22; do
    for seed in 0 1; do
        train -p version $version -p precision float32 -p seed $seed -p run_name seed$seed-transformer-float32
    done
done

# Read backward, for the arrow of time.
for seed in 0 1 2; do
    for version in p6 v22; do train -p version $version -p seed $seed -p direction backward; done
    for version in p6 v1 v2 v21 v22; do train -p version $version -p model amn -p seed $seed -p direction backward; done
done

render encode encode -p benchmark True
render data data
render diagnostics diagnostics-v22 -p version v22 -p seed 2
render compare compare -p versions "p6 v1 v2 v21 v22"
render compare compare-amn -p model amn -p versions "p6 v1 v2 v21 v22"
render compare compare-ours -p train True -p model amn -p versions "p6 v22 margin bounded rank two_heads energy"
render fivecat fivecat-v22 -p version v22 -p seed 2
render fivecat fivecat-v22-amn -p version v22 -p model amn
render explore explore -p version v22 -p seed 2
render inference inference -p version v22 -p seed 2
render benchmark benchmark
render controls controls -p datasets 400 -p repetitions 200
"$python" -m lvmlib table
cp "$LVM_OUTPUTS"/showcase/versions.* "$shown"
