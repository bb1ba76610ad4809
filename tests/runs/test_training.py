"""What training computes: rows retraced by hand, the best checkpoint, rules with a memory, learning rates, steps."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import DIM, finish, version

import lvmlib as lvm
from lvmlib import controller, evaluate, loop, losses, models
from lvmlib import device as device_module
from lvmlib.errors import LVMError
from lvmlib.judge.fivecat import score
from lvmlib.ranking import Articles
from lvmlib.runs import checkpoint, validation


def test_the_rows_are_what_they_say(data, tmp_path):
    """Epoch 1 retraced by hand: same stream, same order, own sums; then the validation figures one window at a time."""
    v = version(epochs=1, log_every=1, overrides={"corruption": {"share": 0.0}, "losses": {"norm_of": "raw"}})
    run = finish(lvm.train(v, data, tmp_path / "run"))
    with loop.seeded(v.seed, 0):
        model = models.build("amn", DIM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01, fused=True)
    seen = []
    with loop.seeded(v.seed, 1):
        order = torch.randperm(len(data.train)).numpy()
        for first in range(0, len(order), 32):
            x, y = data.train.batch(order[first : first + 32])
            raw, p = model(x)
            t = SimpleNamespace(**losses.terms(losses.Batch(raw, p, x, y, v.losses, 0.02)))
            pos, neg = losses.cosine(p, y).mean().item(), losses.cosine(p, x[:, -2]).mean().item()
            d = controller.decide(
                v.control, controller.phase(v.schedule, 1), t.mse.item(), t.directional.item(), pos, neg
            )
            total = t.mse + d.lambda_eff * t.directional + 2e-3 * t.floor + 1e-3 * t.norm + 5e-4 * t.orthogonality
            optimizer.zero_grad()
            total.backward()
            norm = math.sqrt(sum(float(w.grad.double().square().sum()) for w in model.parameters()))
            for w in model.parameters():
                w.grad *= min(1.0, 1.0 / (norm + 1e-6))
            optimizer.step()
            seen.append((len(y), total.item(), t.mse.item(), pos, d.lambda_eff, d.rho, d.skip, norm))
    n, loss, mse, pos, lam, rho, skip, norm = map(np.array, zip(*seen, strict=True))
    row, acted = run.history.iloc[0], n * ~skip
    wanted = {"train_loss": (loss, n), "mse": (mse, n), "pos": (pos, n)}
    wanted |= {"lambda_eff": (lam, acted), "rho": (rho, acted)}
    for name, (values, weight) in wanted.items():
        assert row[name] == pytest.approx(np.average(values, weights=weight), rel=1e-4)
    assert row["skips"] == skip.sum()
    assert run.steps["gradient_norm"].to_numpy() == pytest.approx(norm, rel=1e-3)

    figures, best = [], run.best
    for i in range(len(data.val)):
        x, y = data.val.batch([i])
        raw, p = (t[0].detach().double().numpy() for t in best(x))
        x, y = x[0].double().numpy(), y[0].double().numpy()
        unit = raw / np.linalg.norm(raw)
        cos = [float(unit @ c) / np.linalg.norm(c) for c in (*x, y)]
        figures.append((np.mean((raw - y) ** 2), cos[-1], cos[-1] - cos[-2], sum(c > cos[-1] for c in cos) < 5))
    wanted = np.mean(figures, axis=0)
    assert row[["val_loss", "val_cos", "margin", "recall_at_5"]].to_numpy(float) == pytest.approx(wanted, abs=1e-5)


def test_the_logged_pulls_are_weighted_and_their_share_is_the_gradients(data, tmp_path):
    steps = finish(lvm.train(version("v22", log_every=1), data, tmp_path / "v22")).steps
    acting = steps[steps["skip"] == 0]
    assert len(acting) and np.allclose(acting["rho_gradient"], acting["pull_directional"] / acting["pull_mse"])
    assert (acting["pull_orthogonality"] > 0).all() and steps["escape"].between(0, 1).all()
    assert acting["angle"].between(0, 180).all()
    plain = finish(lvm.train(version("p6", log_every=1), data, tmp_path / "p6")).steps
    assert plain["angle"].isna().all() and (plain[["pull_directional", "rho_gradient"]] == 0).all(axis=None)
    assert (plain["pull_mse"] > 0).all()


# Every version, every model


@pytest.mark.parametrize("name", lvm.known_versions())
def test_every_version_trains_without_an_alarm(name, data, tmp_path):
    """As shipped, by the small model of its kind. The toy's losses ask for a λ above the range of v21 (their D is 24,
    not 768: the mean-square loss is 30 times as large), which is an alarm."""
    small = {"rank": "bilinear", "bounded": "bilinear", "two_heads": "two_heads", "margin": "two_heads"}
    small |= {"committee": "committee", "energy": "sampler"}
    run = finish(lvm.train(version(name, data="toy", model=small.get(name, "amn")), data, tmp_path / "run"))
    rule = run.version.control.rule
    assert np.isfinite(run.history[["train_loss", "val_loss", "val_cos", "rho", "lambda_eff"]].to_numpy(float)).all()
    if rule != "constrained":  # a multiplier may vanish
        assert (run.history["lambda_eff"] > 0).all() == (rule != "none")
    assert run.history["rho_target"].notna().all() == (rule not in ("none", "fixed", "constrained"))
    assert {a.kind for a in run.alarms} <= ({"control"} if rule not in ("none", "fixed") else set())
    assert lvm.open_run(run.folder)[0]["alarms"] == [a._asdict() for a in run.alarms]


@pytest.mark.parametrize("model", models.ARCHITECTURES)
def test_every_model_trains_and_reloads(model, data, tmp_path):
    name = {"gated": "committee"}.get(model, model) if models.several_heads(model) else "v22"  # heads need two losses
    v = version(name, model=model, epochs=1, overrides={"batch_size": 64})
    run = finish(lvm.train(v, data, tmp_path / "run"))
    again = lvm.train(v, data, tmp_path / "run")
    x, _ = data.val.batch(np.arange(8))
    assert torch.equal(run.best(x)[0], again.best(x)[0])


# The best checkpoint


@pytest.mark.parametrize(
    "name, model, rate, column, term",
    [
        ("v22", "bilinear", 0.6, "val_unit_loss", "mse"),
        ("rank", "bilinear", 0.03, "novel_mrr", "listwise"),
        ("energy", "sampler", 0.1, "val_energy", "energy"),
    ],
)
def test_the_best_checkpoint_is_chosen_by_what_the_version_selects(data, tmp_path, name, model, rate, column, term):
    v = version(name, model=model, epochs=5, overrides={"optimizer": {"lr": rate}})
    run = finish(lvm.train(v, data, tmp_path / "run"))
    values = run.history[column]
    best = values.idxmax() if column == "novel_mrr" else values.idxmin()
    assert values.nunique() > 1 and best != run.history.index[-1]
    assert checkpoint.best_epoch(run.record["parameters"], run.history) == best + 1
    figures = evaluate.validate(run.best, data.val)
    if column == "val_energy":
        figures[column] = validation.energy_score(run.best, data.val)
    assert figures[column] == pytest.approx(values[best], rel=1e-5)
    if column == "novel_mrr":  # 5CAT's own
        assert (1 / score(run.best, data.val)["novel rank"]).mean() == pytest.approx(values[best], abs=1e-9)
        assert run.history["temperature"].between(0.01, 1).all() and run.history["temperature"].nunique() == 5
    for other in ("mse", "listwise", "energy"):
        assert (run.history[f"pull_{other}"] > 0).all() == (other == term)
    assert run.history["temperature"].isna().all() == (term != "listwise")
    assert run.history["val_energy"].isna().all() == (term != "energy")


def test_the_best_of_a_constrained_run_meets_its_bound_first(data, tmp_path):
    """By (shortfall beyond 0.01, or 0; then the score): another epoch than the score's own best."""
    settings = {"control": {"ki": 2.0, "constraint": {"at_least": 0.75}}, "optimizer": {"lr": 0.03}}
    v = version("bounded", model="bilinear", epochs=20, batch_size=16, overrides=settings)
    run = finish(lvm.train(v, data, tmp_path / "run"))
    missed = (run.history["directional"] - 0.01).clip(lower=0)
    ordered = sorted(range(20), key=lambda i: (missed[i], -run.history["novel_mrr"][i]))
    assert ordered[0] != run.history["novel_mrr"].idxmax() and missed.nunique() > 1
    found = evaluate.validate(run.best, data.val)
    assert found["val_cos"] == pytest.approx(run.history["val_cos"][ordered[0]], abs=1e-6)


