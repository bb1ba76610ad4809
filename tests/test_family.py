"""The values of all versions against handbook §3, typed here by hand; and their files."""

from dataclasses import replace

import pytest
import yaml

from lvmlib import config
from lvmlib.config import flat, version
from lvmlib.io import paths

# What every version shares: the handbook's "Common", §1 (P6 data) and the definition of prev.
COMMON = flat(
    yaml.safe_load("""
        {data: wikipedia, horizon: 2, context_length: 5, direction: forward, model: transformer, epochs: 12, seed: 0,
         select: val_unit_loss, copied_layers: true, corruption: {share: 0.15, swap: 0.05, jitter: 0.03},
         batch_size: 32, device: auto, precision: auto, log_every: 200, fast: false,
         optimizer: {lr: 5.0e-4, weight_decay: 0.01, decay: all, clip_norm: 1.0, schedule: plateau,
                     plateau_factor: 0.5, plateau_patience: 3},
         losses: {mean_square: 1.0, listwise: {weight: 0.0, temperature: 0.1, candidates: 128, elsewhere: 0},
                  energy: {weight: 0.0, samples: 8}, directional: {prev: -2}, norm_of: unit},
         control: {smoothing: 0.99, measure: value, kp: 0.0, ki: 0.1, constraint: null},
         rewind: null, trouble: go_on}""")
)
OURS = {"rank", "two_heads", "committee", "share", "pi", "bounded", "margin", "energy"}  # after the handbook's
LATER = {"p7", "p8"}  # handbook §5


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
    "v22": (-0.004, None, 0.202),
    "v23_confident": (-0.05, None, None),
}
FULL = {  # validation, OOD: cosine at the target, margin read late, recall@5
    "v1": ((None, 0.491), (-0.043, -0.049), (None, 0.068)),
    "v21": ((0.501, 0.511), (-0.067, -0.077), (0.128, 0.081)),
    "v22": ((0.449, 0.466), (-0.029, -0.035), (0.120, 0.067)),
    "v23_confident": ((0.490, 0.503), (-0.058, -0.068), (0.129, 0.076)),
}
BASE = yaml.safe_load((paths.PARAMS / "base.yaml").read_text(encoding="utf-8"))
NOT_SETTINGS = ("name", "about", "extends", "expected", "published")


def as_tuples(value):
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


def plain(nested):
    return {k: as_tuples(v) for k, v in flat(nested).items()}


def values(name):
    return plain(version(name).to_dict())


def test_the_family_is_complete():
    assert set(config.known_versions()) == set(TABLE) | OURS | LATER


@pytest.mark.parametrize("name", TABLE)
def test_every_value_parent_and_published_result_of_a_version(name):
    expected = COMMON | TABLE[name] | ({"data": "world:converging"} if name == "v23_forward" else {})
    v, own = version(name), values(name)
    assert {k for k in own if not k.startswith(NOT_SETTINGS)} == set(expected)  # no key goes unchecked
    wanted = {k: v for k, v in expected.items() if v is not None}
    assert {k: own[k] for k in wanted} == wanted
    assert (v.name, v.extends) == (name, PARENTS[name])
    assert (v.published.margin, v.published.recall_at_5, v.published.val_cos) == PUBLISHED.get(name, (None,) * 3)
    full = v.published.full
    assert (full and (full["cosine"], full["margin_late"], full["recall_at_5"])) == FULL.get(name)


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
    assert (
        share.losses == pi.losses == replace(v22.losses, norm_of="raw")
        and share.schedule.rho_target == v22.schedule.rho_target
    )
    assert (share.control.rule, pi.control.rule, pi.control.measure) == ("gradient_share", "pi", "gradient")
    assert (bounded.control.constraint.measure, bounded.losses.mean_square) == ("cosine", 0)
    assert (margin.control.constraint.measure, margin.losses.mean_square) == ("margin", 1)
    assert margin.control.constraint.against == (-1, -2)  # the margins that the tables report
    assert (version("two_heads").model, version("two_heads").losses.mean_square) == ("two_heads", 1)
    assert (version("rank").model, version("rank").losses.mean_square) == ("bilinear", 0)


# The files: small, explained, and saying only what differs


@pytest.mark.parametrize("name", TABLE)
def test_a_file_begins_with_one_comment_line_and_says_only_what_differs(name):
    text = (paths.PARAMS / f"{name}.yaml").read_text(encoding="utf-8")
    first, second = text.splitlines()[:2]
    assert first == f"# {version(name).about}" and len(first) > 20 and not second.startswith("#")
    own, parent = plain(yaml.safe_load(text)), values(PARENTS[name]) if PARENTS[name] else plain(BASE)
    assert own.pop("extends") == (PARENTS[name] or "base")
    assert not own.items() & parent.items()


def test_base_lists_every_parameter():
    assert set(flat(BASE)) == set(values("p6")) - {"name", "about", "extends"}


@pytest.mark.parametrize("name", TABLE)
def test_changes_are_the_difference_of_the_tables(name):
    changes = config.changes(version(name))
    if not PARENTS[name]:
        assert {k for k, _, _ in changes} == {"copied_layers", "select", "corruption.share", "losses.norm_of"}
        return
    parent, own = values(PARENTS[name]), values(name)
    differing = {k: (parent.get(k), x) for k, x in own.items() if not k.startswith(NOT_SETTINGS) and parent.get(k) != x}
    assert {key: (as_tuples(theirs), as_tuples(ours)) for key, theirs, ours in changes} == differing != {}
