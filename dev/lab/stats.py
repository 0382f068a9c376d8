"""Statistics of paired arms. x, y: one value for each seed, in the same order. Intervals are of 95 %."""
import math

import numpy
from scipy import stats as distributions

LEVEL = 0.95
SIGMAS = 5              # a gap that closure is counted in must be so many standard deviations of its pairs wide


def quantile(n):
    return distributions.t.ppf((1 + LEVEL) / 2, n - 1)


def mean_interval(x):
    """(mean, low, high, p that it is 0) by Student's t: mean +- t s / sqrt(n)."""
    x = numpy.asarray(x, float)
    n, mean = len(x), float(x.mean()) if len(x) else math.nan
    if n < 2:
        return mean, -math.inf, math.inf, 1.0
    error = float(x.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return mean, mean, mean, float(mean == 0)
    p = float(2 * distributions.t.sf(abs(mean) / error, n - 1))
    return mean, mean - quantile(n) * error, mean + quantile(n) * error, p


def paired(x, y):
    """The mean of x - y."""
    return mean_interval(numpy.subtract(x, y))


def detectable(deviation, n):
    """The effect that n pairs see in four of five tries at the level of .05: (t.975 + t.8) s / sqrt(n), n - 1
    degrees."""
    return math.inf if n < 2 else (quantile(n) + distributions.t.ppf(0.8, n - 1)) * deviation / math.sqrt(n)


def gap_is_wide(low, high):
    """Whether the gap between two sizes is above SIGMAS standard deviations of its pairs."""
    gap = numpy.subtract(low, high)
    return len(gap) > 1 and gap.mean() > SIGMAS * gap.std(ddof=1)


def closure(low, high, x):
    """(low - x) / (low - high), a ratio of means, with Fieller's interval: all r for which the mean of (low - x) -
    r (low - high) is not told from 0, the solutions of (a - r b)^2 <= t^2 (v_aa - 2 r v_ab + r^2 v_bb) / n."""
    a, b = numpy.subtract(low, x), numpy.subtract(low, high)
    n = len(a)
    ratio = float(a.mean() / b.mean()) if n and b.mean() else math.nan
    if n < 2:
        return ratio, -math.inf, math.inf
    v, t2 = numpy.cov(a, b, ddof=1) / n, quantile(n) ** 2
    p = b.mean() ** 2 - t2 * v[1, 1]
    q = a.mean() * b.mean() - t2 * v[0, 1]
    r = a.mean() ** 2 - t2 * v[0, 0]
    inside = q * q - p * r
    if p <= 0 or inside < 0:                    # the gap itself is not told from 0
        return ratio, -math.inf, math.inf
    return ratio, float((q - math.sqrt(inside)) / p), float((q + math.sqrt(inside)) / p)


def jackknife(function, n):
    """function(indices of seeds) with an interval from pseudo-values n f - (n - 1) f without seed i, by Student's t."""
    every = list(range(n))
    if n < 2:
        return function(every), -math.inf, math.inf
    whole = function(every)
    pseudo = [n * whole - (n - 1) * function(every[:i] + every[i + 1:]) for i in every]
    _, low, high, _ = mean_interval(pseudo)
    return whole, low, high


def holm(p):
    """Adjusted p values: the k-th smallest times (n - k), k from 0, and never below those before it."""
    adjusted, most = [0.0] * len(p), 0.0
    for k, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        most = max(most, min(1.0, (len(p) - k) * p[i]))
        adjusted[i] = most
    return adjusted


def verdict(low, high, ranges, p=None):
    """The first range that holds the whole interval. One that leaves 0 outside wants p (Holm's) below .05 too."""
    for name, (least, most) in ranges.items():
        if least <= low and high <= most and (least < 0 < most or p is None or p < 1 - LEVEL):
            return name
    return "cannot tell"
