"""Fixtures of several files: a fake of the hub's loader, small folders of texts, their builds, a small encoder."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from building import Hashed, content, make, stopped, use
from small import LIMIT, WORDS, write_folder

from lvmlib.text import encoders


@pytest.fixture
def hub(monkeypatch):
    """`hub(stream)` lets datasets.load_dataset return the stream, or raise it; returns the list of calls."""
    datasets = pytest.importorskip("datasets")
    called = []

    def use(stream):
        def load_dataset(*args, **options):
            called.append((args, options))
            if isinstance(stream, Exception):
                raise stream
            return stream

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return called

    return use


@pytest.fixture(scope="module")
def one_thread():
    """A forked child may not use the threads of its parent; vectors are equal bit for bit with as many threads."""
    count, saved = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    yield
    torch.set_num_threads(count)
    os.environ.pop("TOKENIZERS_PARALLELISM") if saved is None else os.environ.update(TOKENIZERS_PARALLELISM=saved)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("source") / "papers")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A BERT of two layers with random weights and a WordPiece tokenizer, saved as sentence-transformers saves."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {k: f"[{k.upper()}]" for k in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*special.values()], show_progress=False)
    tokenizer.train_from_iterator([*WORDS, "abcdefghij", ". , ?"], trainer)
    marks = [(m, tokenizer.token_to_id(m)) for m in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    folder = tmp_path_factory.mktemp("tiny")
    names = {f"{k}_token": mark for k, mark in special.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LIMIT, **names).save_pretrained(folder / "raw")
    torch.manual_seed(0)
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "hidden_size": 32}
    config |= {"max_position_embeddings": LIMIT, "vocab_size": tokenizer.get_vocab_size()}
    BertModel(BertConfig(**config)).save_pretrained(folder / "raw")
    modules = [parts.Transformer(str(folder / "raw"), max_seq_length=LIMIT), parts.Pooling(32)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "tiny"))
    return folder / "tiny"


@pytest.fixture(scope="session")
def small_encoder(tiny):
    return encoders.encoder(str(tiny), "cpu")


@pytest.fixture
def hashed(monkeypatch):
    """`build` with that encoder; returns it."""
    return use(monkeypatch, Hashed())


@pytest.fixture(scope="session")
def builds(folder, tmp_path_factory):
    """A folder of two builds of `out`, not to be changed: `whole` is finished, `stopped` has all shards."""
    base = tmp_path_factory.mktemp("builds")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, Hashed())
        make(folder, base / "whole" / "out")
        stopped(folder, base / "stopped" / "out")
    return base


@pytest.fixture(scope="session")
def whole(builds):
    """What an uninterrupted build writes."""
    return content(builds / "whole" / "out")


@pytest.fixture
def work(builds, tmp_path):
    """A copy of the work folder of the stopped build of tmp_path/out."""
    return Path(shutil.copytree(builds / "stopped" / "out.partial", tmp_path / "out.partial"))
