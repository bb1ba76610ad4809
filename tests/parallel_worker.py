"""What the processes of test_parallel.py run: `torchrun … -m parallel_worker FOLDER`.

With `--together`: all that two processes are compared with one in, in one start. Else the run in FOLDER is trained as
by `lvmlib.runs.worker`, and the second process fails in the middle of the second epoch.
"""

import os
import sys
from pathlib import Path

from toys import make_data, version

import lvmlib as lvm
from lvmlib import losses, models, windows
from lvmlib.config import merge
from lvmlib.runs import checkpoint, team, worker
from lvmlib.runs import folder as runs

BATCH = 13  # uneven shares; of the last batch, one window, the second process has no share
BFLOAT16 = {"v2"}
CASES = {  # the version's name: model, epochs, overrides
    "p6": ("amn", 2, {}),
    "v1": ("transformer", 1, {"optimizer": {"lr": 0.0005}}),
    "v2": ("lstm", 1, {"optimizer": {"lr": 0.0005}}),
    "v22": ("amn", 3, {}),
    "v21": ("bilinear", 2, {}),
    "share": ("amn", 2, {}),
    "pi": ("bilinear", 2, {"control": {"measure": "gradient"}}),
    "rank": ("amn", 2, {"losses": {"listwise": {"elsewhere": 7, "candidates": 5}}}),
    "margin": ("two_heads", 2, {}),
    "committee": ("committee", 2, {}),
    "energy": ("sampler", 2, {}),
    "v23_unguarded": ("amn", 5, {"rewind": {"fall": 0.001, "escape": 1.0, "cool": 0.5, "most": 1}}),
}


def case(name, **top):
    model, epochs, overrides = CASES[name]
    overrides = merge({"optimizer": {"lr": 0.005}}, overrides)
    settings = {"model": model, "epochs": epochs, "batch_size": BATCH, "log_every": 1}
    settings["precision"] = "bfloat16" if name in BFLOAT16 else "float32"
    return version(name, **settings | top, overrides=overrides)


def data():
    """53 training windows: four batches of 13, and one of 1."""
    made = make_data()
    return windows.Dataset(made.store, made.train.at_most(4 * BATCH + 1), made.val, made.ood)


def without_chance(put=setattr):
    """Dropout and the samples' noise, taken out: what is left is the same in any number of processes."""
    build = models.build

    def built(*arguments):
        model = build(*arguments).eval()
        model.train = lambda mode=True: model  # it stays in eval mode
        return model

    put(models, "build", built)
    put(models.Sampler, "samples", lambda self, context, count, _=None: self.drawn(context, self.table[:count, None]))


def refused(path, _):
    raise AssertionError(f"another than the first process writes {path}")


def together(folder: Path) -> None:
    own = team.join("cpu")
    if not own.first:
        checkpoint.write_atomic = runs.write_atomic = refused
    whole = case("v22", data=str(folder / "store"))
    list(lvm.train(whole, lvm.dataset(whole.data), folder / "whole", team=own))
    without_chance()
    for name in CASES:
        list(lvm.train(case(name), data(), folder / name, team=own))
    own.leave()


def failing(arguments: list[str]) -> int:
    real, calls = losses.health, 0

    def health(*given):
        nonlocal calls
        calls += 1
        if calls == 10 and os.environ["RANK"] == "1":  # seven steps an epoch
            raise lvm.LVMError("the second process's own trouble")
        return real(*given)

    losses.health = health
    return worker.main(arguments)


if __name__ == "__main__":
    if sys.argv[2:] == ["--together"]:
        together(Path(sys.argv[1]))
    else:
        sys.exit(failing(sys.argv[1:]))
