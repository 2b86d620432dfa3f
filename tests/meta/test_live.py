"""The picture that a notebook shows of a run; tests/notebook tries it in a real kernel."""

import math
import xml.etree.ElementTree as ET

import pytest

from l2l_fast.meta.live import POINTS, LivePicture, _thinned, in_notebook


def test_outside_of_a_notebook_there_is_none():
    assert not in_notebook()


@pytest.mark.parametrize("losses", [[], [1.0], [2.0] * 5, [math.nan] * 3, [3.0, math.inf, 1.0], [0.0, -1.0, 2.0]])
def test_any_run_makes_a_whole_picture(losses):
    picture = LivePicture(10, losses, [(2, math.inf)] if losses else [])
    ET.fromstring(picture._repr_html_())
    for word in ("nan", "inf"):
        assert word not in picture.svg().replace("meta-training: 3 of 10, loss nan", "")
    assert f'value="{len(losses)}"' in picture._repr_html_()


def test_what_it_says():
    losses, validations = [4.0, 2.0], [(1, 0.5), (2, 0.25)]
    picture = LivePicture(10, losses, validations)
    assert repr(picture) == "meta-training: 2 of 10, loss 2, best 0.25"  # no meta-step was made since it is shown
    losses += [1.0, 0.5]
    picture.begun -= 70
    assert repr(picture) == "meta-training: 4 of 10, loss 0.5, best 0.25, 3 min 30 s left"
    picture.ended = True
    assert repr(picture) == "meta-training: 4 of 10, loss 0.5, best 0.25"
    assert picture.svg().count("<polyline") == 2
    assert picture.svg().count("<circle") == 6


def test_long_runs_are_averaged():
    points = _thinned([float(k) for k in range(1000)])
    assert len(points) <= POINTS
    assert points[0] == (2.5, 1.5)  # meta-steps 1 to 4
    assert points[-1] == (998.5, 997.5)
    assert _thinned([1.0, math.nan]) == [(1.0, 1.0)]
