"""Limits of Monte Carlo tests: how far a right answer may stray, at a stated family-wise error rate."""

import scipy.stats as st

FAMILY_WISE = 1e-4
"""Probability that any of a family of right answers is rejected."""


def _each(num: int) -> float:
    """Sidak's level of each of `num` two-sided tests."""
    return 1 - (1 - FAMILY_WISE) ** (1 / num)


def z_limit(num: int) -> float:
    """Largest |z| of `num` standard normal scores."""
    return float(st.norm.isf(_each(num) / 2))


def t_limit(num: int, degrees: int) -> float:
    """Largest |t| of `num` Student scores, for means of `degrees + 1` independent runs."""
    return float(st.t.isf(_each(num) / 2, degrees))


def chi2_limits(num: int, degrees: int) -> tuple[float, float]:
    """Smallest and largest sum of `degrees` squared scores, in each of `num` sums."""
    each = _each(num)
    return float(st.chi2.ppf(each / 2, degrees)), float(st.chi2.isf(each / 2, degrees))


def f_limits(num: int, top: int, bottom: int) -> tuple[float, float]:
    """Smallest and largest ratio of two mean squares of so many degrees of freedom, in each of `num` ratios."""
    each = _each(num)
    return float(st.f.ppf(each / 2, top, bottom)), float(st.f.isf(each / 2, top, bottom))
