"""The tools of this project. `config.yaml` names them as my_tools:NAME."""

FACTS = (
    "Albania Tirana, Algeria Algiers, Angola Luanda, Armenia Yerevan, Austria Vienna, Belarus Minsk, Belgium Brussels",
    "Brazil Brasilia, Bulgaria Sofia, Canada Ottawa, Chile Santiago, China Beijing, Colombia Bogota, Croatia Zagreb",
    "Cuba Havana, Cyprus Nicosia, Denmark Copenhagen, Ecuador Quito, Egypt Cairo, Estonia Tallinn, Finland Helsinki",
    "France Paris, Gabon Libreville, Georgia Tbilisi, Germany Berlin, Ghana Accra, Greece Athens, Hungary Budapest",
    "Iceland Reykjavik, Iran Tehran, Iraq Baghdad, Ireland Dublin, Italy Rome, Japan Tokyo, Kenya Nairobi",
)
CAPITALS = dict(fact.split() for line in FACTS for fact in line.split(", "))


def lookup(country: str) -> str:
    """Looks up the capital of a country.

    Args:
        country: Its name in English.
    """
    capital = CAPITALS.get(country.strip())
    if capital is None:
        return f"There is no country {country.strip()}."
    return f"The capital of {country.strip()} is {capital}."
