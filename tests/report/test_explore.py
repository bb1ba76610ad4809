"""What explore.ipynb moves by hand: tricks, a replayed rule, a window in texts; and the notebook with its sliders."""

import functools
import json
import re
from dataclasses import replace

import ipywidgets as widgets
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from toys import DIM, finish, make_data, version

import lvmlib as lvm
from lvmlib import evaluate, losses
from lvmlib.baselines import baselines
from lvmlib.io.paths import ROOT
from lvmlib.judge import health
from lvmlib.report import explore, readout

T = 5
NOTEBOOK = ROOT / "notebooks" / "explore.ipynb"
FREE = {"control": {"guard": "none"}}


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def recorded(data, tmp_path_factory):
    """recorded(name, overrides, …): version, steps, epochs of a finished run, read back from its folder."""

    @functools.cache
    def train(name, overrides="{}", epochs=3, log_every=1):
        own = version(name, overrides=json.loads(overrides), epochs=epochs, batch_size=8, log_every=log_every)
        run = finish(lvm.train(own, data, tmp_path_factory.mktemp("run") / "run"))
        _, history, steps = lvm.open_run(run.folder)
        return own, steps, history

    return lambda name, overrides=None, **more: train(name, json.dumps(overrides or {}), **more)


# Tricks


def test_the_tricks_are_what_their_names_say():
    torch.manual_seed(0)
    x, a = torch.nn.functional.normalize(torch.randn(7, T, DIM), dim=-1), 0.37
    components = torch.linalg.qr(torch.randn(DIM, 4))[0].T
    mean, last, before = x.mean(1), x[:, -1], x[:, -2]
    leading = mean @ components.T @ components
    wanted = {
        "mean − a·context[-2]": mean - a * before,
        "mean − a·context[-1]": mean - a * last,
        "residual flip": leading - a * (mean - leading),
        "mean − a·both": mean - a * last - a * before,
        "last + a·(last − context[-2])": last + a * (last - before),
        "mean + a·(last − mean)": mean + a * (last - mean),
    }
    found = explore.all_tricks(DIM, T, a, components)
    assert list(found) == list(wanted)
    for name, predictor in found.items():
        assert torch.allclose(predictor(x)[0], wanted[name], atol=1e-6), name


def test_a_point_of_a_curve_is_what_5cat_says_of_that_predictor(data):
    components = health.leading_components(data.store, torch.from_numpy(data.store.vectors), 4)
    curve = explore.curves(data.val, [0.0, 0.5], components)
    assert len(curve) == 12 and (curve["strength"] == 0.5).sum() == 6
    names = {"val_cos": "cosine at the target"} | {k: v for k, v in explore.FIGURES.items() if k != "val_cos"}
    for row in curve[curve["strength"] == 0.5].to_dict("records"):
        predictor = explore.all_tricks(DIM, T, 0.5, components)[row["trick"]]
        report = lvm.fivecat(predictor, {"val": data.val})
        for column, name in names.items():
            own = report.original if column in ("margin", "of_six") else report
            assert row[column] == own.value("margin" if column == "margin" else name), (row["trick"], column)
        context, target = data.val.batch(np.arange(len(data.val)))
        share = losses.health(predictor(context)[1], target, context, -2)["escape"]
        assert row["escape"] == pytest.approx(float(share), abs=1e-4)
        assert row["named"] == report.facts["val", "model"]["escape"]


# The rule on a recorded run

OWN = {name: {} for name in ("v2", "v21", "v22", "v23_unguarded", "margin", "p6")}
OWN["v23_confident"] = {"control": {"gate": {"low": -0.2, "width": 0.3}}}  # half open on these data
OWN["pi"] = {"control": {"measure": "value", "guard": "none"}}
GRADIENT = {"rewind": None, "control": {"guard": "none", "lambda_max": 10.0}}


@pytest.mark.parametrize(
    ("name", "overrides", "error"),
    [*((n, o, 0) for n, o in OWN.items()), *((n, GRADIENT, 1e-12) for n in ("share", "pi"))],
)
def test_a_runs_own_rule_gives_the_recorded_lambda(name, overrides, error, recorded):
    """To the last bit, if it reads values; to rounding, if it reads gradients."""
    version, steps, epochs = recorded(name, overrides)
    again = explore.replay(version, steps, epochs)
    assert explore.is_exact(version.control, steps) and again["step"].tolist() == steps["step"].tolist()
    for column in ("lambda_eff", "rho", "skip"):
        assert again[column].tolist() == pytest.approx(steps[column].tolist(), rel=error, abs=0), column
    varies = steps["lambda_eff"].nunique() > 2 and steps["lambda_eff"].max() < 10
    assert varies == (name not in ("p6", "v23_unguarded"))


