"""The versions' values against handbook §3, typed here by hand; and that bad parameters give one clear error."""

import pytest
import yaml

from lvmlib import config as params
from lvmlib import models
from lvmlib.cli.parameters import check_injected
from lvmlib.config import flat, version
from lvmlib.errors import LVMError
from lvmlib.io import paths

# What every version shares: the handbook's "Common", §1 (P6 data) and the definition of prev.
COMMON = {
    "data": "wikipedia",
    "horizon": 2,
    "context_length": 5,
    "direction": "forward",
    "model": "transformer",
    "epochs": 12,
    "batch_size": 32,
    "seed": 0,
    "device": "auto",
    "precision": "auto",
    "log_every": 200,
    "optimizer.schedule": "plateau",
    "fast": False,
    "optimizer.lr": 5e-4,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
    "optimizer.plateau_factor": 0.5,
    "optimizer.plateau_patience": 3,
    "optimizer.decay": "all",
    "select": "val_loss",
    "losses.mean_square": 1.0,
    "losses.listwise.weight": 0.0,
    "losses.listwise.temperature": 0.1,
    "losses.listwise.candidates": 128,
    "losses.listwise.elsewhere": 0,
    "losses.energy.weight": 0.0,
    "losses.energy.samples": 8,
    "losses.directional.prev": -2,
    "control.smoothing": 0.99,
    "control.measure": "value",
    "control.kp": 0.0,
    "control.ki": 0.1,
    "control.constraint": None,
    "rewind": None,
    "trouble": "go_on",
}
OURS = {"rank", "two_heads", "committee", "share", "pi", "bounded", "margin", "energy"}  # after the handbook's


def row(
    kind="none",
    gamma=None,
    lambdas=(None, None),
    rule="none",
    guard="none",
    floor=(0.0, 0.0),
    norm=0.0,
    orth=0.0,
    gate=None,
    margin=(),
    fraction=(),
    rho_target=(),
    rho_cap=(),
    alpha=None,
    margin_ratio=None,
):
    """A row of the handbook's table, as dotted keys; None: the version has no such quantity."""
    gates = {"control.gate": None} if gate is None else {"control.gate.low": gate[0], "control.gate.width": gate[1]}
    return {
        "losses.directional.kind": kind,
        "losses.directional.gamma": gamma,
        "losses.directional.alpha": alpha,
        "losses.directional.margin_ratio": margin_ratio,
        "losses.floor.tau": floor[0],
        "losses.floor.weight": floor[1],
        "losses.norm": norm,
        "losses.orthogonality": orth,
        "control.rule": rule,
        "control.guard": guard,
        "control.lambda_min": lambdas[0],
        "control.lambda_max": lambdas[1],
        **gates,
        "schedule.margin": margin,
        "schedule.fraction": fraction,
        "schedule.rho_target": rho_target,
        "schedule.rho_cap": rho_cap,
    }


SCALE_AWARE = dict(kind="scale_aware", gamma=4.0, alpha=0.7, margin_ratio=0.05, guard="v21", norm=1e-3)
V2_STEPS = dict(
    margin=((1, 0.02), (4, 0.03), (7, 0.04), (10, 0.05)), fraction=((1, 0.10), (4, 0.15), (7, 0.20), (10, 0.25))
)
V22 = dict(
    **SCALE_AWARE,
    lambdas=(1e-4, 0.03),
    rule="rho_controller",
    floor=(0.12, 2e-3),
    orth=5e-4,
    margin=((1, 0.02), (3, 0.04), (5, 0.06), (9, 0.07)),
    rho_target=((1, 0.15), (3, 0.25), (5, 0.35)),
    rho_cap=((1, 0.35), (3, 0.45), (5, 0.50)),
)

