from __future__ import annotations

import math

import pytest

from torchgeom_optim.diagnostics.schedule import EverySteps, LogSpaced, as_schedule


def test_every_k_steps():
    assert [step for step in range(7) if as_schedule(3)(step)] == [0, 3, 6]
    assert all(as_schedule(1)(step) for step in range(5))


@pytest.mark.parametrize("per_decade", [1, 3, 7.5, 20])
def test_log_spaced_steps_are_the_rounded_powers(per_decade):
    due = {step for step in range(2000) if LogSpaced(per_decade)(step)}
    powers = {math.floor(10 ** (k / per_decade) + 0.5) for k in range(200) if 10 ** (k / per_decade) < 1999.4}
    assert due == {0} | powers


def test_a_callable_is_its_own_schedule():
    def schedule(step):
        return step in (3, 4)

    assert as_schedule(schedule) is schedule


@pytest.mark.parametrize("every", [0, -1, 2.5, math.nan, True])
def test_zero_and_other_numbers_are_refused(every):
    with pytest.raises(ValueError, match="every="):
        as_schedule(every)
    with pytest.raises(ValueError, match="every="):
        EverySteps(every)


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="every='often'"):
        as_schedule("often")
    for per_decade in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="per_decade"):
            LogSpaced(per_decade)
