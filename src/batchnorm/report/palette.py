"""The colours of figures and of the page, for light and dark mode.

Blue, orange and grey can be distinguished with every kind of colour blindness. Each role has two tones: the first is
also used for text (contrast with the background 4.5 or more), the second for further lines (3 or more).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Palette:
    """The colours of a figure; each field is a CSS colour."""

    paper: str
    text: str
    muted: str
    rule: str
    bn: str
    bn_2: str
    plain: str
    plain_2: str
    other: str
    other_2: str

    def tones(self, role: str) -> tuple[str, str]:
        """The two tones of a line's role."""
        return getattr(self, role), getattr(self, f"{role}_2")

    def css(self) -> str:
        """The colours as custom properties of CSS."""
        return " ".join(f"{_property(name)}: {colour};" for name, colour in asdict(self).items())


LIGHT = Palette(
    paper="#fffefc",
    text="#1d1c1a",
    muted="#5f5c56",
    rule="#e3e0da",
    bn="#0b5cad",
    bn_2="#4a8fd0",
    plain="#b3470a",
    plain_2="#d5773a",
    other="#55595f",
    other_2="#868a90",
)

DARK = Palette(
    paper="#16171a",
    text="#e8e6e1",
    muted="#a8a59e",
    rule="#34353a",
    bn="#7db9f5",
    bn_2="#4c8fd3",
    plain="#f5a063",
    plain_2="#c8753a",
    other="#b9bdc3",
    other_2="#878c93",
)

# Matplotlib needs colours that it can parse, so a figure for the page is drawn in these, which are
# then replaced by CSS custom properties of the page.
_SENTINELS = {name: f"#fe01{number:02x}" for number, name in enumerate(asdict(LIGHT))}
SENTINEL = Palette(**_SENTINELS)


def follow_page(svg: str) -> str:
    """Replace the sentinel colours of `svg` by the page's custom properties."""
    for name, colour in _SENTINELS.items():
        svg = svg.replace(colour, f"var({_property(name)})")
    return svg


def _property(name: str) -> str:
    return f"--{name.replace('_', '-')}"
