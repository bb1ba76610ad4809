"""The versions' values against handbook §3, typed here by hand; and that a bad parameter is named."""

import pytest
import yaml

from lvmlib import config, models
from lvmlib.config import flat, version
from lvmlib.errors import LVMError
from lvmlib.io import paths

# What every version shares: the handbook's "Common", §1 (P6 data) and the definition of prev.
COMMON = flat(
    yaml.safe_load("""
        {data: wikipedia, horizon: 2, context_length: 5, direction: forward, model: transformer, epochs: 12, seed: 0,
         select: val_loss, batch_size: 32, device: auto, precision: auto, log_every: 200, fast: false,
         optimizer: {lr: 5.0e-4, weight_decay: 0.01, decay: all, clip_norm: 1.0, schedule: plateau,
                     plateau_factor: 0.5, plateau_patience: 3},
         losses: {mean_square: 1.0, listwise: {weight: 0.0, temperature: 0.1, candidates: 128, elsewhere: 0},
                  energy: {weight: 0.0, samples: 8}, directional: {prev: -2}},
         control: {smoothing: 0.99, measure: value, kp: 0.0, ki: 0.1, constraint: null},
         rewind: null, trouble: go_on}""")
)
OURS = {"rank", "two_heads", "committee", "share", "pi", "bounded", "margin", "energy"}  # after the handbook's


def row(kind="none", gamma=None, lambdas=(None, None), rule="none", guard="none", floor=(0.0, 0.0), norm=0.0, orth=0.0,
        gate=None, margin=(), fraction=(), rho_target=(), rho_cap=(), alpha=None, margin_ratio=None):  # fmt: skip
    """A row of the handbook's table, as dotted keys; None: the version has no such quantity."""
    gates = {"control.gate": None} if gate is None else {"control.gate.low": gate[0], "control.gate.width": gate[1]}
    directional = dict(kind=kind, gamma=gamma, alpha=alpha, margin_ratio=margin_ratio)
    losses = dict(
        directional=directional, floor=dict(zip(("tau", "weight"), floor, strict=True)), norm=norm, orthogonality=orth
    )
    control = dict(rule=rule, guard=guard, lambda_min=lambdas[0], lambda_max=lambdas[1])
    schedule = dict(margin=margin, fraction=fraction, rho_target=rho_target, rho_cap=rho_cap)
    return gates | flat(dict(losses=losses, control=control, schedule=schedule))


NPZ = {"train": "a/t.npz", "val": "a/v.npz", "ood": "a/o.npz"}
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
    "v1": row("smooth", 8.0, (1e-4, 0.05), "fraction",
              margin=((1, 0.02), (3, 0.04), (6, 0.05)), fraction=((1, 0.10), (3, 0.20), (6, 0.25))),
    "v2": row("smooth", 4.0, (1e-4, 0.02), "fraction", "v2", **V2_STEPS),
    "v21": row(
        **SCALE_AWARE, lambdas=(1e-4, 0.02), rule="rho_cap", floor=(0.10, 1e-3), **V2_STEPS, rho_cap=((1, 0.25),)
    ),
    "v22": row(**V22),
    "v23": row(**V22 | dict(rho_target=((1, 0.02), (4, 0.05), (7, 0.12), (10, 0.30)))),
    "v23_unguarded": row(**V22 | dict(rule="fixed", rho_target=(), rho_cap=())),
    "v23_forward": row(**V22),
    "v23_confident": row(**V22 | dict(
        lambdas=(1e-4, 0.018), gate=(0.30, 0.15), floor=(0.10, 1e-3), orth=1e-4,
        margin=((1, 0.02), (5, 0.03), (8, 0.04)), rho_target=((1, 0.15), (5, 0.20), (8, 0.25)),
        rho_cap=((1, 0.30), (5, 0.35), (8, 0.40)))),
}  # fmt: skip
PARENTS = {"p6": "", "v1": "p6", "v2": "v1", "v21": "v2", "v22": "v21"} | dict.fromkeys(list(TABLE)[5:], "v22")
PUBLISHED = {  # margin, recall@5, validation cosine
    "p6": (-0.082, 0.70, None),
    "v21": (-0.047, 0.769, 0.488),
    "v23_confident": (-0.05, None, None),
}
BASE = yaml.safe_load((paths.PARAMS / "base.yaml").read_text(encoding="utf-8"))
NOT_SETTINGS = ("name", "about", "extends", "expected", "published")


