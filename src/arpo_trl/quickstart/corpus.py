"""The passages that the quickstart searches: public facts about elements, mountains and countries, one per sentence.

Every entity has two similar passages: one with the property in the questions, and one with another property. A search
for the entity finds both, in either order, so a policy must read them. Some values have a different unit, and a search
for an alias finds only the name for the next search:

    Tin melts at 505 K.      Tin boils at 2602 °C.      Stannum is only another name; look under Tin.

Values are rounded to the shown precision, since sources differ in the last digit. Populations are from about 2023.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

_OTHER_UNIT_SHARE = 0.4
_SEED = 20

# name: melting point in °C, boiling point in °C
_ELEMENTS = {
    "Lithium": (181, 1342),
    "Boron": (2076, 3927),
    "Sodium": (98, 883),
    "Magnesium": (650, 1091),
    "Aluminium": (660, 2470),
    "Silicon": (1414, 3265),
    "Sulfur": (115, 445),
    "Potassium": (64, 759),
    "Calcium": (842, 1484),
    "Titanium": (1668, 3287),
    "Chromium": (1907, 2671),
    "Iron": (1538, 2861),
    "Cobalt": (1495, 2927),
    "Nickel": (1455, 2730),
    "Copper": (1085, 2562),
    "Zinc": (420, 907),
    "Gallium": (30, 2400),
    "Niobium": (2477, 4744),
    "Rhodium": (1964, 3695),
    "Palladium": (1555, 2963),
    "Silver": (962, 2162),
    "Indium": (157, 2072),
    "Tin": (232, 2602),
    "Iodine": (114, 184),
    "Barium": (727, 1845),
    "Cerium": (795, 3443),
    "Terbium": (1356, 3123),
    "Erbium": (1529, 2868),
    "Thulium": (1545, 1950),
    "Tantalum": (3017, 5458),
    "Tungsten": (3422, 5930),
    "Osmium": (3033, 5012),
    "Iridium": (2446, 4130),
    "Platinum": (1768, 3825),
    "Gold": (1064, 2970),
    "Thallium": (304, 1473),
    "Lead": (327, 1749),
    "Bismuth": (271, 1564),
    "Thorium": (1750, 4788),
    "Uranium": (1132, 4131),
    "Plutonium": (640, 3228),
}

# name: height in m, year of the first ascent
_MOUNTAINS = {
    "Everest": (8849, 1953),
    "Lhotse": (8516, 1956),
    "Makalu": (8485, 1955),
    "Manaslu": (8163, 1956),
    "Annapurna": (8091, 1950),
    "Kamet": (7756, 1931),
    "Pumori": (7161, 1962),
    "Aconcagua": (6961, 1897),
    "Sajama": (6542, 1939),
    "Illimani": (6438, 1898),
    "Denali": (6190, 1913),
    "Logan": (5959, 1925),
    "Alpamayo": (5947, 1957),
    "Cotopaxi": (5897, 1872),
    "Elbrus": (5642, 1874),
    "Orizaba": (5636, 1848),
    "Ararat": (5137, 1829),
    "Stanley": (5109, 1906),
    "Kazbek": (5054, 1868),
    "Vinson": (4892, 1966),
    "Dom": (4546, 1858),
    "Wilhelm": (4509, 1938),
    "Belukha": (4506, 1914),
    "Matterhorn": (4478, 1865),
    "Whitney": (4421, 1873),
    "Elbert": (4401, 1874),
    "Rainier": (4392, 1870),
    "Shasta": (4322, 1854),
    "Toubkal": (4167, 1923),
    "Jungfrau": (4158, 1811),
    "Kinabalu": (4095, 1888),
    "Eiger": (3967, 1858),
    "Robson": (3954, 1913),
    "Ortler": (3905, 1804),
    "Erebus": (3794, 1908),
    "Aoraki": (3724, 1894),
    "Hood": (3429, 1857),
    "Olympus": (2918, 1913),
    "Triglav": (2864, 1778),
}

# name: area in thousand km², population in million
_COUNTRIES = {
    "Algeria": (2380, 46),
    "Angola": (1250, 37),
    "Austria": (84, 9),
    "Benin": (115, 14),
    "Bolivia": (1100, 12),
    "Brazil": (8510, 211),
    "Bulgaria": (111, 6),
    "Canada": (9980, 40),
    "Chad": (1280, 19),
    "Chile": (756, 20),
    "China": (9600, 1411),
    "Colombia": (1140, 52),
    "Cuba": (110, 11),
    "Denmark": (43, 6),
    "Ecuador": (276, 18),
    "Egypt": (1000, 113),
    "Finland": (338, 6),
    "France": (644, 68),
    "Germany": (358, 84),
    "Ghana": (239, 34),
    "Greece": (132, 10),
    "Hungary": (93, 10),
    "India": (3290, 1438),
    "Iran": (1650, 90),
    "Iraq": (438, 45),
    "Ireland": (70, 5),
    "Italy": (301, 59),
    "Japan": (378, 124),
    "Kenya": (580, 55),
    "Libya": (1760, 7),
    "Malawi": (118, 21),
    "Malaysia": (330, 35),
    "Mali": (1240, 23),
    "Mexico": (1960, 130),
    "Morocco": (447, 38),
    "Myanmar": (677, 54),
    "Nepal": (147, 30),
    "Niger": (1270, 26),
    "Nigeria": (924, 228),
    "Norway": (385, 5),
    "Pakistan": (796, 248),
    "Peru": (1290, 34),
    "Poland": (313, 37),
    "Portugal": (92, 11),
    "Romania": (238, 19),
    "Somalia": (638, 18),
    "Spain": (506, 48),
    "Sweden": (450, 11),
    "Tanzania": (945, 67),
    "Thailand": (513, 72),
    "Turkey": (784, 85),
    "Tunisia": (164, 12),
    "Uganda": (242, 49),
    "Ukraine": (604, 38),
    "Vietnam": (331, 100),
    "Yemen": (528, 39),
    "Zambia": (753, 21),
}

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        # Latin, Greek and superseded names of elements
        "Argentum": "Silver",
        "Aurum": "Gold",
        "Brimstone": "Sulfur",
        "Columbium": "Niobium",
        "Cuprum": "Copper",
        "Ferrum": "Iron",
        "Kalium": "Potassium",
        "Natrium": "Sodium",
        "Plumbum": "Lead",
        "Stannum": "Tin",
        "Wolfram": "Tungsten",
        # other names of mountains
        "Cervino": "Matterhorn",
        "Chomolungma": "Everest",
        "Citlaltepetl": "Orizaba",
        "Cook": "Aoraki",
        "Masis": "Ararat",
        "McKinley": "Denali",
        "Mytikas": "Olympus",
        "Sagarmatha": "Everest",
        "Tahoma": "Rainier",
        "Wyeast": "Hood",
        # former, poetic and native names of countries
        "Burma": "Myanmar",
        "Dahomey": "Benin",
        "Hellas": "Greece",
        "Hibernia": "Ireland",
        "Hispania": "Spain",
        "Lusitania": "Portugal",
        "Mesopotamia": "Iraq",
        "Nippon": "Japan",
        "Nyasaland": "Malawi",
        "Persia": "Iran",
        "Siam": "Thailand",
        "Suomi": "Finland",
        "Tanganyika": "Tanzania",
    }
)
"""Alias → the title of the passages with its facts."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number in a passage. Its unit may differ from the questions' unit.

    Attributes:
        digits: The digits as written, `505` or `2.38`.
        unit: The text after them, with its leading space: ` °C`, ` K`, ` m`, ` ft`, ` thousand km²`, ` million km²` or
            ` million`; empty for a year.
    """

    digits: str
    unit: str

    def __str__(self) -> str:
        return self.digits + self.unit

    @property
    def number(self) -> float:
        """The value without conversion."""
        return float(self.digits) if "." in self.digits else int(self.digits)

    @property
    def needs_conversion(self) -> bool:
        """Whether the unit differs from the questions' unit."""
        return self.unit in _CONVERSIONS

    @property
    def expression(self) -> str:
        """A Python expression of the value in the questions' unit: `(505-273)`, `12388*0.3048`."""
        return _CONVERSIONS[self.unit][0].format(self.digits) if self.needs_conversion else self.digits

    @property
    def converted(self) -> float:
        """The value of `expression`, with the same arithmetic."""
        return _CONVERSIONS[self.unit][1](self.number) if self.needs_conversion else self.number


