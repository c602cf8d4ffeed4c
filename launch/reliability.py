"""A reward model's reliability, drawn: how often it is right where it is so sure (Guo et al. 2017, figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from algorithms.calibration import ReliabilityBin

RELIABILITY_FILE = "reliability.svg"
_SIDE, _LEFT, _TOP = 320, 56, 40
_LOW, _HIGH = 0.5, 1.0


def write_reliability(bins: Sequence[ReliabilityBin], error: float, path: Path) -> None:
    """Write an SVG: a bar a bin, its width the bin of confidence, its height the accuracy; the diagonal is perfection.

    All pairs of one prompt's responses count as one, so that counts are of prompts, and a bin's may be a fraction.

    Args:
        error: the expected calibration error, for the title.

    Raises:
        OSError: it cannot be written.
    """
    total = sum(found.count for found in bins)
    bars = [_bar(found, total) for found in bins]
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_SIDE + 80}" height="{_SIDE + 96}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{_LEFT}" y="24" font-size="14">{total:,.0f} prompts, calibration error {error:.3f}</text>\n'
        + "\n".join([*bars, _axes()])
        + "\n</svg>\n"
    )


def _bar(found: ReliabilityBin, total: float) -> str:
    if found.confidence is None or found.accuracy is None:
        return ""
    left, right, top = _x(found.low), _x(found.high), _y(found.accuracy)
    weight = f"{found.count:,.1f}".removesuffix(".0")
    what = f"confidence {found.confidence:.3f}, accuracy {found.accuracy:.3f}, prompts {weight}"
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}" height="{_y(0.0) - top:.1f}" '
        f'fill="#4477aa" fill-opacity="{0.25 + 0.75 * found.count / total:.2f}"><title>{what}</title></rect>'
    )


def _axes() -> str:
    ticks = [
        f'<text x="{_x(value):.0f}" y="{_y(0.0) + 16:.0f}" text-anchor="middle">{value:.1f}</text>'
        for value in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    ] + [
        f'<text x="{_LEFT - 6}" y="{_y(value) + 4:.0f}" text-anchor="end">{value:.1f}</text>'
        for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    return "\n".join(
        [
            f'<rect x="{_LEFT}" y="{_TOP}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="black"/>',
            f'<line x1="{_x(_LOW)}" y1="{_y(_LOW)}" x2="{_x(_HIGH)}" y2="{_y(_HIGH)}" stroke="#bb5566" '
            'stroke-dasharray="4 3"/>',
            *ticks,
            f'<text x="{_LEFT + _SIDE / 2}" y="{_y(0.0) + 36:.0f}" text-anchor="middle">confidence</text>',
            f'<text transform="translate(16 {_TOP + _SIDE / 2}) rotate(-90)" text-anchor="middle">accuracy</text>',
        ]
    )


def _x(confidence: float) -> float:
    return _LEFT + _SIDE * (confidence - _LOW) / (_HIGH - _LOW)


def _y(accuracy: float) -> float:
    return _TOP + _SIDE * (1 - accuracy)
