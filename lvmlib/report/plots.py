"""All figures and tables under one name, for notebooks: `plots.training(…)`, `plots.table(…)`."""
# ruff: noqa: F401

from .compare_figures import arrows, latencies, trade_off, versions
from .fivecat_figures import context_ablations, generalisation, make_up, offset_sweep, ranks, recall_curve, rollouts
from .run_figures import checks, pulls, step_health, training
from .style import BAND, GREY, INK, PULL, WARN, look, use_style
from .tables import (
    alarms_table,
    checklist_frame,
    conditions_frame,
    gate_table,
    history_table,
    judgement_table,
    letters,
    spread_table,
    table,
)
