"""The constants against the points that were measured on a GPU and not used to fit them."""

from pathlib import Path

import pytest

from llm_dit.bench.fit import Point, points, split
from llm_dit.bench.results import read_rows
from llm_dit.planning.constants import constants

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "calibrate-h200.json"


@pytest.fixture(scope="module")
def measured() -> tuple[list[Point], list[Point]]:
    return split(points(read_rows(RESULTS)))


def estimate(point: Point) -> int:
    return constants().correct(point.case.phase, point.role, point.class_name, point.counted)


def test_estimates_of_points_that_were_not_fitted(measured):
    tested = measured[1]
    assert len(tested) >= 15
    for point in tested:
        assert point.measured <= estimate(point) <= point.measured + point.allowed(), point


def test_estimates_of_points_that_were_fitted(measured):
    for point in measured[0]:
        assert point.measured <= estimate(point) <= point.measured + point.allowed(), point


def test_every_phase_is_tested(measured):
    assert {point.case.phase for point in measured[1]} == {"encode", "denoise", "decode"}