_CONVERSIONS: Mapping[str, tuple[str, Callable[[float], float]]] = MappingProxyType(
    {
        " K": ("({}-273)", lambda kelvin: kelvin - 273),  # precise enough: the passages have whole degrees
        " ft": ("{}*0.3048", lambda feet: feet * 0.3048),
        " million km²": ("{}*1000", lambda millions: millions * 1000),
    }
)


@dataclass(frozen=True, slots=True)
class Topic:
    """One kind of entity, with the property in the questions and the sentences of its passages.

    Attributes:
        asked: The property in the questions.
        unit: The unit of the questions.
        asked_sentence: The format string of a passage with that property, for a title and a quantity.
        other_sentence: The format string for the other property, which is in no question.
        asked_quantities: Title → quantity of the asked property.
        other_quantities: Title → quantity of the other property.
    """

    asked: str
    unit: str
    asked_sentence: str
    other_sentence: str
    asked_quantities: Mapping[str, Quantity]
    other_quantities: Mapping[str, Quantity]

    @property
    def titles(self) -> tuple[str, ...]:
        return tuple(self.asked_quantities)


def _celsius_or_kelvin(degrees: int, other_unit: bool) -> Quantity:
    return Quantity(str(degrees + 273), " K") if other_unit else Quantity(str(degrees), " °C")


