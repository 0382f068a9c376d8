"""Statistics of paired arms. x, y: one value for each seed, in the same order. Intervals are of 95 %."""
import math

import numpy
from scipy import stats as distributions

LEVEL = 0.95
SIGMAS = 5              # a gap that closure is counted in must be so many of its standard errors wide
FEWEST = 3              # pairs below which nothing is said


def quantile(n, level=LEVEL):
    return distributions.t.ppf((1 + level) / 2, n - 1)


def mean_interval(x, level=LEVEL):
    """(mean, low, high, p that it is 0) by Student's t: mean +- t s / sqrt(n)."""
    x = numpy.asarray(x, float)
    n, mean = len(x), float(x.mean()) if len(x) else math.nan
    if n < 2:
        return mean, -math.inf, math.inf, 1.0
    error = float(x.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return mean, mean, mean, float(mean == 0)
    p = float(2 * distributions.t.sf(abs(mean) / error, n - 1))
    return mean, mean - quantile(n, level) * error, mean + quantile(n, level) * error, p


def paired(x, y):
    """The mean of x - y."""
    return mean_interval(numpy.subtract(x, y))


def detectable(deviation, n, level=LEVEL):
    """The effect that n pairs see in four of five tries: about (t_(1+level)/2 + t.8) s / sqrt(n), n - 1 degrees (for
    95 % 6 % too small for 3 pairs, 1 % for 8)."""
    return math.inf if n < 2 else (quantile(n, level) + distributions.t.ppf(0.8, n - 1)) * deviation / math.sqrt(n)


def gap_is_wide(low, high):
    """Whether the gap between two sizes is above SIGMAS standard errors of its mean."""
    gap = numpy.subtract(low, high)
    return len(gap) >= FEWEST and gap.mean() > SIGMAS * gap.std(ddof=1) / math.sqrt(len(gap))


def closure(low, high, x, level=LEVEL):
    """(low - x) / (low - high), a ratio of means, with Fieller's interval: all r for which the mean of (low - x) -
    r (low - high) is not told from 0, the solutions of (a - r b)^2 <= t^2 (v_aa - 2 r v_ab + r^2 v_bb) / n."""
    a, b = numpy.subtract(low, x), numpy.subtract(low, high)
    n = len(a)
    ratio = float(a.mean() / b.mean()) if n and b.mean() else math.nan
    if n < 2:
        return ratio, -math.inf, math.inf
    v, t2 = numpy.cov(a, b, ddof=1) / n, quantile(n, level) ** 2
    p = b.mean() ** 2 - t2 * v[1, 1]
    q = a.mean() * b.mean() - t2 * v[0, 1]
    r = a.mean() ** 2 - t2 * v[0, 0]
    inside = q * q - p * r
    if p <= 0 or inside < 0:                    # the gap itself is not told from 0
        return ratio, -math.inf, math.inf
    return ratio, float((q - math.sqrt(inside)) / p), float((q + math.sqrt(inside)) / p)


def jackknife(function, n, level=LEVEL):
    """function(indices of seeds) with an interval from pseudo-values n f - (n - 1) f without seed i, by Student's t."""
    every = list(range(n))
    if n < 2:
        return function(every), -math.inf, math.inf
    whole = function(every)
    pseudo = [n * whole - (n - 1) * function(every[:i] + every[i + 1:]) for i in every]
    _, low, high, _ = mean_interval(pseudo, level)
    return whole, low, high


def holm(p, level=LEVEL):
    """The level of each of several intervals, so that all verdicts together err in a = 1 - level of all tries (Holm,
    Scand. J. Statistics 6, 1979): the smallest of m values of p has 1 - a / m, the next 1 - a / (m - 1), as long as
    each is below its share; from the first that is not, all have the level of that one."""
    levels, order = [0.0] * len(p), numpy.argsort(p, kind="stable")
    for rank, n in enumerate(order):
        share = (1 - level) / (len(p) - rank)
        if p[n] > share:
            for rest in order[rank:]:
                levels[rest] = 1 - share
            break
        levels[n] = 1 - share
    return levels


def verdict_p(at, ranges):
    """1 - the level of the largest interval, at(level) = (low, high), that a range of the verdict holds; 1: not even
    that of one half."""
    inside, outside = 0.5, 1e-12            # 1 - level, on the way to each other
    if verdict(*at(1 - inside), ranges) == "cannot tell":
        return 1.0
    while inside > 1.0001 * outside:
        middle = math.sqrt(inside * outside)
        if verdict(*at(1 - middle), ranges) == "cannot tell":
            outside = middle
        else:
            inside = middle
    return inside


def of_looks(looks):
    """The level at which `looks` looks at growing data, as many new each time, all together err in 5 of 100 tries: one
    boundary for all (Pocock, Biometrika 64, 1977)."""
    return {1: LEVEL, 2: 1 - 0.0294, 3: 1 - 0.0221}[looks]


def verdict(low, high, ranges):
    """The first name with a range that holds the whole interval; a name has one range, or a list of them."""
    for name, given in ranges.items():
        for least, most in given if isinstance(given[0], list) else [given]:
            if least <= low and high <= most:
                return name
    return "cannot tell"