TABLE = {
    "p6": row(),
    "v1": row(
        "smooth",
        8.0,
        (1e-4, 0.05),
        "fraction",
        margin=((1, 0.02), (3, 0.04), (6, 0.05)),
        fraction=((1, 0.10), (3, 0.20), (6, 0.25)),
    ),
    "v2": row("smooth", 4.0, (1e-4, 0.02), "fraction", "v2", **V2_STEPS),
    "v21": row(
        **SCALE_AWARE, lambdas=(1e-4, 0.02), rule="rho_cap", floor=(0.10, 1e-3), **V2_STEPS, rho_cap=((1, 0.25),)
    ),
    "v22": row(**V22),
    "v23": row(**V22 | dict(rho_target=((1, 0.02), (4, 0.05), (7, 0.12), (10, 0.30)))),
    "v23_unguarded": row(**V22 | dict(rule="fixed", rho_target=(), rho_cap=())),
    "v23_forward": row(**V22),
    "v23_confident": row(
        **V22
        | dict(
            lambdas=(1e-4, 0.018),
            gate=(0.30, 0.15),
            floor=(0.10, 1e-3),
            orth=1e-4,
            margin=((1, 0.02), (5, 0.03), (8, 0.04)),
            rho_target=((1, 0.15), (5, 0.20), (8, 0.25)),
            rho_cap=((1, 0.30), (5, 0.35), (8, 0.40)),
        )
    ),
}
PARENTS = {
    "p6": "",
    "v1": "p6",
    "v2": "v1",
    "v21": "v2",
    "v22": "v21",
    "v23": "v22",
    "v23_unguarded": "v22",
    "v23_forward": "v22",
    "v23_confident": "v22",
}
PUBLISHED = {  # margin, recall@5, validation cosine
    "p6": (-0.082, 0.70, None),
    "v1": (None, None, None),
    "v2": (None, None, None),
    "v21": (-0.047, 0.769, 0.488),
    "v22": (None, None, None),
    "v23": (None, None, None),
    "v23_unguarded": (None, None, None),
    "v23_forward": (None, None, None),
    "v23_confident": (-0.05, None, None),
}


def as_tuples(value):
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


def values(name, **top):
    return {k: as_tuples(v) for k, v in flat(version(name, **top).to_dict()).items()}


def refused(call, *words):
    """The message of the LVMError that `call` must raise, checked to hold each of the words."""
    with pytest.raises(LVMError) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    return message


# The family, value by value


def test_the_family_is_complete():
    assert set(params.known_versions()) == set(TABLE) | OURS


@pytest.mark.parametrize("name", TABLE)
def test_every_value_of_a_version(name):
    expected = COMMON | TABLE[name] | ({"data": "world:converging"} if name == "v23_forward" else {})
    found = values(name)
    told = ("name", "about", "extends", "expected", "published")
    assert {k for k in found if not k.startswith(told)} == set(expected)  # so that no key goes unchecked
    for key, value in expected.items():
        if value is not None:
            assert found[key] == value, key
    assert found["name"] == name


@pytest.mark.parametrize("name", PARENTS)
def test_parents_and_published_results(name):
    v = version(name)
    assert v.extends == PARENTS[name]
    assert (v.published.margin, v.published.recall_at_5, v.published.val_cos) == PUBLISHED[name]
    assert name == "p6" or v.published.margin != version("p6").published.margin  # nobody inherits a measurement


def test_the_expected_timeline_of_v22():
    assert [tuple(vars(e).values()) for e in version("v22").expected] == [
        (1, (-0.04, -0.04), 0.72, 0.49, 0.15),
        (3, (-0.02, -0.01), 0.72, 0.49, 0.25),
        (5, (0.0, 0.01), 0.72, 0.48, 0.35),
        (7, (0.02, 0.04), 0.72, 0.48, 0.35),
        (10, (0.03, 0.05), 0.70, 0.48, 0.35),
    ]
    assert all(version(name).expected == () for name in TABLE if name != "v22")


# The files: small, explained, and saying only what differs