# The rules with a memory


def test_the_gradient_share_of_a_run_is_the_target_and_the_memory_crosses_epochs(data, tmp_path):
    """λ of every step from the logged pulls, weighted means written out; in the second epoch they hold the first's."""
    v = version("share", log_every=1, overrides={"control": {"lambda_max": 10.0, "guard": "none"}, "rewind": None})
    steps = finish(lvm.train(v, data, tmp_path / "run")).steps
    mse, directional = steps["pull_mse"], steps["pull_directional"] / steps["lambda_eff"]
    for t in range(len(steps)):
        weights = 0.9 ** np.arange(t, -1, -1.0)
        wanted = 0.15 if steps["epoch"][t] < 3 else 0.25
        wanted *= np.average(mse[: t + 1], weights=weights) / np.average(directional[: t + 1], weights=weights)
        assert steps["lambda_eff"][t] == pytest.approx(wanted, rel=1e-6), t


def test_the_multiplier_of_a_run_is_the_sum_of_its_shortfalls(data, tmp_path):
    """Plain dual ascent, kp = 0: logged as lambda_eff; and the bound is met if it can be."""
    settings = {"control": {"kp": 0.0, "ki": 0.5, "constraint": {"at_least": 0.75}}, "optimizer": {"lr": 0.01}}
    v = version("bounded", model="bilinear", epochs=20, batch_size=16, log_every=1, overrides=settings)
    run = finish(lvm.train(v, data, tmp_path / "run"))
    assert run.steps["directional"].to_numpy() == pytest.approx(0.75 - run.steps["pos"].to_numpy(), abs=1e-6)
    multiplier = 0.0
    for shortfall, found in zip(run.steps["directional"], run.steps["lambda_eff"], strict=True):
        multiplier = max(0.0, multiplier + 0.5 * shortfall)
        assert found == pytest.approx(multiplier, abs=1e-5)
    assert run.history["pos"].iloc[0] < 0.7 < run.history["pos"].iloc[-1]
    assert run.history["rho_gradient"].isna().all()  # there is no mean square to compare with


