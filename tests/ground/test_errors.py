"""Errors, which go from process to process as they are."""

import pickle

import pytest

from convrewrite.errors import ConvRewriteError, FitError, UsageError


@pytest.mark.parametrize("error", [UsageError("one line", "and another"), FitError("body.0", "expected numbers")])
def test_an_error_comes_out_of_a_pickle_as_it_went_in(error: ConvRewriteError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_an_error_of_one_site_is_told_of_a_worker() -> None:
    from convrewrite.pipeline import handed

    made = FitError("body.0", "expected numbers: normalise the inputs")
    text = handed.FAILED + handed._Failed(error=type(made).__name__, message=str(made)).model_dump_json()
    with pytest.raises(FitError) as found:
        handed._result_in(text)
    assert (found.value.site, found.value.reason, str(found.value)) == (made.site, made.reason, str(made))