@pytest.mark.parametrize("name", [*TABLE, "base"])
def test_a_file_begins_with_one_comment_line(name):
    first, second = (paths.PARAMS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ") and len(first) > 20 and not second.startswith("#")
    if name != "base":
        assert version(name).about == first[2:]


@pytest.mark.parametrize("name", TABLE)
def test_a_file_says_only_what_differs(name):
    own = yaml.safe_load((paths.PARAMS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert own.pop("extends") == (PARENTS[name] or "base")
    base = yaml.safe_load((paths.PARAMS / "base.yaml").read_text(encoding="utf-8"))
    parent = {k: as_tuples(v) for k, v in flat(version(PARENTS[name]).to_dict() if PARENTS[name] else base).items()}
    assert not {k for k, v in flat(own).items() if k in parent and parent[k] == as_tuples(v)}


def test_base_lists_every_parameter():
    base = flat(yaml.safe_load((paths.PARAMS / "base.yaml").read_text(encoding="utf-8")))
    assert set(base) == set(flat(version("p6").to_dict())) - {"name", "about", "extends"}


@pytest.mark.parametrize("name", TABLE)
def test_to_dict_is_plain_and_survives_yaml(name):
    plain = version(name).to_dict()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["name"] == name


def test_versions_are_frozen():
    with pytest.raises(AttributeError):
        version("v22").epochs = 3


# Overrides


def test_overrides_are_merged_deeply():
    before = values("v22")
    after = {
        k: as_tuples(v)
        for k, v in flat(
            version("v22", {"losses": {"floor": {"tau": 0.2}}, "optimizer": {"lr": 1e-3}}, epochs=3).to_dict()
        ).items()
    }
    assert {k for k in before if before[k] != after[k]} == {"losses.floor.tau", "optimizer.lr", "epochs"}
    assert (after["losses.floor.tau"], after["optimizer.lr"], after["epochs"]) == (0.2, 1e-3, 3)


def test_top_level_arguments_win_and_none_keeps():
    assert version("v22", {"epochs": 5}, epochs=7).epochs == 7
    assert version("v22", {"epochs": 5}, epochs=None).epochs == 5
    assert version("v22", {}, seed=0) == version("v22") == version("v22", None)


def test_lists_are_replaced_whole_and_a_gate_can_go():
    assert version("v22", {"schedule": {"rho_cap": [[1, 0.9]]}}).schedule.rho_cap == ((1, 0.9),)
    assert version("v23_confident", {"control": {"gate": None}}).control.gate is None
    assert version("v22", {"control": {"gate": {"low": 0.2, "width": 0.1}}}).control.gate == params.Gate(0.2, 0.1)


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [9]}
    assert params.merge(base, over) == {"a": {"b": 1, "c": 3}, "d": [9]}
    assert (base, over) == ({"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [9]})


def test_whole_numbers_pass_as_floats():
    lr = version("v22", {"optimizer": {"clip_norm": 2}}).optimizer.clip_norm
    assert (lr, type(lr)) == (2.0, float)


def test_fast_mode_has_at_most_two_epochs():
    assert [version("v22", fast=True, epochs=e).epochs for e in (1, 2, 12)] == [1, 2, 2]


@pytest.mark.parametrize("model", ["transformer", "bilinear"])
def test_energy_needs_a_model_with_samples(model):
    message = refused(lambda: version("energy", model=model), "params/energy.yaml", f"model is '{model}'", "sampler")
    assert "losses.energy" in message
    over = {"losses": {"energy": {"weight": 0.0}, "mean_square": 1.0}, "select": "val_loss"}
    assert version("energy", over, model=model).model == model


def test_a_selection_by_energy_needs_the_energy_score():
    refused(lambda: version("p6", {"select": "val_energy"}), "params/p6.yaml", "select is 'val_energy'", "novel_mrr")
    for select in ("val_loss", "novel_mrr", "val_energy"):
        assert version("energy", {"select": select}).select == select


def test_the_models_with_samples_are_those_that_have_them():

    assert [name for name, kind in models.ARCHITECTURES.items() if hasattr(kind, "samples")] == list(params.GENERATIVE)
    several = [name for name, kind in models.ARCHITECTURES.items() if kind.heads is not models.Predictor.heads]
    assert several == list(params.SEVERAL_HEADS)


@pytest.mark.parametrize("overrides", ["optimizer.lr=1", ["epochs"], 3, [("epochs", 3)], True])
def test_overrides_that_are_no_dict_are_refused(overrides):
    refused(lambda: version("v22", overrides), "overrides", repr(overrides), "dict")


# Refusals: unknown versions and keys


@pytest.mark.parametrize(
    "name", [22, None, "../x", "../params/v22", "base", "", "v24", "V22", "v22.yaml", 2.2, ["v22"]]
)
def test_an_unknown_version_lists_the_known(name):
    refused(lambda: version(name), f"unknown version {name!r}", *TABLE)


@pytest.mark.parametrize("name, near", [(22, "v22"), ("v22 ", "v22"), ("v23_confidnt", "v23_confident"), ("22", "v22")])
def test_an_unknown_version_names_the_nearest(name, near):
    refused(lambda: version(name), f"did you mean '{near}'")


@pytest.mark.parametrize(
    "overrides, key, near",
    [
        ({"epoch": 3}, "epoch", "epochs"),
        ({"optimiser": {"lr": 1e-3}}, "optimiser", "optimizer"),
        ({"optimizer": {"wieght_decay": 0.1}}, "optimizer.wieght_decay", "weight_decay"),
        ({"losses": {"floor": {"tua": 0.1}}}, "losses.floor.tua", "tau"),
        ({"schedule": {"rho_traget": [[1, 0.1]]}}, "schedule.rho_traget", "rho_target"),
        ({"control": {"gate": {"low": 0.1, "widht": 0.1}}}, "control.gate.widht", "width"),
    ],
)
def test_an_unknown_key_names_the_nearest(overrides, key, near):
    refused(lambda: version("v22", overrides), "params/v22.yaml", "overrides", f"unknown key {key!r}", f"'{near}'")


def test_an_unknown_argument_names_the_nearest():
    refused(lambda: version("v22", epcohs=3), "unknown key 'epcohs'", "'epochs'")


@pytest.mark.parametrize("key", ["name", "about", "extends"])
def test_what_names_a_version_cannot_be_overridden(key):
    refused(lambda: version("v22", {key: "v21"}), "v22", repr(key), "cannot be set")


def test_a_missing_key_is_named():
    refused(lambda: version("v22", {"control": {"gate": {"low": 0.1}}}), "v22", "control.gate.width", "missing")


# Refusals: wrong types and impossible values


def nest(dotted, value):
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


NOT_NUMBERS = ("1e-4", "0.1", True, False, None, float("nan"), float("inf"), -float("inf"), [0.1], {"a": 1}, 1j)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
@pytest.mark.parametrize("key", ["optimizer.lr", "losses.norm", "losses.floor.tau", "control.lambda_max"])
def test_a_number_is_needed(key, value):
    message = refused(lambda: version("v22", nest(key, value)), "params/v22.yaml", key, repr(value), "a number")
    assert ("1.0e-4" in message) == isinstance(value, str)  # YAML 1.1 reads 1e-4 as text


@pytest.mark.parametrize("value", ["3", 3.0, True, [3], {"a": 1}, float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("key", ["epochs", "seed", "batch_size", "horizon", "losses.directional.prev"])
def test_a_whole_number_is_needed(key, value):
    refused(lambda: version("v22", nest(key, value)), "params/v22.yaml", key, repr(value), "whole number")


@pytest.mark.parametrize(
    "overrides, key, needed",
    [
        ({"epochs": None}, "epochs", "whole number"),
        ({"fast": 1}, "fast", "true or false"),
        ({"fast": "true"}, "fast", "true or false"),
        ({"data": 3.5}, "data", "text"),
        ({"device": None}, "device", "text"),
        ({"model": "transfomer"}, "model", "did you mean 'transformer'"),
        ({"model": 3}, "model", "transformer, gru, lstm, amn"),
        ({"model": ["gru"]}, "model", "transformer, gru, lstm, amn"),
        ({"precision": "float16"}, "precision", "bfloat16"),
        ({"control": {"rule": "rho"}}, "control.rule", "rho_controller"),
        ({"control": {"guard": None}}, "control.guard", "v21"),
        ({"losses": {"directional": {"kind": True}}}, "losses.directional.kind", "scale_aware"),
        ({"optimizer": [5e-4]}, "optimizer", "lr"),
        ({"optimizer": None}, "optimizer", "lr"),
        ({"losses": {"floor": 0.1}}, "losses.floor", "tau"),
        ({"control": {"gate": 0.3}}, "control.gate", "low, width"),
        ({"schedule": {"margin": 0.05}}, "schedule.margin", "a list"),
        ({"schedule": {"margin": {1: 0.05}}}, "schedule.margin", "a list"),
        ({"schedule": {"margin": "0.05"}}, "schedule.margin", "a list"),
        ({"schedule": {"margin": [0.02, 0.05]}}, "schedule.margin[0]", "a list"),
        ({"schedule": {"margin": [[1, 0.02, 3]]}}, "schedule.margin[0]", "a list of 2"),
        ({"schedule": {"margin": [[1, 0.02], [3]]}}, "schedule.margin[1]", "a list of 2"),
        ({"schedule": {"margin": [[1, "0.02"]]}}, "schedule.margin[0][1]", "a number"),
        ({"schedule": {"margin": [[1.0, 0.02]]}}, "schedule.margin[0][0]", "whole number"),
        ({"schedule": {"margin": [[True, 0.02]]}}, "schedule.margin[0][0]", "whole number"),
        ({"expected": [3]}, "expected[0]", "from_epoch"),
    ],
)
def test_wrong_types_are_refused(overrides, key, needed):
    refused(lambda: version("v22", overrides), "params/v22.yaml", key, needed)


@pytest.mark.parametrize(
    "key, value",
    [
        ("epochs", 0),
        ("epochs", -1),
        ("batch_size", 0),
        ("horizon", 0),
        ("log_every", 0),
        ("seed", -1),
        ("context_length", 1),
        ("losses.directional.prev", 0),
        ("losses.directional.prev", 2),
        ("losses.directional.prev", -6),
        ("losses.directional.gamma", 0),
        ("losses.directional.gamma", -4),
        ("losses.directional.alpha", 1.1),
        ("losses.directional.alpha", -0.1),
        ("losses.floor.tau", 1.5),
        ("losses.floor.tau", -2),
        ("losses.floor.weight", -1e-3),
        ("losses.norm", -1e-3),
        ("losses.orthogonality", -1),
        ("control.lambda_min", 0),
        ("control.lambda_min", -1e-4),
        ("control.lambda_min", 0.5),
        ("control.lambda_max", 1e-5),
        ("control.gate", {"low": 0.3, "width": 0}),
        ("control.rule", "none"),
        ("losses.directional.kind", "none"),
        ("optimizer.lr", 0),
        ("optimizer.lr", -1e-3),
        ("optimizer.clip_norm", 0),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.plateau_factor", 0),
        ("optimizer.plateau_factor", 1),
        ("optimizer.plateau_patience", -1),
        ("schedule.margin", []),
        ("schedule.rho_target", []),
        ("schedule.rho_cap", []),
        ("schedule.margin", [[2, 0.1]]),
        ("schedule.margin", [[0, 0.1]]),
        ("schedule.margin", [[1, 0.1], [1, 0.2]]),
        ("schedule.rho_target", [[1, 0.1], [5, 0.2], [3, 0.3]]),
    ],
    ids=str,
)
def test_impossible_values_are_refused(key, value):
    group = key if key.startswith(("losses", "schedule")) else key.split(".")[0]
    if (key, value) == ("losses.directional.kind", "none"):
        group = "control.rule"
    refused(lambda: version("v22", nest(key, value)), "params/v22.yaml", group, "needed is")


@pytest.mark.parametrize(
    "name, key",
    [("v1", "fraction"), ("v1", "margin"), ("v21", "rho_cap"), ("v21", "fraction"), ("v23_unguarded", "margin")],
)
def test_each_rule_needs_its_schedule(name, key):
    refused(lambda: version(name, {"schedule": {key: []}}), f"params/{name}.yaml", f"schedule.{key}", "rule")


def test_the_oldest_context_vector_may_be_prev():
    assert version("v22", {"losses": {"directional": {"prev": -5}}}).losses.directional.prev == -5
    assert version("v22", {"losses": {"directional": {"prev": -7}}}, context_length=7).context_length == 7


# Refusals: damaged files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An own params folder: write(NAME=text, …)."""
    base = yaml.safe_load((paths.PARAMS / "base.yaml").read_text(encoding="utf-8"))
    base = params.merge(base, {"epochs": 4, "optimizer": {"lr": 1.0e-3, "clip_norm": 2.0}})
    monkeypatch.setattr(params, "PARAMS", tmp_path)

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())

    write(base="# Base.\n" + yaml.safe_dump(base))
    return write


def test_extends_merges_deeply_through_every_level(folder):
    folder(a="# A.\nextends: base\noptimizer: {lr: 2.0e-3}", b="# B.\nextends: a\noptimizer: {weight_decay: 0.5}")
    v = version("b")
    assert (v.optimizer.lr, v.optimizer.weight_decay, v.optimizer.clip_norm, v.epochs) == (2e-3, 0.5, 2.0, 4)
    assert (v.about, v.extends, version("a").extends) == ("B.", "a", "")
    assert params.known_versions() == ["a", "b"]


def test_a_file_without_extends_extends_base(folder):
    folder(a="# A.\nseed: 3")
    assert (version("a").epochs, version("a").seed) == (4, 3)


@pytest.mark.parametrize(
    "files, entry",
    [
        ({"a": "extends: a"}, "a"),
        ({"a": "extends: b", "b": "extends: a"}, "a"),
        ({"a": "extends: b", "b": "extends: c", "c": "extends: b"}, "a"),
    ],
)
def test_circular_extends_are_refused(folder, files, entry):
    folder(**files)
    refused(lambda: version(entry), "params/", "extends itself", "→")


def test_a_base_that_extends_is_refused(folder):
    folder(a="extends: base", base="extends: a")
    refused(lambda: version("a"), "params/base.yaml", "extends nothing")


@pytest.mark.parametrize(
    "text, word",
    [
        ("a: [1, 2", "cannot be read as YAML"),
        ("a: b: c", "cannot be read as YAML"),
        ("\tepochs: 3", "cannot be read"),
        (b"\xff\xfe\x00epochs", "cannot be read"),
        ("- 1\n- 2", "holds list"),
        ("just text", "holds str"),
        ("3", "holds int"),
    ],
)
def test_damaged_files_are_refused(folder, text, word):
    folder(bad=text)
    refused(lambda: version("bad"), "params/bad.yaml", word)


def test_a_missing_base_is_named(folder, tmp_path):
    folder(a="# A.\nseed: 3")
    (tmp_path / "base.yaml").unlink()
    refused(lambda: version("a"), "params/base.yaml", "cannot be read")


@pytest.mark.parametrize(
    "text, words",
    [
        ("epochs: 1e1", ("epochs is '1e1'", "whole number")),
        ("optimizer: {lr: 1e-4}", ("optimizer.lr is '1e-4'", "1.0e-4")),
        ("epochs: yes", ("epochs is True", "whole number")),
        ("optimizer:", ("optimizer is None",)),
        ("losses: {floor: {tau: .nan}}", ("losses.floor.tau is nan",)),
        ("1: 2", ("unknown key '1'",)),
        ("rho_traget: 2", ("unknown key 'rho_traget'",)),
        ("losses: {flor: {tau: 0.1}}", ("unknown key 'losses.flor'", "did you mean 'floor'")),
        ("name: other", ("'name' cannot be set",)),
    ],
)
def test_bad_keys_and_values_in_a_file_are_placed(folder, text, words):
    folder(bad=text)
    refused(lambda: version("bad"), "params/bad.yaml: ", *words)


@pytest.mark.parametrize("parent", ["other", "5", "[a]", "../base"])
def test_an_unknown_parent_is_refused(folder, parent):
    folder(bad=f"extends: {parent}", a="# A.\nseed: 3")
    refused(lambda: version("bad"), "unknown version", "known: a, bad")


@pytest.mark.parametrize(
    "key, value",
    [
        ("schedule.rho_cap", [[1, -1.0]]),  # above the cap λ·cap/ρ turns λ negative
        ("schedule.rho_target", [[1, -0.1]]),
        ("schedule.rho_cap", [[1, 0.4], [3, 0.2]]),  # below the target 0.25 of epoch 3
        ("schedule.margin", [[1, 2.5]]),  # no gap of two cosines is that wide
        ("losses.directional.margin_ratio", 1.5),
        ("optimizer.lr", 10**400),
    ],
    ids=["negative cap", "negative target", "cap below target", "margin 2.5", "ratio 1.5", "lr 10^400"],
)
def test_impossible_controls_are_refused(key, value):
    refused(lambda: version("v22", nest(key, value)), "params/v22.yaml", key)


@pytest.mark.parametrize("text", ["[]", "false", "0", "extends: other", "extends: ''", "seed: 3\nseed: 4"])
def test_damaged_files_are_refused_in_place(folder, text):
    folder(bad=text)
    refused(lambda: version("bad"), "params/bad.yaml")


# changes: what the first table of the notebook shows


def test_changes_of_v23():
    assert params.changes(version("v23")) == [
        ("schedule.rho_target", [[1, 0.15], [3, 0.25], [5, 0.35]], [[1, 0.02], [4, 0.05], [7, 0.12], [10, 0.30]])
    ]


@pytest.mark.parametrize("name", TABLE)
def test_changes_are_the_difference_of_the_tables(name):
    if not PARENTS[name]:
        assert params.changes(version(name)) == []
        return
    parent, own = values(PARENTS[name]), values(name)
    told = ("name", "about", "extends", "expected", "published")
    differing = {k for k in own if not k.startswith(told) and own[k] != parent.get(k)}
    found = params.changes(version(name))
    assert {k for k, _, _ in found} == differing != set()
    for key, theirs, ours in found:
        assert (as_tuples(theirs), as_tuples(ours)) == (parent.get(key), own[key])


def test_changes_show_overrides_too():
    assert ("epochs", 12, 3) in params.changes(version("v22", epochs=3))


# check_injected: papermill itself only warns of an unknown -p name

PARAMETERS = 'version = "v22"  # a version\nepochs = None\nseed = 0\noverrides = {}\n'


def test_known_injected_names_pass():
    check_injected(["", PARAMETERS])  # by hand: nothing injected
    check_injected(["", PARAMETERS, "import lvmlib"])
    check_injected(["", PARAMETERS, '# Parameters\nversion = "v21"\noverrides = {"optimizer": {"lr": 0.1}}\n', "x = 1"])


@pytest.mark.parametrize(
    "injected, name, near",
    [
        ('# Parameters\nverison = "v21"\n', "verison", "version"),
        ('# Parameters\nversion = "v21"\nepoch = 3\n', "epoch", "epochs"),
        ("# Parameters\nbogus_name_xyz = 3\n", "bogus_name_xyz", None),
    ],
)
def test_an_unknown_injected_name_is_refused(injected, name, near):
    message = refused(
        lambda: check_injected(["", PARAMETERS, injected, "x = 1"]),
        repr(name),
        "epochs",
        "overrides",
        "seed",
        "version",
    )
    assert (f"did you mean {near!r}" in message) if near else ("did you mean" not in message)


def test_names_assigned_after_the_injected_cell_are_no_parameters():
    refused(lambda: check_injected(["", PARAMETERS, "# Parameters\nresult = 3\n", "result = 1"]), "'result'")


# --- data: the original's files --------------------------------------------------------------------------------------

NPZ = {"train": "a/t.npz", "val": "a/v.npz", "ood": "a/o.npz"}


def test_data_may_name_the_original_files():
    own = version("v22", {"data": {**NPZ, "articles": "a/all.npz"}})
    assert own.data == params.Files(**NPZ, articles="a/all.npz")
    assert own.to_dict()["data"] == {**NPZ, "articles": "a/all.npz"}
    assert params.files(own.to_dict()["data"]) == own.data == params.files(own.data)
    assert version("v22", data=NPZ).data == params.Files(**NPZ)
    assert version("v22", data={"articles": "x.npz"}).data == params.Files(articles="x.npz")
    assert params.files("wikipedia") == "wikipedia"


@pytest.mark.parametrize(
    "data, name",
    [
        (params.Files(**NPZ, articles="a/all.npz"), "all"),
        (params.Files(**NPZ), "t"),
        ("../x/english.npz", "english"),
        ("folder/of/store/", "store"),
        ("world:copy", "world-copy"),
        ("wikipedia", "wikipedia"),
    ],
)
def test_the_name_of_a_dataset(data, name):
    assert params.data_name(data) == name


@pytest.mark.parametrize(
    "data, words",
    [
        ({"train": "t.npz"}, "all three"),
        ({}, "no file"),
        ({"train": None, "val": None, "ood": None}, "no file"),
        ({**NPZ, "artciles": "a.npz"}, "did you mean 'articles'"),
        ({**NPZ, "val": 3}, "needed is text"),
        (3.5, "needed is text"),
        (None, "needed is text"),
        (["a.npz"], "needed is text"),
    ],
)
def test_bad_data(data, words):
    with pytest.raises(LVMError, match=words):
        params.files(data)
    if data is not None:
        with pytest.raises(LVMError, match=words):
            version("v22", {"data": data})


def test_a_dataset_named_in_digits_is_a_name():
    """Papermill's -p makes a number of it."""
    assert version("v22", data=2024).data == "2024" == params.files(2024)
    with pytest.raises(LVMError, match="data"):
        version("v22", data=True)


# --- the rules with a memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, key, value, words",
    [
        ("share", "control.smoothing", 1.0, "below 1"),
        ("share", "control.smoothing", -0.1, "at least 0"),
        ("share", "schedule.rho_target", [], "rule gradient_share"),
        ("share", "schedule.rho_target", [[1, 0.0]], "above 0"),
        ("pi", "schedule.margin", [], "rule pi"),
        ("pi", "control.ki", 0.0, "ki above 0"),
        ("pi", "control.kp", -0.1, "kp 0 or more"),
        ("pi", "control.kp", 1.0, "never settles"),
        ("pi", "control.ki", 1.9, "never settles"),  # with kp 0.1
        ("pi", "control.measure", "loss", "value, gradient"),
        ("pi", "losses.mean_square", 0.0, "above 0"),
        ("pi", "control.constraint", {"measure": "cosine", "at_least": 0.4}, "null for the others"),
        ("bounded", "control.constraint", None, "for rule constrained"),
        ("bounded", "control.constraint", {"measure": "cosine", "at_least": 1.1}, "-1 to 1"),
        ("margin", "control.constraint", {"measure": "margin", "at_least": -2.1}, "-2 to 2"),
        ("margin", "control.constraint", {"measure": "margin", "at_least": 0.1, "against": []}, "-5 to -1"),
        ("margin", "control.constraint", {"measure": "margin", "at_least": 0.1, "against": [-1, -6]}, "-5 to -1"),
        ("margin", "control.constraint", {"measure": "margin", "at_least": 0.1, "against": [0]}, "-5 to -1"),
        ("rank", "losses.listwise.elsewhere", -1, "0 or more"),
        ("v22", "model", "two_heads", "a head would stay untrained"),
        ("two_heads", "losses.mean_square", 0.0, "a head would stay untrained"),
        ("two_heads", "losses.listwise.weight", 0.0, "a head would stay untrained"),
        ("committee", "losses.mean_square", 0.0, "a head would stay untrained"),
        ("v22", "optimizer.schedule", "linear", "plateau, cosine"),
        ("rank", "losses.listwise.candidates", 1, "at least 2"),
        ("bounded", "control.constraint", {"measure": "cosines", "at_least": 0.4}, "did you mean 'cosine'"),
        ("v22", "control.constraint", {"measure": "cosine"}, "missing"),
        ("bounded", "control.gate", {"low": 0.3, "width": 0.1}, "gate null"),
        ("bounded", "control.guard", "v21", "guard none"),
        ("bounded", "losses.directional.kind", "smooth", "control.rule"),
        ("v22", "control.rule", "constrained", "losses.directional.kind"),
    ],
)
def test_impossible_settings_of_the_rules_with_a_memory(name, key, value, words):
    listed = {"schedule": {"rho_cap": []}} if key == "schedule.rho_target" else {}
    overrides = params.merge(listed, nest(key, value))
    if key == "losses.mean_square":
        overrides = params.merge(overrides, {"losses": {"listwise": {"weight": 1.0}}})
    refused(lambda: version(name, overrides), f"params/{name}.yaml", words)


def test_our_versions_hold_what_they_say():
    v22, share, pi = version("v22"), version("share"), version("pi")
    assert share.losses == pi.losses == v22.losses and share.schedule.rho_target == v22.schedule.rho_target
    assert (share.control.rule, pi.control.rule, pi.control.measure) == ("gradient_share", "pi", "gradient")
    assert (version("bounded").control.constraint.measure, version("bounded").losses.mean_square) == ("cosine", 0)
    assert (version("margin").control.constraint.measure, version("margin").losses.mean_square) == ("margin", 1)
    assert version("margin").control.constraint.against == (-1, -2)  # the margins that the tables report
    assert (version("two_heads").model, version("two_heads").losses.mean_square) == ("two_heads", 1)
    assert (version("rank").model, version("rank").losses.mean_square) == ("bilinear", 0)


@pytest.mark.parametrize(
    "key, value",
    [("fall", 0.0), ("fall", 1.0), ("escape", 0.0), ("escape", 1.1), ("cool", 0.0), ("cool", 1.0), ("most", -1)],
)
def test_impossible_rewinds_are_refused(key, value):
    good = {"fall": 0.1, "escape": 0.3, "cool": 0.5, "most": 2}
    assert version("v22", {"rewind": good}).rewind == params.Rewind(**good)
    refused(lambda: version("v22", {"rewind": good | {key: value}}), "params/v22.yaml", f"rewind.{key}", "needed is")
    refused(lambda: version("v22", {"rewind": {k: v for k, v in good.items() if k != key}}), f"rewind.{key}", "missing")