@pytest.mark.parametrize(
    "name, control", [("pi", {"lambda_max": 10.0, "guard": "none", "ki": 0.05}), ("v23_unguarded", {"guard": "none"})]
)
def test_after_a_rewind_the_rule_goes_on_as_in_training(name, control, recorded, monkeypatch):
    """With the lower ceiling, and for pi with the state of the epoch gone back to."""
    scores, real = iter([0.20, 0.30, 0.10, 0.29, 0.1, 0.28]), evaluate.validate
    monkeypatch.setattr(evaluate, "validate", lambda *a, **k: real(*a, **k) | {"novel_mrr": next(scores)})
    rewind = {"fall": 0.1, "escape": 1.0, "cool": 0.5, "most": 2}
    version, steps, epochs = recorded(name, {"rewind": rewind, "control": control}, epochs=6)
    assert epochs["rewound"].tolist() == [0, 0, 1, 0, 1, 0]
    again = explore.replay(version, steps, epochs)["lambda_eff"].to_numpy()
    assert again == pytest.approx(steps["lambda_eff"].to_numpy(), rel=1e-12)
    unaware = explore.replay(version, steps, epochs.assign(rewound=0.0))["lambda_eff"].to_numpy()
    assert unaware != pytest.approx(again, rel=1e-3)


def test_a_rule_with_memory_is_exact_only_where_every_step_is_logged(recorded):
    version, steps, epochs = recorded("v22", log_every=2)
    assert len(steps) < steps["step"].max() and explore.is_exact(version.control, steps)
    assert explore.replay(version, steps, epochs)["lambda_eff"].tolist() == steps["lambda_eff"].tolist()
    slow = replace(version.control, rule="pi", measure="value", kp=0.0, ki=0.1)
    assert not explore.is_exact(slow, steps)
    every = steps.assign(step=np.arange(1, len(steps) + 1))
    assert explore.is_exact(slow, every) and not explore.is_exact(slow, every.iloc[1:])


def test_another_rule_is_applied_to_the_recorded_losses(recorded):
    version, steps, epochs = recorded("v22", FREE)
    c = version.control
    wanted = (2 * steps["rho_target"] * steps["mse"] / steps["directional"]).clip(1e-4, 0.005)
    found = explore.replay(version, steps, epochs, replace(c, rule="fraction", lambda_max=0.005), aim=2.0)
    assert found["lambda_eff"].to_numpy() == pytest.approx(wanted.to_numpy(), rel=1e-12)
    assert found["aim"].tolist() == (2 * steps["rho_target"]).tolist()
    fixed = explore.replay(version, steps, epochs, replace(c, rule="fixed", lambda_max=0.01))
    assert (fixed["lambda_eff"] == 0.01).all()
    capped = explore.replay(version, steps, epochs, replace(c, rule="rho_cap"), cap=0.1)
    assert (capped["rho"] <= 0.1 * steps["rho_cap"] * (1 + 1e-12)).all()
    # A cap below 0.8 of the target, which no version has: there the raise branch keeps the cap from acting.
    own = explore.replay(version, steps, epochs, cap=0.1)
    beyond = own["rho"] > 0.1 * steps["rho_cap"] * (1 + 1e-12)
    assert 0 < beyond.sum() < len(steps) and (own["raised"] > 0).tolist() == beyond.tolist()
    low = replace(c, lambda_max=0.002)  # the raise branch is entered, and cannot act
    found = explore.replay(version, steps, epochs, low)
    entered = 0.002 * steps["directional"] / steps["mse"] < 0.8 * steps["rho_target"]
    assert entered.any() and found["asked"].tolist() == entered.tolist() and (found["raised"] == 0).all()
    assert not explore.replay(version, steps, epochs, replace(low, rule="rho_cap"))["asked"].any()
    with pytest.raises(lvm.LVMError, match=r"constrained.*v22"):
        explore.replay(version, steps, epochs, replace(c, rule="constrained"))


def test_a_gradient_that_was_not_logged_leaves_a_gap_and_no_trace(recorded):
    """Of a step that the guard skipped λ times the gradient is 0; another guard's λ there cannot be known."""
    version, steps, epochs = recorded("share", {"rewind": None})
    steps = steps.copy()
    steps.loc[[3, 5], ["lambda_eff", "pull_directional"]] = 0.0
    free = replace(version.control, guard="none")
    found = explore.replay(version, steps, epochs, free)["lambda_eff"]
    without = explore.replay(version, steps.drop(index=[3, 5]), epochs, free)["lambda_eff"]
    assert found.isna().sum() >= 2 and found[[3, 5]].isna().all()
    assert found.drop(index=[3, 5]).fillna(-1).tolist() == without.fillna(-1).tolist()


# A window in texts


