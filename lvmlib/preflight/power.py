"""Power: how small a difference an interval over articles can show, and how many articles a difference takes."""

from __future__ import annotations

import numpy as np
from scipy import optimize, special, stats

from ..statistics import check_values, jackknife


def smallest_difference(values, article, power: float = 0.8, articles: float | None = None) -> float:
    """Return the least mean difference that a 95 % interval over articles separates from 0 with probability `power`.

    `values` (N,): paired differences of windows, such as 1/rank of one predictor less that of another; only their
    spread over `article` (N,) counts. `articles`: as if there were so many, as unequal as these. NaN for fewer than
    two; 0 without spread.

    The interval θ̂ ± t_c √V̂ of `over_articles` lies above 0 if θ̂/√V̂ > t_c. With a true difference δ, θ̂ normal about δ
    with variance V, and V̂ as V·χ²_df/df, that ratio has a noncentral t distribution of noncentrality δ/√V. V itself is
    known as V̂ = V·s² only, with s² as χ²_df/df: a difference of λ√V̂ has the noncentrality λs. So λ makes the mean of
    P(T_df(λs) > t_c) over s equal `power`. With A′ articles V becomes V·A/A′ and df + 1 becomes (df + 1)·A′/A.
    """
    values, article = check_values(values, article, 1)
    _, (variance,), df = jackknife(values, article)
    number = len(np.unique(article))
    scale = 1.0 if articles is None else articles / max(number, 1)
    if np.isnan(variance) or number * scale < 2:
        return float("nan")
    spread = np.sqrt(stats.chi2.ppf((np.arange(64) + 0.5) / 64, df) / df)  # s, at even steps of its distribution
    df = max((df + 1) * scale - 1, 1.0)
    critical = stats.t.ppf(0.975, df)  # t_c

    def excess(x: float) -> float:
        found = stats.norm.sf(critical - x * spread) if df > 1e4 else 1 - special.nctdtr(df, x * spread, critical)
        return found.mean() - power

    most = critical + 3.0
    while excess(most) < 0:
        most *= 2
    return float(optimize.brentq(excess, 0, most) * np.sqrt(variance / scale))


def articles_needed(values, article, difference: float) -> float:
    """Return the least number of articles, as unequal as these, whose `smallest_difference` is at most `difference`.

    NaN for fewer than two articles, infinite beyond 2³⁰.
    """
    if np.isnan(smallest_difference(values, article)):
        return float("nan")
    low, high = 1, 2**30
    if smallest_difference(values, article, articles=high) > difference:
        return float("inf")
    while high - low > 1:
        middle = (low + high) // 2
        enough = smallest_difference(values, article, articles=middle) <= difference
        low, high = (low, middle) if enough else (middle, high)
    return float(high)
