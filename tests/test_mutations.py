"""The mutations of `mutations.py` are up to date: what each would break is in the package, once."""

from mutations import MUTATIONS, check_strings


def test_each_breaks_something_that_is_there():
    check_strings(list(MUTATIONS))
