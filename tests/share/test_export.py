"""An exported model: it comes back bit for bit, damaged and hostile folders are refused, the hub is a fake."""

import dataclasses
import inspect
import json
import os
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from toys import DIM, finish, make_data, same, version

import lvmlib as lvm
from lvmlib import models
from lvmlib.errors import LVMError
from lvmlib.share import card
from lvmlib.share.export import CARD, CONFIG, FILES, WEIGHTS, Config, push

export_module = inspect.getmodule(push)  # `lvmlib.export` is the function


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    store = make_data().store
    store.datasheet["encoder"] = "a test's encoder."
    return finish(lvm.train(version(epochs=2), lvm.dataset(store), tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def report(run):
    return lvm.fivecat(run.best, run.data)


@pytest.fixture(scope="module")
def exported(run, report, tmp_path_factory):
    return lvm.export(run, tmp_path_factory.mktemp("exported") / "model", report)


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


@pytest.fixture
def copied(run, tmp_path):
    """The run, reopened in a copy of its folder, which may be changed."""
    return lvm.train(run.version, run.data, shutil.copytree(run.folder, tmp_path / "run"))


def config(**changed):
    known = {"model": "amn", "dim": DIM, "context_length": 5, "horizon": 2, "direction": "forward", "seed": 0}
    known |= {"dataset": "toy", "fingerprint": "0", "encoder": "", "version": "v22", "precision": "float32"}
    return Config(**known | {"lvmlib": "0"} | changed)


def write_untrained(name, folder, dim=DIM, length=5):
    """An exported folder of an untrained architecture."""
    torch.manual_seed(0)
    model = models.build(name, dim, length).eval()
    folder.mkdir()
    safetensors.torch.save_file({k: t.contiguous() for k, t in model.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(config(model=name, dim=dim, context_length=length).model_dump_json())
    return model


# Export and load


def test_a_run_comes_back_bit_for_bit(run, exported, report):
    model = lvm.load(exported, device="cpu")
    assert sorted(p.name for p in exported.iterdir()) == sorted(FILES)
    assert not model.training and type(model) is models.AMN
    assert same(model.state_dict(), run.best.state_dict())
    wanted = config(fingerprint=run.data.store.fingerprint, encoder="a test's encoder.", lvmlib=model.config.lvmlib)
    assert model.config == wanted
    pd.testing.assert_frame_equal(lvm.fivecat(model, run.data).table, report.table)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_architecture_comes_back(name, tmp_path):
    model = write_untrained(name, tmp_path / "model")
    again = lvm.load(tmp_path / "model", device="cpu")
    x = F.normalize(torch.randn(7, model.context_length, model.dim), dim=-1)
    assert all(torch.equal(a, b) for a, b in zip(model.heads(x), again.heads(x), strict=True))


def test_export_uses_the_report_of_the_folder(copied, exported, report, tmp_path):
    assert "not judged" in (lvm.export(copied, tmp_path / "bare") / CARD).read_text()
    reading, verdict = lvm.reading(report), lvm.verdict(copied.version, copied.history, report)
    words = {"verdict": verdict.to_dict(), "reading": {"text": reading.text}}
    report.to_json(copied.folder / "fivecat.json", **words)
    card = (lvm.export(copied, tmp_path / "judged") / CARD).read_text()
    assert card == (exported / CARD).read_text() and reading.text in card


def test_other_reports_are_refused(copied, report, tmp_path):
    for other in (report.original, dataclasses.replace(report, horizon=3)):
        with pytest.raises(LVMError, match="report"):
            lvm.export(copied, tmp_path / "out", other)
    path = copied.folder / "fivecat.json"
    report.to_json(path, reading={"text": "r"}, verdict={"text": "v"})
    content = json.loads(path.read_text())
    rows = [row for row in content["calibrated"]["table"] if row["measure"] != "cosine at the target"]
    without_figure = {"calibrated": content["calibrated"] | {"table": rows}}
    for change in ({"instrument": 1}, {"instrument": None}, without_figure, {"calibrated": None}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(LVMError, match=r"fivecat\.json"):
            lvm.export(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["owner/of it", "My corpus\tv1", "...", "x" * 600])
def test_datasets_of_any_name_are_exported(name, copied, tmp_path):
    store = dataclasses.replace(copied.data.store, name=name)
    copied.data = dataclasses.replace(copied.data, store=store)
    exported = lvm.load(lvm.export(copied, tmp_path / "model"), "cpu").config.dataset
    assert exported == {"owner/of it": "owner-of it", "...": "dataset"}.get(name, " ".join(name[:500].split()))


# Whole or not at all


def test_what_cannot_be_exported_leaves_no_folder(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_open", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lvm.export(copied, tmp_path / "out")
    path = copied.folder / "best.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        origin, bias = file.metadata(), file.get_tensor("query.bias").clone()
    safetensors.torch.save_file({"query.bias": bias}, path, origin)
    with pytest.raises(LVMError, match=r"best\.safetensors"):
        lvm.export(copied, tmp_path / "out")
    with pytest.raises(LVMError, match="is not a run"):
        lvm.export(copied.folder, tmp_path / "out")
    with pytest.raises(LVMError, match="not finished"):
        lvm.export(lvm.train(version(epochs=2), copied.data, tmp_path / "new"), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# The card


def test_the_card_holds_the_numbers_of_the_report(exported, report):
    text = (exported / CARD).read_text(encoding="utf-8")
    for split in ("val", "ood"):
        part = text[text.index(f"**{split}** (") :]
        lines = [[c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")]
        lines = lines[2 : 2 + len(card.SHOWN)]
        assert [(line[0], line[1]) for line in lines] == list(card.SHOWN)
        for gate, measure, *cells, chance in lines:
            for cell, predictor in zip(cells, card.PREDICTORS, strict=True):
                row = report.row(measure, split, predictor, gate)
                wanted = [row["value"]] + ([] if np.isnan(row["low"]) else [row["low"], row["high"]])
                assert [float(n) for n in re.findall(r"-?\d+\.\d+", cell)] == pytest.approx(wanted, abs=5.001e-4)
            wanted = report.row(measure, split, "model", gate)["chance"]
            assert chance == ("–" if np.isnan(wanted) else f"{wanted:.3f}")
        assert ", ".join(f"{g} {o}" for g, o in report.gates(split).items()) in text
    assert lvm.reading(report).text in text and "a test's encoder." in text
    assert "(B, 5, 24)" in text and "chunk 2 after" in text


def test_the_hub_reads_the_head_of_the_card(exported, report):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(exported / CARD).data
    assert data.library_name == "lvmlib" and data.model_name == "v22, amn, seed 0" and "v22" in data.tags
    found = {(r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    wanted = {(split, name): report.value(name, split) for split in ("val", "ood") for _, name in card.METRICS}
    assert found == pytest.approx(wanted, abs=1e-4)


def test_the_snippet_of_the_card_runs(exported, monkeypatch):
    monkeypatch.chdir(exported)
    (snippet,) = re.findall(r"```python\n(.*?)```", (exported / CARD).read_text(), re.DOTALL)
    names = {}
    exec(compile(snippet, CARD, "exec"), names)
    assert names["unit"].shape == (1, DIM)


def test_the_card_names_smoke_runs_and_backward_models():
    text = card.card(config(model="two_heads", direction="backward"), {"train": 9}, None, fast=True)
    assert all(words in text for words in ("smoke run", "chunk 2 before", "reversed", "heads(context)[2]", "(9 train"))


# Damaged or hostile


def put(**changed):
    return lambda f: (f / CONFIG).write_text(json.dumps(json.loads((f / CONFIG).read_text()) | changed))


def text(content):
    return lambda folder: (folder / CONFIG).write_text(content)


def tensors(change):
    def write(folder):
        content = {k: t.clone() for k, t in safetensors.torch.load_file(folder / WEIGHTS).items()}
        safetensors.torch.save_file(change(content), folder / WEIGHTS)

    return write


def header(**changed):
    """The safetensors file with another header entry before the same numbers."""

    def write(folder):
        content = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        head = json.loads(content[8 : 8 + size])
        head["key.bias"] |= changed
        raw = json.dumps(head).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])

    return write


def cut(keep):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


def replace(name, make):
    """The file `name`, moved out of the folder, and what `make(path, outside)` puts in its place."""

    def write(folder):
        (folder / name).rename(folder.parent / "outside")
        make(folder / name, folder.parent / "outside")

    return write


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


DAMAGE = {  # what is done to the folder, and what the error must name
    "no config": (replace(CONFIG, lambda path, _: None), CONFIG),
    "no weights": (replace(WEIGHTS, lambda path, _: None), WEIGHTS),
    "not json": (text("{"), CONFIG),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), CONFIG),
    "nested deeply": (text("[" * 60_000), CONFIG),
    "a large config": (text(" " * 10**6 + "{}"), "larger than"),
    "a list": (text("[]"), CONFIG),
    "a key too few": (text('{"model": "amn"}'), "dim"),
    "another dim": (put(dim=25), "implies"),
    "another model": (put(model="gru"), WEIGHTS),
    "a tensor too few": (tensors(lambda t: {k: x for k, x in t.items() if k != "query.bias"}), "query.bias"),
    "a tensor too many": (tensors(lambda t: {**t, "x": torch.ones(1)}), "x is"),
    "another shape": (tensors(lambda t: {**t, "query.bias": torch.ones(3)}), r"query.bias is \(3,\)"),
    "another type": (tensors(lambda t: {k: x.half() for k, x in t.items()}), "F16"),
    "nan": (tensors(lambda t: {**t, "key.bias": t["key.bias"] * torch.nan}), "key.bias holds NaN"),
    "infinite": (tensors(lambda t: {**t, "key.bias": t["key.bias"] + torch.inf}), "key.bias holds NaN"),
    "an empty file": (cut(0), WEIGHTS),
    "half a head": (cut(100), WEIGHTS),
    "cut off": (cut(-1000), WEIGHTS),
    "a head that claims more": (header(shape=[2**40]), WEIGHTS),
    "offsets outside": (header(data_offsets=[2**40, 2**40 + 1024]), WEIGHTS),
    "a pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps(Harmful())), WEIGHTS),
    "torch's own": (lambda f: torch.save({"a": Harmful()}, f / WEIGHTS), WEIGHTS),
    "config by a link": (replace(CONFIG, Path.symlink_to), "link out of the folder"),
    "weights by a link": (replace(WEIGHTS, Path.symlink_to), "link out of the folder"),
    "a link to nowhere": (replace(CONFIG, lambda path, _: path.symlink_to("gone")), CONFIG),
    "a link to itself": (replace(CONFIG, lambda path, _: path.symlink_to(CONFIG)), CONFIG),
    "a pipe": (replace(WEIGHTS, lambda path, _: os.mkfifo(path)), "not a plain file"),
    "a folder": (replace(WEIGHTS, lambda path, _: path.mkdir()), "not a plain file"),
}


VALUES = {  # of a key of config.json, which the error must name
    "dim": ["24", 24.0, 0, 10**12, 10**4000],
    "context_length": [10**9],
    "horizon": [True, -2],
    "seed": [None],
    "model": ["mamba", "../../etc/passwd", "os.system"],
    "direction": ["up"],
    "precision": ["int4"],
    "version": ["../../x", ".ssh"],
    "dataset": ["..\\x", "", "<script>"],
    "encoder": ["a\nb", "a" * 600],
    "auto_map": ["x.py"],
}
for key, values in VALUES.items():
    DAMAGE |= {f"{key}, {i}": (put(**{key: value}), key) for i, value in enumerate(values)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_ends_in_one_error(damage, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    change, words = DAMAGE[damage]
    change(folder)
    with pytest.raises(LVMError, match=words) as error:
        lvm.load(folder, device="cpu")
    assert str(error.value).startswith(str(folder)) and len(str(error.value)) < 700 and "\n" not in str(error.value)
    assert not (folder.parent / "harm").exists()  # no pickle was run


def test_absurd_sizes_take_no_memory(tmp_path):
    """config.json may imply a matrix of 17 GB that the weights do not hold: refused before it is made."""
    write_untrained("bilinear", tmp_path / "model", dim=8)
    put(dim=65_536)(tmp_path / "model")
    with pytest.raises(LVMError, match="implies"):
        lvm.load(tmp_path / "model", device="cpu")


def test_links_within_the_folder_are_followed(folder):
    (folder / WEIGHTS).rename(folder / "inside")
    (folder / WEIGHTS).symlink_to("inside")
    assert lvm.load(folder, device="cpu").dim == DIM


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(LVMError, match="gone"):
        lvm.load(tmp_path / "gone")
    with pytest.raises(LVMError, match="hub:someone/model"):
        lvm.load("someone/model")
    with pytest.raises(LVMError, match="cuda:99"):
        lvm.load(tmp_path, device="cuda:99")


# The hub, by a fake with the client's own signatures


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Keeps what is uploaded, and gives it back as the client's cache does: links into a folder of blobs."""
    real = pytest.importorskip("huggingface_hub")
    files, cache, chosen = {}, tmp_path / "cache" / "models--someone--model", real.utils.filter_repo_objects

    def create_repo(repo_id, *, private, exist_ok):
        assert private is True and exist_ok is True
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(*, folder_path, allow_patterns, **_):
        names = chosen(os.listdir(folder_path), allow_patterns=allow_patterns)
        files.update({name: (folder_path / name).read_bytes() for name in names})
        return SimpleNamespace(commit_url="https://hub.test/commit/1")

    def snapshot_download(_, *, revision, allow_patterns):
        snapshot, blobs = cache / "snapshots" / (revision or "main"), cache / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for name in chosen(files, allow_patterns=allow_patterns):
            (blobs / name).write_bytes(files[name])
            (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", name))
        return str(snapshot)

    fake = SimpleNamespace(files=files, snapshots=cache / "snapshots")
    api = real.HfApi()
    for name, spec, function in (  # TypeError for an argument that the client does not have
        ("create_repo", api.create_repo, create_repo),
        ("upload_folder", api.upload_folder, upload_folder),
        ("snapshot_download", real.snapshot_download, snapshot_download),
    ):
        setattr(fake, name, create_autospec(spec, side_effect=function))
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda token=None: fake)
    monkeypatch.setattr(real, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_pushed_model_loads_from_the_hub(hub, folder):
    (folder / "private.txt").write_text("stays at home")
    assert push(folder, "someone/model") == "https://hub.test/commit/1"
    assert hub.files == {name: (folder / name).read_bytes() for name in FILES}
    hub.files.update({"code.py": b"", "pytorch_model.bin": b""})
    model, wanted = lvm.load("hub:someone/model", device="cpu", revision="v1"), lvm.load(folder, device="cpu")
    assert model.config == wanted.config and same(model.state_dict(), wanted.state_dict())
    assert sorted(p.name for p in (hub.snapshots / "v1").iterdir()) == sorted(FILES)


def test_the_mixin_offers_both_ways(hub, folder, tmp_path):
    model = export_module._hub_model()(folder)
    model.save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == set(FILES)
    assert all((tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes() for name in FILES)
    model.push_to_hub("someone/model", private=True)
    assert same(type(model).from_pretrained("someone/model").predictor.state_dict(), model.predictor.state_dict())


def test_a_link_out_of_the_cache_is_refused(hub, folder):
    push(folder, "someone/model")
    lvm.load("hub:someone/model", device="cpu")
    (hub.snapshots / "main" / CONFIG).unlink()
    (hub.snapshots / "main" / CONFIG).symlink_to(folder / CONFIG)
    hub.snapshot_download.side_effect = lambda *_, **__: str(hub.snapshots / "main")
    with pytest.raises(LVMError, match="link out of the folder"):
        lvm.load("hub:someone/model", device="cpu")


def attempts(folder, name="someone/model"):
    return lambda: lvm.load(f"hub:{name}", device="cpu"), lambda: push(folder, name)


@pytest.mark.parametrize("name", ["model", "a/b/c", "../x", "a/..", "a/.git", "a b/c", "", "a/b@main", "https://x/y"])
def test_bad_names_never_reach_the_client(hub, folder, name):
    for attempt in attempts(folder, name):
        with pytest.raises(LVMError, match="hub:OWNER/NAME"):
            attempt()
    assert not any(f.called for f in (hub.create_repo, hub.upload_folder, hub.snapshot_download))


def test_what_load_refuses_is_not_pushed(hub, folder, tmp_path):
    (folder / CARD).rename(tmp_path / "secret")
    (folder / CARD).symlink_to(tmp_path / "secret")
    with pytest.raises(LVMError, match=CARD):
        push(folder, "someone/model")
    cut(100)(folder)
    with pytest.raises(LVMError, match=WEIGHTS):
        push(folder, "someone/model")
    assert not hub.upload_folder.called


def test_errors_of_the_hub_are_reported(hub, folder):
    hub.snapshot_download.side_effect = hub.upload_folder.side_effect = ConnectionError("no route to host")
    for attempt in attempts(folder):
        with pytest.raises(LVMError, match=r"hub:someone/model.*no route to host"):
            attempt()


def test_without_the_extra_only_the_hub_is_missing(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for attempt in attempts(folder):
        with pytest.raises(LVMError, match=r"\.\[export\]"):
            attempt()
    assert lvm.load(lvm.export(run, tmp_path / "out"), device="cpu").dim == DIM
