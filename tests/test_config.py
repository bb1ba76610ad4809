"""How a version is built from its file and overrides; and that a bad parameter is named."""

import shutil

import pytest
import yaml

from lvmlib import config
from lvmlib.config import flat, version
from lvmlib.controller import Gate
from lvmlib.errors import LVMError
from lvmlib.io import paths

GATE = {"low": 0.3, "width": 0.1}
NPZ = {"train": "a/t.npz", "val": "a/v.npz", "ood": "a/o.npz"}
BASE = yaml.safe_load((paths.PARAMS / "base.yaml").read_text(encoding="utf-8"))


def values(*args, **top):
    return flat(version(*args, **top).to_dict())


def refused(call, *words):
    """Check that `call` raises an LVMError whose message holds each of the words."""
    with pytest.raises(LVMError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def nest(dotted, value):
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


# Versions


@pytest.mark.parametrize("name", config.known_versions())
def test_to_dict_is_plain_and_survives_yaml(name):
    plain = version(name).to_dict()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert config.resolved(plain, "run.yaml") == version(name)
    assert [k for k in plain if k in BASE] == list(BASE)  # the order in which run.yaml lists them


def test_versions_are_frozen():
    with pytest.raises(AttributeError):
        version("v22").epochs = 3


# Overrides


@pytest.mark.parametrize(
    "name, overrides, top, changed",
    [
        ("v22", {"losses": {"floor": {"tau": 0.2}}}, {"epochs": 3}, {"losses.floor.tau": 0.2, "epochs": 3}),
        ("v22", {"epochs": 5}, {"epochs": 7}, {"epochs": 7}),  # arguments win
        ("v22", {"epochs": 5}, {"epochs": None}, {"epochs": 5}),  # None keeps
        ("v22", None, {"seed": 0}, {}),
        ("v22", {"schedule": {"rho_cap": [[1, 0.9]]}}, {}, {"schedule.rho_cap": [[1, 0.9]]}),  # lists whole
        ("v22", {"optimizer": {"clip_norm": 2}}, {}, {"optimizer.clip_norm": 2.0}),  # a whole number for a float
        ("v22", {"losses": {"directional": {"prev": -5}}}, {}, {"losses.directional.prev": -5}),  # the oldest
        ("v22", None, {"fast": True}, {"fast": True, "epochs": 2}),
        ("v22", None, {"fast": True, "epochs": 1}, {"fast": True, "epochs": 1}),
        ("v22", None, {"data": 2024}, {"data": "2024"}),  # papermill's -p makes a number of digits
        ("energy", {"select": "novel_mrr"}, {}, {"select": "novel_mrr"}),
    ],
)
def test_overrides_are_merged_deeply(name, overrides, top, changed):
    before, after = values(name), values(name, overrides, **top)
    assert {k: x for k, x in after.items() if before.get(k, ...) != x} == changed


def test_overrides_that_change_a_whole_group():
    assert version("v23_confident", {"control": {"gate": None}}).control.gate is None
    assert version("v22", {"control": {"gate": GATE}}).control.gate == Gate(**GATE)
    without = {"losses": {"energy": {"weight": 0.0}, "mean_square": 1.0}, "select": "val_loss"}
    assert version("energy", without, model="bilinear").model == "bilinear"
    assert type(version("v22", {"optimizer": {"clip_norm": 2}}).optimizer.clip_norm) is float
    assert ("epochs", 12, 3) in config.changes(version("v22", epochs=3))


# Refusals: unknown names


UNKNOWN = {22: "v22", "22": "v22", "v22 ": "v22", "v23_confidnt": "v23_confident", "v22.yaml": "v22"}


@pytest.mark.parametrize("name", [*UNKNOWN, None, "V22", "../params/v22", "base", "", ["v22"]], ids=repr)
def test_an_unknown_version_lists_the_known_and_names_the_nearest(name):
    near = UNKNOWN.get(name) if isinstance(name, str | int) else None
    refused(lambda: version(name), repr(name), *config.known_versions(), f"'{near}'?" if near else "")


@pytest.mark.parametrize(
    "key, value, near",
    [
        ("optimiser", {"lr": 1e-3}, "optimizer"),
        ("optimizer.wieght_decay", 0.1, "weight_decay"),
        ("losses.floor.tua", 0.1, "tau"),
        ("schedule.rho_traget", [[1, 0.1]], "rho_target"),
        ("control.gate", {"low": 0.1, "widht": 0.1}, "width"),
        ("data", {**NPZ, "artciles": "a.npz"}, "articles"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, value, near):
    refused(lambda: version("v22", nest(key, value)), "params/v22.yaml with overrides", key, f"'{near}'?")


@pytest.mark.parametrize(
    "overrides, named",
    [
        ("optimizer.lr=1", "'optimizer.lr=1'"),
        ([3], "[3]"),
        *(({k: "v21"}, f"'{k}'") for k in ("name", "about", "extends")),
    ],
)
def test_overrides_that_are_no_dict_or_name_a_version_are_refused(overrides, named):
    refused(lambda: version("v22", overrides), "overrides: ", named)


# Refusals: wrong types and impossible values

NOT_STEPS = [0.05, {1: 0.05}, "0.05", [0.02], [[1, 0.02, 3]], [[1, 0.02], [3]], [[1, "0.02"]], [], [[1.0, 0.02]]]
NOT_STEPS += [[[True, 0.02]], [[2, 0.1]], [[0, 0.1]], [[1, 0.1], [1, 0.2]]]
NOT_STEPS += [[[1, 0.1], [5, 0.2], [3, 0.3]]]
REFUSED = yaml.safe_load("""
    v22:
        {epochs: [null, 0, -1, "3", 3.0, true, [3], {a: 1}, .nan, .inf, 9223372036854775808],
         batch_size: [0, true], horizon: [0, 1.0], log_every: [0], seed: [-1, true, 0.0], context_length: [1],
         fast: [1, "true"], data: [3.5, [a.npz], true], device: [null], precision: [float16], select: [val_energy],
         model: [transfomer, 3, [gru], two_heads, gated, committee], trouble: [halt, rewind, 3, {escape: stop}],
         optimizer: {lr: [0, -0.1, "1e-4", true, null, .nan, .inf, -.inf, [0.1], {a: 1}], clip_norm: [0],
                     weight_decay: [-0.1], plateau_factor: [0, 1], plateau_patience: [-1], schedule: [linear]},
         losses: {floor: {tau: [1.5, -2, "0.1", true], weight: [-0.1, .inf]}, norm: [-0.1, .nan], orthogonality: [-1],
                  directional: {kind: [true], prev: [0, 2, -6, -2.0], gamma: [0, -4], alpha: [1.1, -1],
                                margin_ratio: [2]}},
         control: {rule: [rho, none, constrained], guard: [null], gate: {width: [0]}, lambda_min: [0, -0.1, 0.5]},
         schedule: {margin: [[[1, 2.5]]], rho_target: [[[1, -0.1]]], rho_cap: [[[1, -1.0]], [[1, 0.4], [3, 0.2]]]},
         rewind: {fall: [0, 1.0], escape: [0, 1.1], cool: [0, 1.0], most: [-1]}, expected: [[3]]}
    v1: {schedule: {fraction: [[]], margin: [[]]}}
    v21: {optimizer: [[5.0e-4], null], losses.floor: [0.1], control.gate: [0.3],
          schedule: {rho_cap: [[]], fraction: [[]]}}
    v23_unguarded: {schedule: {margin: [[]]}}
    energy: {model: [transformer, bilinear]}
    rank: {losses.listwise: {elsewhere: [-1], candidates: [1]}}
    share: {control.smoothing: [1.0, -0.1]}
    pi: {schedule.margin: [[]],
         control: {ki: [0.0], kp: [-0.1], measure: [loss], constraint: [{measure: cosine, at_least: 0.4}]}}
    bounded: {control.constraint: [null], control.constraint.at_least: [1.1], control.constraint.measure: [cosines]}
    margin: {control.constraint: {at_least: [-2.1], against: [[], [-1, -6], [0]]}}
""")
for name in ("margin", "rho_target", "rho_cap"):
    REFUSED["v22"]["schedule"][name] += NOT_STEPS
REST = {  # what a group needs besides the key that is wrong
    "rewind.": {"rewind": {"fall": 0.1, "escape": 0.3, "cool": 0.5, "most": 2}},
    "control.gate.": {"control": {"gate": GATE}},
}


@pytest.mark.parametrize("name, key", [(name, key) for name, keys in REFUSED.items() for key in flat(keys)])
def test_wrong_values_are_refused(name, key):
    rest = next((rest for prefix, rest in REST.items() if key.startswith(prefix)), {})
    assert version(name, rest)
    for value in flat(REFUSED[name])[key]:
        wrong = config.merge(rest, nest(key, value))
        refused(lambda wrong=wrong: version(name, wrong), f"params/{name}.yaml with overrides: ", key)


def test_numbers_that_cannot_be_are_shown():
    for key in ("optimizer.lr", "epochs"):
        for value in (1j, 10**400, "1e-4"):
            refused(lambda key=key, value=value: version("v22", nest(key, value)), key, repr(value))
        refused(lambda key=key: version("v22", nest(key, 10**5000)), key)  # a number too long to be written
    refused(lambda: version("v22", nest("optimizer.lr", "1e-4")), "1.0e-4")  # YAML 1.1 reads 1e-4 as text


CONTRADICTIONS = [
    ("v22", "losses.directional.kind", "none", "control.rule"),
    ("v22", "control.lambda_max", 1e-5, "control.lambda_min"),
    ("v22", "control.gate", {"low": 0.1}, "key 'control.gate.width'"),
    ("v22", "rewind", {"fall": 0.1, "escape": 0.3, "cool": 0.5}, "key 'rewind.most'"),
    ("v22", "control.constraint", {"measure": "cosine"}, "key 'control.constraint.at_least'"),
    ("rank", "losses.listwise.weight", 0, "losses.mean_square"),
    ("two_heads", "losses.listwise.weight", 0.0, "model"),
    ("committee", "losses.mean_square", 0.0, "model"),
    ("share", "schedule", {"rho_target": [], "rho_cap": []}, "schedule.rho_target"),
    ("share", "schedule", {"rho_target": [[1, 0.0]], "rho_cap": []}, "schedule.rho_target"),
    ("pi", "control.kp", 1.0, "control is (1.0, "),
    ("pi", "control.ki", 1.9, "control is (0.1, 1.9)"),
    ("pi", "losses", {"mean_square": 0.0, "listwise": {"weight": 1.0}}, "losses.mean_square"),
    ("bounded", "control.gate", GATE, "control is ("),
    ("bounded", "control.guard", "v21", "control is ("),
    ("bounded", "losses.directional.kind", "smooth", "control.rule"),
]


@pytest.mark.parametrize("name, key, value, named", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused(name, key, value, named):
    refused(lambda: version(name, nest(key, value)), f"params/{name}.yaml with overrides: {named}")


# Mistakes in a file


@pytest.mark.parametrize(
    "text, words",
    [
        ("epochs: 1e1", "epochs is '1e1'"),
        ("epochs: yes", "epochs is True"),
        ("optimizer:", "optimizer is None"),
        ("losses: {floor: {tau: .nan}}", "losses.floor.tau is nan"),
        ("1: 2", "unknown key '1'"),
        ("losses: {flor: {tau: 0.1}}", "unknown key 'losses.flor' (did you mean 'floor'"),
        ("name: other", "'name'"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, monkeypatch, text, words):
    folder = tmp_path / "params"
    shutil.copytree(paths.PARAMS, folder)
    (folder / "bad.yaml").write_text(text)
    monkeypatch.setattr(config, "PARAMS", folder)
    refused(lambda: version("bad"), "params/bad.yaml: ", words)


# data: a name, or the original's files


@pytest.mark.parametrize("data", [NPZ, {**NPZ, "articles": "a/all.npz"}, {"articles": "x.npz"}])
def test_data_may_name_the_original_files(data):
    own = version("v22", {"data": data})
    assert own.data == config.Files(**data) == version("v22", data=data).data
    assert config.files(data) == config.files(own.data) == config.files(own.to_dict()["data"]) == own.data
    assert (config.files("wikipedia"), config.files(2024)) == ("wikipedia", "2024")


@pytest.mark.parametrize(
    "data, name",
    [
        (config.Files(**NPZ, articles="a/all.npz"), "all"),
        (config.Files(**NPZ), "t"),
        ("../x/english.npz", "english"),
        ("folder/of/store/", "store"),
        ("world:copy", "world-copy"),
        ("wikipedia", "wikipedia"),
    ],
)
def test_the_name_of_a_dataset(data, name):
    assert config.data_name(data) == name


@pytest.mark.parametrize("data", ["", "/", "a/.b", "..", "a*b", "a\nb", "$x", "é" * 101])
def test_a_dataset_whose_name_is_no_folder(data):
    refused(lambda: config.data_name(data), "data")


@pytest.mark.parametrize(
    "data, words",
    [
        ({"train": "t.npz"}, "train"),
        ({}, "no file"),
        ({"train": None, "val": None, "ood": None}, "no file"),
        ({**NPZ, "artciles": "a.npz"}, "did you mean 'articles'"),
        ({**NPZ, "val": 3}, "val is 3"),
        (3.5, "3.5"),
        (None, "None"),
    ],
)
def test_bad_data(data, words):
    refused(lambda: config.files(data), "data", words)
    if data is not None:
        refused(lambda: version("v22", {"data": data}), "params/v22.yaml", words)