def as_tuples(value):
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


def plain(nested):
    return {k: as_tuples(v) for k, v in flat(nested).items()}


def values(name, **top):
    return plain(version(name, **top).to_dict())


def refused(call, *words):
    """The message of the LVMError that `call` must raise, checked to hold each of the words."""
    with pytest.raises(LVMError) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
    return message


def nest(dotted, value):
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


# The family, value by value


def test_the_family_is_complete():
    assert set(config.known_versions()) == set(TABLE) | OURS


@pytest.mark.parametrize("name", TABLE)
def test_every_value_of_a_version(name):
    expected = COMMON | TABLE[name] | ({"data": "world:converging"} if name == "v23_forward" else {})
    own = values(name)
    assert {k for k in own if not k.startswith(NOT_SETTINGS)} == set(expected)  # no key goes unchecked
    assert {k: v for k, v in own.items() if expected.get(k) is not None} == {
        k: v for k, v in expected.items() if v is not None
    }
    assert own["name"] == name


@pytest.mark.parametrize("name", PARENTS)
def test_parents_and_published_results(name):
    v = version(name)
    assert v.extends == PARENTS[name]
    assert (v.published.margin, v.published.recall_at_5, v.published.val_cos) == PUBLISHED.get(name, (None,) * 3)
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


def test_our_versions():
    v22, share, pi, bounded, margin = (version(n) for n in ("v22", "share", "pi", "bounded", "margin"))
    assert share.losses == pi.losses == v22.losses and share.schedule.rho_target == v22.schedule.rho_target
    assert (share.control.rule, pi.control.rule, pi.control.measure) == ("gradient_share", "pi", "gradient")
    assert (bounded.control.constraint.measure, bounded.losses.mean_square) == ("cosine", 0)
    assert (margin.control.constraint.measure, margin.losses.mean_square) == ("margin", 1)
    assert margin.control.constraint.against == (-1, -2)  # the margins that the tables report
    assert (version("two_heads").model, version("two_heads").losses.mean_square) == ("two_heads", 1)
    assert (version("rank").model, version("rank").losses.mean_square) == ("bilinear", 0)


def test_the_models_with_samples_and_with_several_heads():
    assert [n for n, kind in models.ARCHITECTURES.items() if hasattr(kind, "samples")] == list(config.GENERATIVE)
    several = [n for n, kind in models.ARCHITECTURES.items() if kind.heads is not models.Predictor.heads]
    assert several == list(config.SEVERAL_HEADS)


# The files: small, explained, and saying only what differs


