"""Show that a refactoring changes no result: the same seeds give the same weights and the same 5CAT figures.

    python tests/same_results.py record before.json    # in the checkout before the change
    python tests/same_results.py record after.json     # in the checkout after it, on the same machine
    python tests/same_results.py compare before.json after.json

`record` trains in a temporary folder, on one thread, and notes for each run the sha256 of best.safetensors and of its
tensors, the table of epochs without its times, and every figure of fivecat.json. RESUMED runs are
interrupted after one epoch and resumed. `--quick` leaves out the runs of full length; `--only NAME …` records these
alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

NAMES = "p6 v1 v21 v22 v23_confident rank two_heads committee margin share pi bounded energy"
FAST = {name: {"version": name, "fast": True} for name in NAMES.split()}
FAST |= {f"v22-{model}": {"version": "v22", "model": model, "fast": True} for model in ("gru", "lstm", "amn")}
FAST |= {"v22-float32": {"version": "v22", "precision": "float32", "fast": True}}
FULL = {
    "v22-amn, full": {"version": "v22", "model": "amn"},
    "two_heads, full": {"version": "two_heads"},
    "rank, full": {"version": "rank"},
}
RESUMED = {f"{name}, resumed": FAST[name] for name in ("v22", "pi", "energy", "committee")}


def record(settings: dict, out: Path, resume: bool) -> dict:
    """The digests and figures of one run. The version's name comes first, so that both checkouts read it alike."""
    import lvmlib as lvm

    settings = dict(settings)
    version = lvm.version(settings.pop("version"), **settings)
    data = lvm.dataset(version.data, version.horizon, version.context_length, version.fast, version.direction)
    run = lvm.train(version, data, out / "run")
    if resume:
        next(iter(run))
        run = lvm.train(version, data, out / "run")
    for _ in run:
        pass
    lvm.fivecat(run.best, data, lvm.baselines(data.train)).to_json(out / "fivecat.json")
    history = run.history.drop(columns="seconds").dropna(axis=1, how="all").sort_index(axis=1)
    best = out / "run" / "best.safetensors"
    return {
        "file": hashlib.sha256(best.read_bytes()).hexdigest(),
        "tensors": tensors(best),
        "epochs": json.loads(history.to_json(double_precision=15)),
        "fivecat": json.loads((out / "fivecat.json").read_text(encoding="utf-8")),
    }


def tensors(path: Path) -> str:
    """One sha256 over the names and values of all tensors: the file's header also names the run, and may change."""
    import safetensors.torch

    found = safetensors.torch.load_file(path)
    data = b"".join(name.encode() + found[name].numpy().tobytes() for name in sorted(found))
    return hashlib.sha256(data).hexdigest()


def differences(before, after, where: str = "") -> list[str]:
    """Where two recorded values differ; a key that only one side has is a difference, too."""
    if isinstance(before, dict) and isinstance(after, dict):
        both = sorted({*before, *after})
        return [d for k in both for d in differences(before.get(k, "absent"), after.get(k, "absent"), f"{where}/{k}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, pair in enumerate(zip(before, after, strict=True)) for d in differences(*pair, f"{where}/{i}")]
    return [] if before == after else [f"{where}: {str(before)[:80]} before, {str(after)[:80]} after"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--quick", action="store_true", help="leave out the runs of full length")
    parser.add_argument("--only", nargs="+", help="record these runs alone")
    given = parser.parse_args()
    if given.action == "compare":
        before, after = (json.loads(path.read_text(encoding="utf-8")) for path in given.files)
        found = {name: differences(before[name], after[name]) for name in sorted({*before} & {*after})}
        for name, each in found.items():
            print(f"{name}: " + (f"{len(each)} differences, first {each[0]}" if each else "the same"))
        failed = sum(map(bool, found.values()))
        print(f"{failed} of {len(found)} differ; in one file alone: {sorted({*before} ^ {*after})}")
        return failed > 0

    import torch

    torch.set_num_threads(1)
    runs = FAST | RESUMED | ({} if given.quick else FULL)
    found = {}
    for name, settings in runs.items():
        if given.only and name not in given.only:
            continue
        with tempfile.TemporaryDirectory() as out:
            found[name] = record(settings, Path(out), name in RESUMED)
        print(f"{name}: {found[name]['tensors'][:16]}", flush=True)
        given.files[0].write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
