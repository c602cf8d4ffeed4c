"""The drawing of a reward model's reliability."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from algorithms.calibration import calibration_counts, expected_calibration_error, reliability
from launch.reliability import write_reliability

SVG = "{http://www.w3.org/2000/svg}"


def test_a_bar_stands_where_its_bin_does(tmp_path: Path) -> None:
    counts = calibration_counts(torch.tensor([3.0, 3.0, 3.0, -3.0, 0.1]), 10)
    write_reliability(reliability(counts), expected_calibration_error(counts), tmp_path / "a.svg")
    drawn = ElementTree.parse(tmp_path / "a.svg").getroot()
    bars = [found for found in drawn.iter(f"{SVG}rect") if found.find(f"{SVG}title") is not None]
    assert len(bars) == 2  # the other bins hold no pair
    sure = bars[1]
    # Confidence sigmoid(3) = 0.953 is in the last bin, [0.95, 1]; three of four were right.
    assert float(sure.attrib["x"]) == 56 + 320 * 0.9
    assert float(sure.attrib["height"]) == 320 * 0.75
    title = sure.find(f"{SVG}title")
    assert title is not None and title.text == "confidence 0.953, accuracy 0.750, prompts 4"


def test_the_pairs_of_a_prompt_count_as_one(tmp_path: Path) -> None:
    """Six pairs of four responses, two of three: as many as there are prompts, not as there are pairs."""
    margins, weights = torch.tensor([3.0] * 3 + [0.1] * 3 + [3.0] * 2), torch.tensor([1 / 6] * 6 + [1 / 2] * 2)
    counts = calibration_counts(margins, 10, weights)
    write_reliability(reliability(counts), expected_calibration_error(counts), tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert ">2 prompts, calibration error" in drawn
    assert "accuracy 1.000, prompts 0.5<" in drawn and "accuracy 1.000, prompts 1.5<" in drawn


def test_nothing_to_draw(tmp_path: Path) -> None:
    counts = calibration_counts(torch.zeros(0), 10)
    write_reliability(reliability(counts), expected_calibration_error(counts), tmp_path / "a.svg")
    assert "0 prompts" in (tmp_path / "a.svg").read_text()
