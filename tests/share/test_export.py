"""A model as a folder: that it comes back bit for bit, that damage is told, what a stranger may try, hub and ONNX."""

import dataclasses
import inspect
import json
import os
import pickle
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml

import lvmlib as lvm
from lvmlib import config as params
from lvmlib import models
from lvmlib.data import store as vectors
from lvmlib.errors import LVMError
from lvmlib.share.export import CARD, CONFIG, FILES, ONNX_TOLERANCE, WEIGHTS, card, push, to_onnx

room = inspect.getmodule(push)  # `lvmlib.export` itself is the function
DIM = 24


def make_data(articles=12, length=16):
    random = np.random.default_rng(0)
    x = random.standard_normal((articles, 1, DIM)) + 0.8 * random.standard_normal((articles, length, DIM))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    split = np.array(["train", "train", "train", "val", "ood"])[np.arange(articles) % 5]
    frame = pd.DataFrame({"title": [f"a{i}" for i in range(articles)], "split": split}, index=range(articles))
    ids, positions = np.repeat(np.arange(articles), length), np.tile(np.arange(length), articles)
    store = vectors.make_store(
        "toy", x.reshape(-1, DIM).astype(np.float32), ids, positions, frame, {"encoder": "a test's encoder."}
    )
    return lvm.dataset(store)


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    version = lvm.version("v22", model="amn", epochs=2, precision="float32", device="cpu")
    run = lvm.train(version, data, tmp_path_factory.mktemp("runs") / "run")
    list(run)
    return run


@pytest.fixture(scope="module")
def report(run, data):
    return lvm.fivecat(run.best, data)


@pytest.fixture(scope="module")
def exported(run, report, tmp_path_factory):
    return lvm.export(run, tmp_path_factory.mktemp("exported") / "model", report)


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def context(model, size=7, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(size, model.context_length, model.dim, generator=noise), dim=-1)


def made(name, where, dim=DIM):
    """An exported folder of an untrained architecture."""
    torch.manual_seed(0)
    model = models.build(name, dim).eval()
    where.mkdir()
    safetensors.torch.save_file({k: t.contiguous() for k, t in model.state_dict().items()}, where / WEIGHTS)
    config = room.Config(name, dim, 5, 2, "forward", "toy", "0", "", "v22", 0, "float32", "0")
    (where / CONFIG).write_text(json.dumps(dataclasses.asdict(config)))
    return model


# There and back


def test_a_run_comes_back_bit_for_bit(run, exported, data):
    model = lvm.load(exported, device="cpu")
    assert sorted(p.name for p in exported.iterdir()) == sorted(FILES)
    assert not model.training and type(model) is models.AMN
    weights, wanted = model.state_dict(), run.best.state_dict()
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[k], wanted[k]) for k in wanted)
    x = context(model)
    assert all(torch.equal(a, b) for a, b in zip(model(x), run.best(x), strict=True))
    c = model.config
    assert (c.model, c.dim, c.context_length, c.horizon, c.direction) == ("amn", DIM, 5, 2, "forward")
    assert (c.dataset, c.fingerprint, c.encoder) == ("toy", data.store.fingerprint, "a test's encoder.")
    assert (c.version, c.seed, c.precision) == ("v22", 0, "float32")


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_architecture_comes_back(name, tmp_path):
    model = made(name, tmp_path / "model")
    again = lvm.load(tmp_path / "model", device="cpu")
    x = context(model)
    assert all(torch.equal(a, b) for a, b in zip(model.heads(x), again.heads(x), strict=True))


def test_a_loaded_model_is_judged_as_it_is(exported, report, data):
    again = lvm.fivecat(lvm.load(exported, device="cpu"), data)
    pd.testing.assert_frame_equal(again.table, report.table)