def test_a_window_is_shown_with_ranks_and_its_texts_letter_by_letter(data):
    store = replace(data.store, articles=data.store.articles.assign(title="<i>t</i>"))
    val = replace(data.val, store=store)
    hostile = "<script>alert(1)</script> $x$ \\(y\\) | **z** <img src=x onerror=alert(2)>"
    texts = [f"{i} {hostile}" for i in range(len(store.vectors))]
    simple = baselines(data.train)
    predictors = {"copy <i>last</i>": simple["copy last"], "mean": simple["mean"]}
    neighbours = {n: readout.nearest(p, val, [2], texts, 2) for n, p in predictors.items()}
    page = explore.window_table(neighbours, val)
    assert not re.search(r"<(script|img|i)\b", page) and "&lt;script&gt;" in page and "$x$" not in page
    rows = re.findall(r"<tr>.*?</tr>", page)
    assert len(rows) == 1 + 1 + T + 1 + 2 * (1 + 2)  # head; heading, read, true; a heading and its nearest, twice
    for name, frame in neighbours.items():
        true = frame[frame["role"] == "truth"].iloc[0]
        ranked = f"{readout.escape(name)}: the true one has rank {true['rank']:g} of {16 - T} chunks"
        assert sum(ranked in row for row in rows) == 1
        for row in frame[frame["role"] == "nearest in article"].to_dict("records"):
            assert any(f">{row['cosine']:.2f}<" in r and f"{row['row']} &lt;" in r for r in rows)
    cells = [re.findall(r">(-?\d\.\d\d)<", row) for row in rows[2 : 3 + T]]
    read = neighbours["mean"][neighbours["mean"]["role"].isin(["context", "truth"])]["cosine"]
    assert [float(c[1]) for c in cells] == pytest.approx(read.tolist(), abs=0.0051)
    assert "Wikipedia" not in page  # these texts are nobody's there


# Sliders


def test_controls_call_at_once_at_each_change_and_tell_an_error():
    seen, message = [], widgets.HTML()

    def update(a, b):
        seen.append((a, b))
        if a > 2:
            raise lvm.LVMError("too <much>")

    slider, other = widgets.IntSlider(value=1, max=5), widgets.Checkbox(value=False)
    explore.connect({"a": slider, "b": other}, update, message)
    slider.value, other.value = 2, True
    assert seen == [(1, False), (2, False), (2, True)] and message.value == ""
    slider.value = 3
    assert message.value == "too &lt;much&gt;"


# The notebook

MOVES = """
def move(widget, value, view):
    before = view.value
    widget.value = value
    assert view.value != before and len(view.value) > 1000, (widget.description, value)

move(strength, STRENGTHS[-1], trick_view)
move(trick, names[3], trick_view)
move(margin, "margin", trick_view)
values = {"aim": 2.0, "cap": 0.3, "lambda_max": 0.5, "rule": "pi", "kp": 0.2, "ki": 0.4, "measure": "gradient"}
for name, value in values.items():
    move(rules[name], value, rule_view)
assert rules["cap"].disabled and not rules["kp"].disabled
for name, value in {"rule": "rho_controller", "lambda_max": base.lambda_max, "aim": 1.0, "cap": 1.0}.items():
    rules[name].value = value
assert f"λ as recorded in {len(steps)} of {len(steps)} steps" in rule_said.value, rule_said.value
assert f"{at(names[3], STRENGTHS[-1])['novel_mrr']:.3f}" in trick_said.value
move(place, place.max, text_view)
move(article, min(of_article, key=lambda a: len(of_article[a])), text_view)
assert place.max == len(of_article[article.value]) - 1 and plt.get_fignums() == []
"""


def executed(tmp_path, monkeypatch, watched, changes, more=""):
    """The notebook run in fast mode, as in JupyterLab or as by papermill; the outputs of its code cells."""
    monkeypatch.setenv("LVM_FAST", "1")
    monkeypatch.setenv("LVM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("JPY_SESSION_NAME", False)
    if watched:
        monkeypatch.setenv("JPY_SESSION_NAME", "explore.ipynb")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.insert(2, nbformat.v4.new_code_cell(changes, metadata={"tags": ["injected-parameters"]}))
    notebook.cells.append(nbformat.v4.new_code_cell(more))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]


def kinds(outputs):
    return {kind for o in outputs for kind in o.get("data", {})}


def test_the_sliders_move_what_they_should(tmp_path, monkeypatch):
    outputs = executed(tmp_path, monkeypatch, True, 'model = "amn"', MOVES)
    assert "application/vnd.jupyter.widget-view+json" in kinds(outputs)
    assert not [o for o in outputs if o.output_type == "error" or "Traceback" in o.get("text", "")]


def test_without_a_person_there_are_figures_and_no_trace_of_a_widget(tmp_path, monkeypatch):
    """On a world, which has no texts, and of a version without a rule to try."""
    outputs = executed(tmp_path, monkeypatch, False, 'version = "p6"\nmodel = "amn"\ndata = "world:rotation"')
    assert not [kind for kind in kinds(outputs) if "widget" in kind]
    pictures = sum(any(k.startswith("image/") for k in o.get("data", {})) for o in outputs)
    words = json.dumps([{k: v for k, v in o.get("data", {}).items() if not k.startswith("image/")} for o in outputs])
    assert not re.search(r"children=|Dropdown\(|interactive\(|<script", words)
    assert words.count("Sliders stand here in JupyterLab") == 2 == pictures
    assert "has no texts" in words and "there is no rule to try" in words