# The optimizer


def test_only_matrices_decay_if_so_asked(data, tmp_path):
    def left(decay):
        settings = {"lr": 1e-12, "weight_decay": 1e11, "decay": decay}
        v = version("p6", model="bilinear", epochs=1, overrides={"optimizer": settings})
        return finish(lvm.train(v, data, tmp_path / decay)).best

    every, matrices = left("all"), left("matrices")
    left_over = 0.9 ** math.ceil(len(data.train) / 32)
    assert every.weights[-1].item() == pytest.approx(left_over, abs=1e-3) and matrices.weights[-1].item() == 1.0
    torch.testing.assert_close(every.metric.weight, matrices.metric.weight)


def test_learning_rate_falls_on_a_plateau(data, tmp_path):
    v = version("p6", epochs=6, overrides={"optimizer": {"lr": 1.0, "plateau_patience": 0}})
    rates = finish(lvm.train(v, data, tmp_path / "run")).history["learning_rate"]
    assert rates.iloc[0] == 1.0 and rates.iloc[-1] < 1.0 and set(np.log2(rates)) <= {-float(i) for i in range(6)}


def test_a_cosine_takes_the_learning_rate_from_its_height_to_0_step_by_step(data, tmp_path, monkeypatch):
    v = version("rank", model="bilinear", batch_size=16, overrides={"optimizer": {"schedule": "cosine"}})
    rates, step = [], torch.optim.AdamW.step

    def noted(self, *arguments, **options):
        rates.append({group["lr"] for group in self.param_groups})
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    run = finish(lvm.train(v, data, tmp_path / "run"))
    batches = math.ceil(len(data.train) / 16)
    expected = [v.optimizer.lr * math.cos(math.pi * i / (2 * 3 * batches)) ** 2 for i in range(3 * batches)]
    assert all(len(r) == 1 for r in rates)
    np.testing.assert_allclose([min(r) for r in rates], expected, rtol=1e-9)
    np.testing.assert_allclose(run.history["learning_rate"], expected[::batches], rtol=1e-5)