def test_from_a_folder_the_same_weights_and_the_report_that_lies_there(run, report, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    bare = lvm.export(copy, tmp_path / "bare")
    assert "not judged" in (bare / CARD).read_text()
    assert (bare / WEIGHTS).read_bytes() == (lvm.export(run, tmp_path / "other", report) / WEIGHTS).read_bytes()
    found = lvm.reading(report)
    verdict = lvm.verdict(run.version, run.history, report)
    report.to_json(copy / "fivecat.json", verdict=verdict.to_dict(), reading={"label": found.label, "text": found.text})
    judged = (lvm.export(copy, tmp_path / "judged") / CARD).read_text()
    known = (tmp_path / "other" / CARD).read_text()
    without = re.compile(r"(by the encoder that made the dataset|\. Encoder: .*)\.\n|, by the encoder.*\n")
    assert without.sub("", judged) == without.sub("", known) and found.text in judged
    content = json.loads((copy / "fivecat.json").read_text())
    (copy / "fivecat.json").write_text(json.dumps(content | {"instrument": 1}))
    with pytest.raises(LVMError, match="written by instrument 1"):
        lvm.export(copy, tmp_path / "old")
    assert not (tmp_path / "old").exists()


def test_a_name_with_a_slash_and_an_older_run_without_a_direction(run, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    record = yaml.safe_load((copy / "run.yaml").read_text())
    del record["parameters"]["direction"]
    record["dataset"]["name"] = "owner/of it"
    (copy / "run.yaml").write_text(yaml.safe_dump(record))
    config = lvm.load(lvm.export(copy, tmp_path / "out"), "cpu").config
    assert (config.dataset, config.direction) == ("owner-of it", "forward")


# Whole or not at all


def test_nothing_is_written_over_what_is_there(run, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(LVMError, match="is there already"):
        lvm.export(run, there)
    assert not list(there.iterdir())


def test_an_unfinished_or_damaged_run_leaves_no_folder(run, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    # Cloned: they are mapped from the file, which changes below.
    weights = {k: t.clone() for k, t in safetensors.torch.load_file(copy / "best.safetensors").items()}
    safetensors.torch.save_file(
        {**weights, "query.bias": torch.full_like(weights["query.bias"], torch.nan)}, copy / "x"
    )
    shutil.copy(copy / "x", copy / "best.safetensors")
    with pytest.raises(LVMError, match="NaN"):
        lvm.export(copy, tmp_path / "out")
    safetensors.torch.save_file({"query.bias": weights["query.bias"]}, copy / "best.safetensors")
    with pytest.raises(LVMError, match="not the weights of model"):
        lvm.export(copy, tmp_path / "out")
    record = yaml.safe_load((copy / "run.yaml").read_text())
    del record["finished"]
    (copy / "run.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(LVMError, match="not finished"):
        lvm.export(copy, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_failure_in_the_middle_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lvm.export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_of_this_run_is_refused(run, report, tmp_path):
    with pytest.raises(LVMError, match="profile original"):
        lvm.export(run, tmp_path / "out", report.original)
    with pytest.raises(LVMError, match="horizon 3"):
        lvm.export(run, tmp_path / "out", dataclasses.replace(report, horizon=3))


# The card


def test_the_card_holds_the_numbers_of_the_report(exported, report):
    text = (exported / CARD).read_text(encoding="utf-8")
    for split in ("val", "ood"):
        part = text[text.index(f"**{split}** (") :]
        lines = [[c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")][2:10]
        assert [line[1] for line in lines] == [measure for _, measure in room.SHOWN]
        for gate, measure, *cells, chance in lines:
            for cell, predictor in zip(cells, ("model", "copy last", "mean"), strict=True):
                row = report.row(measure, split, predictor, gate)
                wanted = [row["value"]] + ([] if np.isnan(row["low"]) else [row["low"], row["high"]])
                assert [float(n) for n in re.findall(r"-?\d+\.\d+", cell)] == pytest.approx(wanted, abs=5.001e-4)
            wanted = report.row(measure, split, "model", gate)["chance"]
            assert chance == ("–" if np.isnan(wanted) else f"{wanted:.3f}")
        assert ", ".join(f"{g} {o}" for g, o in report.gates(split).items()) in text
    assert lvm.reading(report).text in text and "a test's encoder." in text
    assert "(B, 5, 24)" in text and "chunk 2 after" in text


def test_the_hubs_own_reader_understands_the_head(exported, report):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(exported / CARD).data
    assert data.library_name == "lvmlib" and data.model_name == "v22, amn, seed 0"
    found = {(r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    for split in ("val", "ood"):
        for measure in ("cosine at the target", "novel MRR"):
            assert found[split, measure] == pytest.approx(report.value(measure, split), abs=1e-4)


def test_the_cards_own_snippet_runs(exported, monkeypatch):
    monkeypatch.chdir(exported)
    (snippet,) = re.findall(r"```python\n(.*?)```", (exported / CARD).read_text(), re.DOTALL)
    names = {}
    exec(compile(snippet, CARD, "exec"), names)
    assert names["unit"].shape == (1, DIM)


def test_a_smoke_run_and_a_reversed_one_are_called_so():
    config = room.Config("two_heads", 8, 5, 2, "backward", "toy", "0", "", "v22", 0, "float32", "0")
    text = card(config, {"train": 9}, None, fast=True)
    assert "smoke run" in text and "chunk 2 before" in text and "reversed" in text and "heads(context)[2]" in text


# Damaged or hostile


def settings(folder, **changed):
    content = json.loads((folder / CONFIG).read_text()) | changed
    (folder / CONFIG).write_text(json.dumps(content))


def weights(folder, change):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors = {k: t.clone() for k, t in tensors.items()}
    tensors = change(tensors) or tensors
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def linked(folder, name):
    outside = folder.parent / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


def piped(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)


def header(folder, change):
    """The safetensors file with another header before the same numbers."""
    content = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    text = json.dumps(change(head)).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def cut(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])


DAMAGE = {
    "no config": (lambda f: (f / CONFIG).unlink(), "config.json: is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: is missing"),
    "not json": (lambda f: (f / CONFIG).write_text("{"), "not a readable configuration"),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "not a readable configuration"),
    "nested deeply": (lambda f: (f / CONFIG).write_text("[" * 60_000), "not a readable configuration"),
    "a large config": (lambda f: (f / CONFIG).write_text(" " * 10**6 + "{}"), "larger than 64 KiB"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "missing: context_length"),
    "a key too few": (lambda f: (f / CONFIG).write_text('{"model": "amn"}'), "missing: context_length"),
    "a key too many": (lambda f: settings(f, auto_map="x.py"), "unknown: auto_map"),
    "a text for a number": (lambda f: settings(f, dim="24"), "dim is str, needed is int"),
    "a truth for a number": (lambda f: settings(f, horizon=True), "horizon is bool"),
    "a number with a point": (lambda f: settings(f, dim=24.0), "dim is float"),
    "no number": (lambda f: settings(f, seed=None), "seed is NoneType"),
    "an absurd dim": (lambda f: settings(f, dim=10**12), "dim is 1000000000000"),
    "a number of thousands of digits": (lambda f: settings(f, dim=10**4000), "dim is 1000|readable configuration"),
    "no dim": (lambda f: settings(f, dim=0), "dim is 0"),
    "a negative horizon": (lambda f: settings(f, horizon=-2), "horizon is -2"),
    "an absurd context": (lambda f: settings(f, context_length=10**9), "context_length is 1000000000"),
    "an unknown model": (lambda f: settings(f, model="mamba"), "unknown model 'mamba'; known: transformer"),
    "a model by path": (lambda f: settings(f, model="../../etc/passwd"), "unknown model"),
    "a model by import": (lambda f: settings(f, model="os.system"), "unknown model"),
    "an unknown direction": (lambda f: settings(f, direction="up"), "unknown direction"),
    "an unknown precision": (lambda f: settings(f, precision="int4"), "unknown precision"),
    "a version that climbs": (lambda f: settings(f, version="../../x"), "not a plain name"),
    "a dataset that climbs": (lambda f: settings(f, dataset="..\\x"), "not a plain name"),
    "a hidden name": (lambda f: settings(f, version=".ssh"), "not a plain name"),
    "no name": (lambda f: settings(f, dataset=""), "not a plain name"),
    "markup in a name": (lambda f: settings(f, dataset="<script>"), "not a plain name"),
    "lines in a text": (lambda f: settings(f, encoder="a\nb"), "encoder is not one line"),
    "an endless text": (lambda f: settings(f, encoder="a" * 600), "encoder is not one line"),
    "another dim": (lambda f: settings(f, dim=25), "has shape .* config.json implies"),
    "another model": (lambda f: settings(f, model="gru"), "not the weights that config.json names"),
    "a tensor too few": (
        lambda f: weights(f, lambda t: {k: x for k, x in t.items() if k != "query.bias"}),
        "query.bias is missing",
    ),
    "a tensor too many": (lambda f: weights(f, lambda t: {**t, "x": torch.ones(1)}), "x is unknown"),
    "another shape": (lambda f: weights(f, lambda t: {**t, "query.bias": torch.ones(3)}), r"has shape \(3,\)"),
    "another type": (lambda f: weights(f, lambda t: {k: x.half() for k, x in t.items()}), "is F16, needed is F32"),
    "nan": (lambda f: weights(f, lambda t: t["key.bias"].fill_(torch.nan) is None or t), "key.bias holds NaN"),
    "infinite": (lambda f: weights(f, lambda t: t["key.bias"].fill_(torch.inf) is None or t), "key.bias holds NaN"),
    "an empty file": (lambda f: cut(f, 0), "not a whole safetensors file"),
    "half a head": (lambda f: cut(f, 100), "not a whole safetensors file"),
    "cut off": (lambda f: cut(f, -1000), "not a whole safetensors file"),
    "a head that claims more": (
        lambda f: header(f, lambda h: h | {"key.bias": h["key.bias"] | {"shape": [2**40]}}),
        "not a whole safetensors file",
    ),
    "offsets outside": (
        lambda f: header(f, lambda h: h | {"key.bias": h["key.bias"] | {"data_offsets": [2**40, 2**40 + 1024]}}),
        "not a whole safetensors file",
    ),
    "a pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps(Harmful())), "looks like a pickle, which is never"),
    "torch's own": (lambda f: torch.save({"a": Harmful()}, f / WEIGHTS), "looks like a pickle, which is never"),
    "config by a link": (lambda f: linked(f, CONFIG), "config.json: is a link out of the folder"),
    "weights by a link": (lambda f: linked(f, WEIGHTS), "model.safetensors: is a link out of the folder"),
    "a link to nowhere": (lambda f: (f / CONFIG).unlink() or (f / CONFIG).symlink_to("gone"), "is missing"),
    "a link to itself": (lambda f: (f / CONFIG).unlink() or (f / CONFIG).symlink_to(CONFIG), "is missing"),
    "a pipe": (lambda f: piped(f, WEIGHTS), "not a plain file"),
    "a folder": (lambda f: (f / WEIGHTS).unlink() or (f / WEIGHTS).mkdir(), "not a plain file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_in_one_error(damage, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(LVMError, match=message) as told:
        lvm.load(folder, device="cpu")
    assert str(told.value).startswith(str(folder)) and len(str(told.value)) < 700
    assert not (folder.parent / "harm").exists()  # nothing of a pickle was run


def test_absurd_sizes_take_no_memory(tmp_path):
    """A config may ask for a matrix of 17 GB that the weights do not hold: refused by the shapes, before it is made."""
    made("bilinear", tmp_path / "model", dim=8)
    settings(tmp_path / "model", dim=65_536)
    with pytest.raises(LVMError, match="implies"):
        lvm.load(tmp_path / "model", device="cpu")


def test_a_link_within_the_folder_is_none_of_our_business(folder):
    (folder / WEIGHTS).rename(folder / "kept")
    (folder / WEIGHTS).symlink_to("kept")
    assert lvm.load(folder, device="cpu").dim == DIM


def test_no_folder_is_told_with_the_way_to_the_hub(tmp_path):
    with pytest.raises(LVMError, match="no such folder; `export` makes one"):
        lvm.load(tmp_path / "gone")
    with pytest.raises(LVMError, match="write hub:someone/model"):
        lvm.load("someone/model")
    with pytest.raises(LVMError, match="not on this machine"):
        lvm.load(tmp_path, device="cuda:99")


# The hub, by a stub with the client's own signatures


class Hub:
    """Keeps what is uploaded, and gives it back as the client's cache does: links into a folder of blobs."""

    def __init__(self, real, cache):
        self.real, self.cache, self.calls, self.kept = real, cache, [], {}

    def called(self, function, *args, **kwargs):
        bound = inspect.signature(function).bind(*args, **kwargs)  # TypeError where the client has no such argument
        self.calls.append(function.__name__)
        return bound.arguments

    def HfApi(self):
        return self

    def create_repo(self, *args, **kwargs):
        asked = self.called(self.real.HfApi.create_repo, self, *args, **kwargs)
        assert asked["repo_type"] == "model" and asked["private"] is True and asked["exist_ok"] is True

    def upload_folder(self, *args, **kwargs):
        asked = self.called(self.real.HfApi.upload_folder, self, *args, **kwargs)
        there = os.listdir(asked["folder_path"])
        names = list(self.real.utils.filter_repo_objects(there, allow_patterns=asked["allow_patterns"]))
        self.kept[asked["repo_id"]] = {n: Path(asked["folder_path"], n).read_bytes() for n in names}
        return "https://hub.test/commit/1"

    def snapshot_download(self, *args, **kwargs):
        asked = self.called(self.real.snapshot_download, *args, **kwargs)
        files = self.kept[asked["repo_id"]]
        repository = self.cache / ("models--" + asked["repo_id"].replace("/", "--"))
        snapshot, blobs = repository / "snapshots" / (asked["revision"] or "main"), repository / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for name in self.real.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"]):
            (blobs / name).write_bytes(files[name])
            (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", name))
        return str(snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stub = Hub(pytest.importorskip("huggingface_hub"), tmp_path / "cache")
    monkeypatch.setattr(room, "extra", lambda module, name: stub)
    return stub


def test_pushed_and_loaded_it_is_the_same(hub, folder):
    (folder / "private.txt").write_text("stays at home")
    assert push(folder, "someone/model") == "https://hub.test/commit/1"
    assert sorted(hub.kept["someone/model"]) == sorted(FILES)
    hub.kept["someone/model"] |= {"code.py": b"", "pytorch_model.bin": b""}
    model = lvm.load("hub:someone/model", device="cpu", revision="v1")
    assert hub.calls == ["create_repo", "upload_folder", "snapshot_download"]
    wanted = lvm.load(folder, device="cpu")
    assert model.config == wanted.config
    assert all(torch.equal(a, b) for a, b in zip(model(context(model)), wanted(context(model)), strict=True))
    snapshot = hub.cache / "models--someone--model" / "snapshots" / "v1"
    assert sorted(p.name for p in snapshot.iterdir()) == sorted(FILES)


def test_a_link_out_of_the_cache_is_refused(hub, folder, tmp_path):
    push(folder, "someone/model")
    download = hub.snapshot_download

    def out(*args, **kwargs):
        snapshot = download(*args, **kwargs)
        os.unlink(os.path.join(snapshot, CONFIG))
        os.symlink(folder / CONFIG, os.path.join(snapshot, CONFIG))
        return snapshot

    hub.snapshot_download = out
    with pytest.raises(LVMError, match="link out of the folder"):
        lvm.load("hub:someone/model", device="cpu")


@pytest.mark.parametrize("name", ["model", "a/b/c", "../x", "a/..", "a/.git", "a b/c", "", "a/b@main", "https://x/y"])
def test_names_that_are_no_repository_never_reach_the_client(hub, folder, name):
    for attempt in (lambda: lvm.load(f"hub:{name}"), lambda: push(folder, name)):
        with pytest.raises(LVMError, match="write hub:OWNER/NAME"):
            attempt()
    assert hub.calls == []


def test_a_card_that_is_a_link_is_not_pushed(hub, folder, tmp_path):
    (tmp_path / "secret").write_text("a key")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(LVMError, match=r"README\.md"):
        push(folder, "someone/model")
    assert hub.calls == []


@pytest.mark.parametrize("name", ["My corpus\tv1", "...", "x" * 600])
def test_any_name_of_a_dataset_can_be_exported(name, run, report, tmp_path):
    source = shutil.copytree(run.folder, tmp_path / "run")
    record = yaml.safe_load((source / "run.yaml").read_text())
    record["dataset"]["name"] = name
    (source / "run.yaml").write_text(yaml.safe_dump(record))
    assert lvm.load(lvm.export(source, tmp_path / "model", report)).config.dataset


def test_a_report_that_lacks_a_measure_is_refused(run, report, tmp_path):
    source = shutil.copytree(run.folder, tmp_path / "run")
    report.to_json(source / "fivecat.json", reading={"text": "r"}, verdict={"text": "v"})
    content = json.loads((source / "fivecat.json").read_text())
    rows = content["calibrated"]["table"]
    content["calibrated"]["table"] = [row for row in rows if row["measure"] != "cosine at the target"]
    (source / "fivecat.json").write_text(json.dumps(content))
    with pytest.raises(LVMError, match="lacks what the card shows"):
        lvm.export(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_opened_is_not_pushed(hub, folder):
    cut(folder, 100)
    with pytest.raises(LVMError, match="not a whole safetensors"):
        push(folder, "someone/model")
    assert hub.calls == []


def test_the_hubs_refusal_is_told_in_its_words(hub, folder):
    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    hub.snapshot_download = hub.upload_folder = refuse
    with pytest.raises(LVMError, match=r"did not give it .*no route to host"):
        lvm.load("hub:someone/model", device="cpu")
    with pytest.raises(LVMError, match=r"did not take .*no route to host"):
        push(folder, "someone/model")


def test_a_missing_client_is_told_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(LVMError, match=re.escape('pip install -e ".[export]"')):
        lvm.load("hub:someone/model", device="cpu")


# ONNX


@pytest.fixture
def runtime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_onnx_gives_what_torch_gives(name, runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "HIDDEN", 32)  # as wide as eight heads need: the converter's work is the same
    torch.manual_seed(0)
    model = models.build(name, 16).train()
    assert to_onnx(model, tmp_path / "model.onnx") <= ONNX_TOLERANCE
    assert model.training and os.listdir(tmp_path) == ["model.onnx"]
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.shape for i in session.get_inputs()] == [["batch", 5, 16]]
    model.eval()
    for size in (1, 2, 130):  # sizes that the conversion did not see
        x = context(model, size, seed=size)
        point, ranker = session.run(["point", "ranker"], {"context": x.numpy()})
        with torch.no_grad():
            raw, _, ranks = model.heads(x)
        np.testing.assert_allclose(point, raw.numpy(), atol=ONNX_TOLERANCE * float(raw.abs().max()), rtol=0)
        np.testing.assert_allclose(ranker, ranks.numpy(), atol=ONNX_TOLERANCE * float(ranks.abs().max()), rtol=0)
    if name in params.SEVERAL_HEADS:
        assert not np.allclose(ranker, F.normalize(torch.from_numpy(point), dim=-1).numpy(), atol=1e-2)


def test_onnx_of_a_folder(exported, runtime, tmp_path):
    to_onnx(exported, tmp_path / "deep" / "model.onnx")
    assert os.listdir(tmp_path / "deep") == ["model.onnx"]
    with pytest.raises(LVMError, match="is there already"):
        to_onnx(exported, tmp_path / "deep" / "model.onnx")


def test_onnx_that_differs_or_fails_leaves_no_file(runtime, tmp_path, monkeypatch):
    model = models.build("bilinear", 16)
    with pytest.raises(LVMError, match="OneSample cannot be converted"):
        to_onnx(models.OneSample(models.build("sampler", 16)), tmp_path / "model.onnx")
    monkeypatch.setattr(room, "ONNX_TOLERANCE", -1.0)
    with pytest.raises(LVMError, match="differs from torch by"):
        to_onnx(model, tmp_path / "model.onnx")
    assert not os.listdir(tmp_path)


def test_onnx_of_nan_is_refused(runtime, tmp_path):
    model = models.build("bilinear", 16)
    torch.nn.init.constant_(model.metric.weight, torch.nan)
    with pytest.raises(LVMError, match="differs from torch by nan"):
        to_onnx(model, tmp_path / "model.onnx")
