import math

import numpy as np
import pytest

from l2l_fast.meta import Horizon, LogUniform, Staged
from l2l_fast.meta.curricula import parse_horizon


def test_one_length():
    assert Horizon(70).draw(np.random.default_rng(0), 0.5) == 70
    assert Horizon(70).validation == 70


def test_log_uniform_grows_to_its_cap():
    horizon, rng = LogUniform(50, 800, first=100), np.random.default_rng(0)
    early = [horizon.draw(rng, 0.0) for _ in range(2000)]
    late = [horizon.draw(rng, 0.9) for _ in range(2000)]
    assert min(early) >= 50
    assert max(early) <= 100
    assert max(late) > 700
    assert np.median(late) == pytest.approx(math.sqrt(50 * 800), rel=0.1)
    assert horizon.validation == 800


def test_stages_advance_when_validation_stops_improving():
    staged, rng = Staged((10, 20, 40), patience=2), np.random.default_rng(0)
    answers = [staged.validated(score) for score in (5.0, 4.0, 4.5, 4.2)]
    assert answers == [False, False, False, True]
    assert staged.draw(rng, 0.0) == 20
    assert staged.validation == 40
    assert [staged.validated(score) for score in (9.0, 9.0, 9.0)] == [False, False, True]
    assert staged.draw(rng, 0.0) == 40
    assert staged.validation == 40
    assert not any(staged.validated(9.0) for _ in range(5))  # nowhere further to go


def test_stages_wait_anew_for_other_weights():
    staged = Staged((10, 20), patience=2)
    staged.validated(1.0)
    staged.validated(2.0)
    staged.forget()
    assert [staged.validated(score) for score in (9.0, 9.0, 9.0)] == [False, False, True]


def test_stages_resume():
    staged, other = Staged((10, 20), patience=1), Staged((10, 20), patience=1)
    staged.validated(1.0)
    staged.validated(2.0)
    other.load_state_dict(staged.state_dict())
    assert vars(other) == vars(staged)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (70, "Horizon(70)"),
        ("70", "Horizon(70)"),
        ("50:300", "LogUniform(50, 300, first=300)"),
        ("50:300:100", "LogUniform(50, 300, first=100)"),
        ("10,20", "Staged((10, 20), patience=3)"),
    ],
)
def test_a_horizon_in_words(text, expected):
    assert repr(parse_horizon(text)) == expected


@pytest.mark.parametrize("text", ["ten", "", "5:", "9:5", "1:2:3:4", "20,10", "0", None])
def test_words_that_are_no_horizon_are_refused(text):
    with pytest.raises(ValueError, match=f"horizon {str(text)!r}: give 100, 50:300 or 100,200,500"):
        parse_horizon(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Horizon(0),
        lambda: Horizon(1.5),
        lambda: Horizon("3"),
        lambda: LogUniform(1.5, 9),
        lambda: LogUniform("1", 9),
        lambda: Staged((1.5, 2)),
        lambda: Staged(5),
        lambda: Staged((10, 20), patience=1.5),
        lambda: LogUniform(100, 50),
        lambda: LogUniform(10, 50, first=60),
        lambda: Staged(()),
        lambda: Staged((20, 10)),
        lambda: Staged((10, 20), patience=0),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(ValueError, match=r"horizon|stages|patience"):
        make()