@pytest.mark.parametrize("name", [*TABLE, "base"])
def test_a_file_begins_with_one_comment_line(name):
    first, second = (paths.PARAMS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ") and len(first) > 20 and not second.startswith("#")
    assert name == "base" or version(name).about == first[2:]


@pytest.mark.parametrize("name", TABLE)
def test_a_file_says_only_what_differs(name):
    own = yaml.safe_load((paths.PARAMS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert own.pop("extends") == (PARENTS[name] or "base")
    parent = values(PARENTS[name]) if PARENTS[name] else plain(BASE)
    assert not {k for k, v in plain(own).items() if k in parent and parent[k] == v}


def test_base_lists_every_parameter():
    assert set(flat(BASE)) == set(values("p6")) - {"name", "about", "extends"}


@pytest.mark.parametrize("name", TABLE)
def test_to_dict_is_plain_and_survives_yaml(name):
    plain = version(name).to_dict()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert config.resolved(plain, "run.yaml") == version(name)
    assert [k for k in plain if k in BASE] == list(BASE)  # the order in which run.yaml lists them


def test_versions_are_frozen():
    with pytest.raises(AttributeError):
        version("v22").epochs = 3


# Overrides


def test_overrides_are_merged_deeply():
    before = values("v22")
    after = values("v22", overrides={"losses": {"floor": {"tau": 0.2}}, "optimizer": {"lr": 1e-3}}, epochs=3)
    changed = {k: after[k] for k in before if before[k] != after[k]}
    assert changed == {"losses.floor.tau": 0.2, "optimizer.lr": 1e-3, "epochs": 3}


def test_top_level_arguments_win_and_none_keeps():
    assert version("v22", {"epochs": 5}, epochs=7).epochs == 7
    assert version("v22", {"epochs": 5}, epochs=None).epochs == 5
    assert version("v22", {}, seed=0) == version("v22") == version("v22", None)


def test_lists_are_replaced_whole_and_a_gate_can_go():
    assert version("v22", {"schedule": {"rho_cap": [[1, 0.9]]}}).schedule.rho_cap == ((1, 0.9),)
    assert version("v23_confident", {"control": {"gate": None}}).control.gate is None
    assert version("v22", {"control": {"gate": {"low": 0.2, "width": 0.1}}}).control.gate == config.Gate(0.2, 0.1)


def test_merge_leaves_its_arguments_alone():
    base, over = {"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [9]}
    assert config.merge(base, over) == {"a": {"b": 1, "c": 3}, "d": [9]}
    assert (base, over) == ({"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [9]})


def test_whole_numbers_pass_as_floats():
    norm = version("v22", {"optimizer": {"clip_norm": 2}}).optimizer.clip_norm
    assert (norm, type(norm)) == (2.0, float)


def test_fast_mode_has_at_most_two_epochs():
    assert [version("v22", fast=True, epochs=e).epochs for e in (1, 2, 12)] == [1, 2, 2]


def test_the_oldest_context_vector_may_be_prev():
    assert version("v22", {"losses": {"directional": {"prev": -5}}}).losses.directional.prev == -5
    assert version("v22", {"losses": {"directional": {"prev": -7}}}, context_length=7).context_length == 7


def test_energy_with_its_model_and_selection():
    for select in ("val_loss", "novel_mrr", "val_energy"):
        assert version("energy", {"select": select}).select == select
    without = {"losses": {"energy": {"weight": 0.0}, "mean_square": 1.0}, "select": "val_loss"}
    assert version("energy", without, model="bilinear").model == "bilinear"


# Refusals: unknown names


@pytest.mark.parametrize("overrides", ["optimizer.lr=1", ["epochs"], 3, [("epochs", 3)], True])
def test_overrides_that_are_no_dict_are_refused(overrides):
    refused(lambda: version("v22", overrides), "overrides", repr(overrides))


@pytest.mark.parametrize("name", [22, None, "../x", "../params/v22", "base", "", "V22", "v22.yaml", 2.2, ["v22"]])
def test_an_unknown_version_lists_the_known(name):
    refused(lambda: version(name), f"unknown version {name!r}", *TABLE)


@pytest.mark.parametrize("name, near", [(22, "v22"), ("v22 ", "v22"), ("v23_confidnt", "v23_confident"), ("22", "v22")])
def test_an_unknown_version_names_the_nearest(name, near):
    refused(lambda: version(name), f"did you mean '{near}'")


@pytest.mark.parametrize(
    "key, value, near",
    [
        ("epoch", 3, "epochs"),
        ("optimiser", {"lr": 1e-3}, "optimizer"),
        ("optimizer.wieght_decay", 0.1, "weight_decay"),
        ("losses.floor.tua", 0.1, "tau"),
        ("schedule.rho_traget", [[1, 0.1]], "rho_target"),
        ("control.gate", {"low": 0.1, "widht": 0.1}, "width"),
        ("data", {**NPZ, "artciles": "a.npz"}, "articles"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, value, near):
    refused(lambda: version("v22", nest(key, value)), "params/v22.yaml with overrides", "unknown key", key, f"'{near}'")


@pytest.mark.parametrize("key", ["name", "about", "extends"])
def test_what_names_a_version_cannot_be_overridden(key):
    refused(lambda: version("v22", {key: "v21"}), "v22", repr(key))


# Refusals: wrong types and impossible values

NUMBERS = ["optimizer.lr", "losses.norm", "losses.floor.tau", "control.lambda_max"]
COUNTS = ["epochs", "seed", "batch_size", "horizon", "losses.directional.prev"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", ["1e-4", True, None, NAN, INF, -INF, [0.1], {"a": 1}, 1j, 10**400], ids=ascii)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_needed(key, value):
    message = refused(lambda: version("v22", nest(key, value)), "params/v22.yaml", key, repr(value))
    assert ("1.0e-4" in message) == isinstance(value, str)  # YAML 1.1 reads 1e-4 as text


@pytest.mark.parametrize("value", ["3", 3.0, True, [3], {"a": 1}, NAN, INF, 2**63], ids=ascii)
@pytest.mark.parametrize("key", COUNTS)
def test_a_whole_number_is_needed(key, value):
    refused(lambda: version("v22", nest(key, value)), "params/v22.yaml", key, repr(value))


def test_a_number_too_long_to_be_written_is_refused():
    refused(lambda: version("v22", seed=10**5000), "params/v22.yaml", "seed")


NOT_STEPS = [0.05, {1: 0.05}, "0.05", [0.02], [[1, 0.02, 3]], [[1, 0.02], [3]], [[1, "0.02"]], [], [[1.0, 0.02]]]
NOT_STEPS += [[[True, 0.02]], [[2, 0.1]], [[0, 0.1]], [[1, 0.1], [1, 0.2]]]
REFUSED = flat(  # by v22
    yaml.safe_load("""
        {epochs: [null, 0, -1], batch_size: [0], horizon: [0], log_every: [0], seed: [-1], context_length: [1],
         fast: [1, "true"], data: [3.5, [a.npz], true], device: [null], precision: [float16], select: [val_energy],
         model: [transfomer, 3, [gru], two_heads, gated, committee], trouble: [halt, rewind, 3, {escape: stop}],
         optimizer: {lr: [0, -0.1], clip_norm: [0], weight_decay: [-0.1], plateau_factor: [0, 1],
                     plateau_patience: [-1], schedule: [linear]},
         losses: {floor: {tau: [1.5, -2], weight: [-0.1]}, norm: [-0.1], orthogonality: [-1],
                  directional: {kind: [true], prev: [0, 2, -6], gamma: [0, -4], alpha: [1.1, -1], margin_ratio: [2]}},
         control: {rule: [rho, none, constrained], guard: [null], gate: {width: [0]}, lambda_min: [0, -0.1, 0.5]},
         rewind: {fall: [0, 1.0], escape: [0, 1.1], cool: [0, 1.0], most: [-1]}, expected: [[3]]}""")
) | {
    "schedule.margin": [*NOT_STEPS, [[1, 2.5]]],
    "schedule.rho_target": [*NOT_STEPS, [[1, 0.1], [5, 0.2], [3, 0.3]], [[1, -0.1]]],
    "schedule.rho_cap": [*NOT_STEPS, [[1, -1.0]], [[1, 0.4], [3, 0.2]]],  # below 0, and below the target of epoch 3
}
REST = {  # what a group needs besides the key that is wrong
    "rewind.": {"rewind": {"fall": 0.1, "escape": 0.3, "cool": 0.5, "most": 2}},
    "control.gate.": {"control": {"gate": {"low": 0.3, "width": 0.1}}},
}


@pytest.mark.parametrize("key", REFUSED)
def test_wrong_values_are_refused(key):
    rest = next((rest for prefix, rest in REST.items() if key.startswith(prefix)), {})
    assert version("v22", rest)
    for value in REFUSED[key]:
        refused(
            lambda value=value: version("v22", config.merge(rest, nest(key, value))),
            "params/v22.yaml with overrides: ",
            key,
        )


GATE = {"low": 0.3, "width": 0.1}
COSINE = {"measure": "cosine", "at_least": 0.4}
SELF = "the key itself"
CONTRADICTIONS = [
    ("v22", "optimizer", [[5e-4], None], SELF),
    ("v22", "losses.floor", [0.1], SELF),
    ("v22", "control.gate", [0.3], SELF),
    ("v22", "losses.directional.kind", ["none"], "control.rule"),
    ("v22", "control.lambda_max", [1e-5], "control.lambda_min"),
    ("v22", "control.gate", [{"low": 0.1}], "key 'control.gate.width'"),
    ("v22", "rewind", [{"fall": 0.1, "escape": 0.3, "cool": 0.5}], "key 'rewind.most'"),
    ("v22", "control.constraint", [{"measure": "cosine"}], "key 'control.constraint.at_least'"),
    ("v1", "schedule.fraction", [[]], SELF),
    ("v1", "schedule.margin", [[]], SELF),
    ("v21", "schedule.rho_cap", [[]], SELF),
    ("v21", "schedule.fraction", [[]], SELF),
    ("v23_unguarded", "schedule.margin", [[]], SELF),
    ("energy", "model", ["transformer", "bilinear"], SELF),
    ("rank", "losses.listwise.elsewhere", [-1], SELF),
    ("rank", "losses.listwise.candidates", [1], SELF),
    ("rank", "losses.listwise.weight", [0], "losses.mean_square"),
    ("two_heads", "losses.listwise.weight", [0.0], "model"),
    ("committee", "losses.mean_square", [0.0], "model"),
    ("share", "control.smoothing", [1.0, -0.1], SELF),
    ("share", "schedule", [{"rho_target": t, "rho_cap": []} for t in ([], [[1, 0.0]])], "schedule.rho_target"),
    ("pi", "schedule.margin", [[]], SELF),
    ("pi", "control.ki", [0.0], SELF),
    ("pi", "control.kp", [-0.1], SELF),
    ("pi", "control.kp", [1.0], "control is (1.0, "),
    ("pi", "control.ki", [1.9], "control is (0.1, 1.9)"),
    ("pi", "control.measure", ["loss"], SELF),
    ("pi", "losses", [{"mean_square": 0.0, "listwise": {"weight": 1.0}}], "losses.mean_square"),
    ("pi", "control.constraint", [COSINE], SELF),
    ("bounded", "control.constraint", [None], SELF),
    ("bounded", "control.constraint.at_least", [1.1], SELF),
    ("bounded", "control.constraint.measure", ["cosines"], SELF),
    ("margin", "control.constraint.at_least", [-2.1], SELF),
    ("margin", "control.constraint.against", [[], [-1, -6], [0]], SELF),
    ("bounded", "control.gate", [GATE], "control is ("),
    ("bounded", "control.guard", ["v21"], "control is ("),
    ("bounded", "losses.directional.kind", ["smooth"], "control.rule"),
]


@pytest.mark.parametrize("name, key, values, named", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused(name, key, values, named):
    for value in values:
        place = f"params/{name}.yaml with overrides: {key if named is SELF else named}"
        refused(lambda value=value: version(name, nest(key, value)), place)


# Files that extend each other, and damaged ones


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An own params folder: write(NAME=text, …)."""
    place = tmp_path / "params"
    place.mkdir()
    monkeypatch.setattr(config, "PARAMS", place)

    def write(**files):
        for name, text in files.items():
            (place / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())

    base = config.merge(BASE, {"epochs": 4, "optimizer": {"lr": 1.0e-3, "clip_norm": 2.0}})
    write(base="# Base.\n" + yaml.safe_dump(base))
    return write


def test_extends_merges_deeply_through_every_level(folder):
    folder(a="# A.\nextends: base\noptimizer: {lr: 2.0e-3}", b="# B.\nextends: a\noptimizer: {weight_decay: 0.5}")
    v = version("b")
    assert (v.optimizer.lr, v.optimizer.weight_decay, v.optimizer.clip_norm, v.epochs) == (2e-3, 0.5, 2.0, 4)
    assert (v.about, v.extends, version("a").extends) == ("B.", "a", "")
    assert config.known_versions() == ["a", "b"]


def test_a_file_without_extends_extends_base(folder):
    folder(a="# A.\nseed: 3")
    assert (version("a").epochs, version("a").seed) == (4, 3)


@pytest.mark.parametrize(
    "files",
    [
        {"a": "extends: a"},
        {"a": "extends: b", "b": "extends: a"},
        {"a": "extends: b", "b": "extends: c", "c": "extends: b"},
    ],
)
def test_circular_extends_are_refused(folder, files):
    folder(**files)
    refused(lambda: version("a"), "params/", "→")


def test_a_base_that_extends_or_is_missing_is_named(folder):
    folder(a="extends: base", base="extends: a")
    refused(lambda: version("a"), "params/base.yaml", "extends")
    (config.PARAMS / "base.yaml").unlink()
    refused(lambda: version("a"), "params/base.yaml", "read")


@pytest.mark.parametrize(
    "text, words",
    [
        *((text, "YAML") for text in ("a: [1, 2", "a: b: c", "\tepochs: 3", b"\xff\xfe\x00epochs")),
        ("seed: 3\nseed: 4", "twice"),
        ("- 1\n- 2", "list"),
        ("[]", "list"),
        ("just text", "str"),
        ("3", "int"),
        ("0", "int"),
        ("false", "bool"),
        *((f"extends: {name}", f"unknown version {name}") for name in ("'other'", "''", "5", "['a']", "'../base'")),
        ("epochs: 1e1", "epochs is '1e1'"),
        ("optimizer: {lr: 1e-4}", "optimizer.lr is '1e-4'"),
        ("epochs: yes", "epochs is True"),
        ("optimizer:", "optimizer is None"),
        ("losses: {floor: {tau: .nan}}", "losses.floor.tau is nan"),
        ("1: 2", "unknown key '1'"),
        ("rho_traget: 2", "unknown key 'rho_traget'"),
        ("losses: {flor: {tau: 0.1}}", "unknown key 'losses.flor' (did you mean 'floor'"),
        ("name: other", "'name'"),
    ],
)
def test_damaged_files_are_named(folder, text, words):
    folder(bad=text)
    refused(lambda: version("bad"), "params/bad.yaml", words)


# changes: what the first table of the notebook shows


@pytest.mark.parametrize("name", TABLE)
def test_changes_are_the_difference_of_the_tables(name):
    changes = config.changes(version(name))
    if not PARENTS[name]:
        assert changes == []
        return
    parent, own = values(PARENTS[name]), values(name)
    differing = {k for k in own if not k.startswith(NOT_SETTINGS) and own[k] != parent.get(k)}
    assert {k for k, _, _ in changes} == differing != set()
    for key, theirs, ours in changes:
        assert (as_tuples(theirs), as_tuples(ours)) == (parent.get(key), own[key])


def test_changes_show_overrides_too():
    assert ("epochs", 12, 3) in config.changes(version("v22", epochs=3))


# data: a name, or the original's files


def test_data_may_name_the_original_files():
    own = version("v22", {"data": {**NPZ, "articles": "a/all.npz"}})
    assert own.data == config.Files(**NPZ, articles="a/all.npz")
    assert own.to_dict()["data"] == {**NPZ, "articles": "a/all.npz"}
    assert config.files(own.to_dict()["data"]) == own.data == config.files(own.data)
    assert version("v22", data=NPZ).data == config.Files(**NPZ)
    assert version("v22", data={"articles": "x.npz"}).data == config.Files(articles="x.npz")
    assert config.files("wikipedia") == "wikipedia"
    assert version("v22", data=2024).data == "2024" == config.files(2024)  # papermill's -p makes a number of digits


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