# Devices, bfloat16, clipping, gradients


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "gpu", ""])
def test_an_absent_device_is_named(name):
    with pytest.raises(LVMError, match="device"):
        device_module.pick_device(name)


@pytest.mark.parametrize("able, wanted", [("", "float32"), ("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16")])
def test_precision_follows_the_machine(monkeypatch, able, wanted):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True})
    assert device_module.pick_precision("auto", cpu) == wanted
    assert device_module.pick_precision("float32", cpu) == "float32"


def test_bfloat16_stays_near_float32(data, tmp_path):
    one, two = (
        finish(lvm.train(version(precision=p, epochs=4), data, tmp_path / p)).history for p in ("float32", "bfloat16")
    )
    assert abs(one["val_cos"] - two["val_cos"]).max() < 0.02
    assert not np.array_equal(one["val_cos"], two["val_cos"])  # it was really used


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_lowered_steps_are_those_of_autocast(name, data):
    """Bit for bit: outputs, gradients and, after an update, outputs again."""
    torch.manual_seed(0)
    plain = models.build(name, data.store.dim)
    full = copy.deepcopy(plain)
    lowered = loop.Lowered(full)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, full)]
    context, y = data.train.batch(np.arange(16))
    for step in range(3):
        found = []
        for model in (plain, lowered.model):
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16):
                raw, _, ranker = model.train().heads(context)
            ranks = (ranker * (y if ranker.ndim == 2 else y[:, None])).sum(-1).mean()
            (raw - y).square().mean().add(ranks).backward()
            found.append(raw.detach())
        lowered.hand_over()
        assert torch.equal(*found)
        for a, b in zip(plain.parameters(), full.parameters(), strict=True):
            assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        lowered.renew()
    moved = [(a - b).abs().max() for a, b in zip(full.parameters(), lowered.model.parameters(), strict=True)]
    assert max(moved) < 1e-2  # bfloat16's rounding, no more


@pytest.mark.parametrize("most", [0.5, 1e9])
def test_clip_is_torchs(most):
    torch.manual_seed(0)
    one = torch.nn.Linear(7, 5)
    one(torch.randn(3, 7)).square().sum().backward()
    two = copy.deepcopy(one)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        b.grad = a.grad.clone()
    norm = loop.clip(one, most)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(two.parameters(), most)) and 2.0 < norm < 1e9
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["v22", "rank", "committee", "energy", "margin"])
def test_backward_gives_the_gradient_of_the_total(name, data):
    v = lvm.version(name)
    state = loop.start(v, data.store.dim, torch.device("cpu"))
    state.model.eval()
    vectors = torch.from_numpy(data.store.vectors)
    task = loop.Task(v, data.train, vectors, articles=Articles(data.train, vectors))
    learned, found = [*state.model.parameters(), state.log_scale], []
    for way in ("total", "ours"):
        torch.manual_seed(1)
        batch = loop.predict(state, task, np.arange(16), state.model, controller.phase(v.schedule, 5))
        terms, weights = losses.terms(batch), losses.weights(v.losses, 0.7)
        if way == "total":
            sum(weight * terms[name] for name, weight in weights.items()).backward()
        else:
            losses.backward(terms, weights, batch, losses.gradients(terms, batch))
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in learned])
        for p in learned:
            p.grad = None
    assert sum(bool(a.any()) for a in found[0]) > 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