def _metres_or_feet(metres: int, other_unit: bool) -> Quantity:
    return Quantity(str(round(metres / 0.3048)), " ft") if other_unit else Quantity(str(metres), " m")


def _area(thousands: int) -> Quantity:
    if thousands < 1000:
        return Quantity(str(thousands), " thousand km²")
    return Quantity(f"{thousands / 1000:.2f}", " million km²")


def _make_topics() -> tuple[Topic, ...]:
    rng = random.Random(_SEED)

    def is_other_unit() -> bool:
        return rng.random() < _OTHER_UNIT_SHARE

    return (
        Topic(
            asked="melting point",
            unit="°C",
            asked_sentence="{} melts at {}.",
            other_sentence="{} boils at {}.",
            asked_quantities={
                name: _celsius_or_kelvin(melts, is_other_unit()) for name, (melts, _) in _ELEMENTS.items()
            },
            other_quantities={
                name: _celsius_or_kelvin(boils, is_other_unit()) for name, (_, boils) in _ELEMENTS.items()
            },
        ),
        Topic(
            asked="height",
            unit="m",
            asked_sentence="{} rises to {}.",
            other_sentence="{} was first climbed in {}.",
            asked_quantities={
                name: _metres_or_feet(height, is_other_unit()) for name, (height, _) in _MOUNTAINS.items()
            },
            other_quantities={name: Quantity(str(year), "") for name, (_, year) in _MOUNTAINS.items()},
        ),
        Topic(
            asked="area",
            unit="thousand km²",
            asked_sentence="{} covers {}.",
            other_sentence="{} counts {} people.",
            asked_quantities={name: _area(area) for name, (area, _) in _COUNTRIES.items()},
            other_quantities={name: Quantity(str(people), " million") for name, (_, people) in _COUNTRIES.items()},
        ),
    )


TOPICS = _make_topics()


def passages() -> list[str]:
    """Return all passages in a fixed shuffled order, so that the order does not reveal the asked property."""
    texts = [f"{alias} is only another name; look under {title}." for alias, title in ALIASES.items()]
    for topic in TOPICS:
        for title in topic.titles:
            texts.append(topic.asked_sentence.format(title, topic.asked_quantities[title]))
            texts.append(topic.other_sentence.format(title, topic.other_quantities[title]))
    random.Random(_SEED).shuffle(texts)
    return texts
