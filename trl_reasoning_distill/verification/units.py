r"""Units of measure: what they measure, and how many of the base unit they are.

A table of our own: pint builds its registry at each start, and knows neither "Stunden" nor "千米" nor how to tell a unit from a noun or a variable. Factors
are exact, so that `3 h 20 min` is 200 min and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from trl_reasoning_distill.verification.expressions import Token

Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measure.

    Attributes:
        name: As it was written.
        factor: How many base units it is.
        dimension: Base units and their powers, sorted: `(("m", 1), ("s", -1))`.
        offset: Base units at its zero; temperatures only.
    """

    name: str
    factor: Fraction
    dimension: Dimension
    offset: Fraction = Fraction(0)


_UNITS: dict[str, tuple[Fraction, Dimension, Fraction]] = {}
_DIMENSIONS: dict[str, Dimension] = {"litre": (("m", 3),), "area": (("m", 2),), "W": (("J", 1), ("s", -1))}
"""Bases that are made of others."""


def _add(base: str, factor: str | int | Fraction, words: str, offset: Fraction = Fraction(0)) -> None:
    """Enter a unit under all its names; `_` stands for a space."""
    for word in words.split():
        _UNITS[word.replace("_", " ")] = (Fraction(factor), _DIMENSIONS.get(base, ((base, 1),)), offset)


def _add_si(base: str, factor: str | Fraction, symbol: str, words: str, cjk: str = "") -> None:
    """A unit with its prefixes; each of the words is one stem, with its plurals."""
    prefixes = (
        ("", "", "", 0),
        ("k", "kilo", "千", 3),
        ("c", "centi", "厘", -2),
        ("m", "milli", "毫", -3),
        ("d", "deci", "分", -1),
        ("M", "mega", "兆", 6),
        ("G", "giga", "", 9),
        ("n", "nano", "纳", -9),
    )
    for short, long, chinese, power in prefixes:
        size = Fraction(factor) * Fraction(10) ** power
        names = [short + symbol] * bool(symbol)
        for stem in words.split():
            names += [long + stem, long + stem + "s", long + stem + "n", long + stem + "es"]
        names += [chinese + name for name in cjk.split()] if chinese or not short else []
        _add(base, size, " ".join(names))


_add_si("m", "1", "m", "meter metre mètre metro метр метра метров", "米")
_add_si("g", "1", "g", "gram gramme gramm gramo grama грамм грамма граммов", "克")
_add_si("s", "1", "s", "second seconde sekunde segundo секунда секунды секунд", "秒")
_add_si("litre", "1/1000", "L", "liter litre litro литр литра литров", "升")
_add_si("litre", "1/1000", "l", "")
_add_si("W", "1", "W", "watt", "瓦")
_add_si("J", "1", "J", "joule", "焦")
_add_si("V", "1", "V", "volt", "伏")
_add_si("A", "1", "A", "ampere amp")
_add_si("Hz", "1", "Hz", "hertz", "赫兹")
_add_si("N", "1", "N", "newton", "牛")
_add_si("Pa", "1", "Pa", "pascal", "帕")
_add_si("eV", "1", "eV", "electronvolt")
_add_si("mol", "1", "mol", "mole", "摩尔")
_add_si("ohm", "1", "", "ohm", "欧姆")
_add("m", 1000, "км километр километра километров 公里 千米 klicks キロメートル")
_add("m", 1, "メートル м")
_add("m", "1/100", "см センチメートル センチ cms")
_add("m", "1/1000", "мм")
_add("m", "1/1000000", "micrometer micrometers micron microns um 微米")
_add("m", "127/5000", "in inch inches 英寸")
_add("m", "381/1250", "ft foot feet 英尺")
_add("m", "1143/1250", "yd yard yards 码")
_add("m", "201168/125", "mi mile miles 英里")
_add("m", 1852, "nmi nautical_mile nautical_miles 海里")
_add("g", 1000, "кг kgs kilo kilos 公斤 千克 キログラム キロ")
_add("g", 1, "г グラム gms gm")
_add("g", 500, "斤")
_add("g", 1000000, "t ton tons tonne tonnes Tonne Tonnen tonelada toneladas тонна тонны тонн 吨")
_add("g", "45359237/100000", "lb lbs pound_of pounds_of 磅")
_add("g", "45359237/1600000", "oz ounce ounces 盎司")
_add("s", 1, "sec secs сек с 秒钟")
_add("s", 60, "min mins minute minutes Minute Minuten minuto minutos минута минуты минут мин 分 分钟 分鐘 分間")
_add("s", 3600, "h hr hrs hour hours heure heures Stunde Stunden hora horas час часа часов ч 时 小时 小時 時間 个小时")
_add("s", 86400, "d day days jour jours Tag Tage Tagen día días dia dias день дня дней 天 日")
_add("s", 604800, "wk week weeks semaine semaines Woche Wochen semana semanas неделя недели недель 周 星期 週間")
_add("month", 1, "month months mois Monat Monate Monaten mes meses месяц месяца месяцев 个月 月 か月 ヶ月")
_add("month", 12, "yr yrs year years an ans année années Jahr Jahre Jahren año años ano anos год года лет 年")
_add("month", 120, "decade decades")
_add("month", 1200, "century centuries")
_add("litre", "473176473/125000000000", "gal gallon gallons 加仑")
_add("litre", "473176473/500000000000", "qt quart quarts")
_add("litre", "473176473/1000000000000", "pt pint pints")
_add("litre", "473176473/2000000000000", "cup cups")
_add("litre", "1/1000", "л リットル")
_add("litre", "1/1000000", "cc мл")
_add("$", 1, "$ dollar dollars USD US$ bucks buck 美元 доллар доллара долларов Dollar ドル")
_add("$", "1/100", "cent cents ¢ 美分 penny pennies")
_add("€", 1, "€ euro euros EUR Euro 欧元 евро")
_add("£", 1, "£ pound pounds GBP 英镑 quid")
_add("£", "1/100", "pence")
_add("CNY", 1, "元 yuan RMB CNY 块 人民币 块钱")
_add("CNY", "1/10", "角 毛")
_add("JPY", 1, "円 yen JPY 日元")
_add("¥", 1, "¥")
_add("₹", 1, "₹ rupee rupees Rs INR 卢比")
_add("RUB", 1, "₽ рубль рубля рублей RUB руб")
_add("byte", 1, "byte bytes B Byte Bytes 字节 octet octets")
_add("byte", "1/8", "bit bits 比特")
for _power, _names in enumerate(
    (("kB KB kilobyte kilobytes"), ("MB megabyte megabytes"), ("GB gigabyte gigabytes"), ("TB terabyte terabytes")),
    start=1,
):
    _add("byte", 1000**_power, _names)
for _power, _names in enumerate(
    (("KiB kibibyte kibibytes"), ("MiB mebibyte mebibytes"), ("GiB gibibyte gibibytes"), ("TiB tebibyte tebibytes")),
    start=1,
):
    _add("byte", 1024**_power, _names)
for _power, _names in enumerate(
    (("kb kbit kilobit kilobits"), ("Mb Mbit megabit megabits"), ("Gb Gbit gigabit gigabits")), start=1
):
    _add("byte", Fraction(1000**_power, 8), _names)
_add("deg", 1, "deg degs degree degrees degré degrés Grad grado grados grau graus градус градуса градусов 度")
_add("rad", 1, "rad rads radian radians radiane radianes Radiant радиан радиана радианов 弧度")
_add("deg", 360, "revolution revolutions turn turns")
_add("K", 1, "K kelvin kelvins Kelvin 开尔文")
_add("K", 1, "°C celsius Celsius 摄氏度 degrees_Celsius degree_Celsius degrees_celsius degrees_C", Fraction(27315, 100))
_add(
    "K",
    "5/9",
    "°F fahrenheit Fahrenheit 华氏度 degrees_Fahrenheit degree_Fahrenheit degrees_fahrenheit degrees_F",
    Fraction(45967, 180),
)
_add("J", "4184/1000", "cal calorie calories")
_add("J", 4184, "kcal kilocalorie kilocalories 千卡")
_add("J", 3600000, "kWh")

_COMPOSED = {  # name: the units it stands for
    "mph": (("mi", 1), ("h", -1)), "kph": (("km", 1), ("h", -1)), "kmh": (("km", 1), ("h", -1)), "kmph": (("km", 1), ("h", -1)), "mpg": (("mi", 1), ("gal", -1)), "fps": (("ft", 1), ("s", -1)),
    "rpm": (("turn", 1), ("min", -1)), "bps": (("bit", 1), ("s", -1)), "Mbps": (("Mbit", 1), ("s", -1)), "Gbps": (("Gbit", 1), ("s", -1)), "kbps": (("kbit", 1), ("s", -1)), "км/ч": (("km", 1), ("h", -1)),
    "千米每小时": (("km", 1), ("h", -1)), "米每秒": (("m", 1), ("s", -1)), "公里每小时": (("km", 1), ("h", -1)),
}  # fmt: skip
_add("area", 10000, "ha hectare hectares 公顷")
_add("area", "40468564224/10000000", "acre acres 英亩")
_add("area", "2000/3", "亩")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3, "quadrat": 2, "kubik": 3}
_POWERS_AFTER = {
    "squared": 2,
    "cubed": 3,
    "carré": 2,
    "carrés": 2,
    "cuadrado": 2,
    "cuadrados": 2,
    "quadrado": 2,
    "quadrados": 2,
    "cúbico": 3,
    "cúbicos": 3,
    "cube": 3,
    "cubes": 3,
}
_PER = frozenset({"per", "/", "par", "por", "pro", "each", "每", "в"})
SINGLE_LETTERS = frozenset(name for name in _UNITS if len(name) == 1 and name.isascii() and name.isalpha())
AMBIGUOUS = frozenset({"in", "an", "are", "pro", "second", "par", "cube", "d", "mes", "min"})
"""Words that are units only behind a number, and otherwise other words."""
CURRENCY_SIGNS = frozenset("$€£¥₹₽")


def unit_named(name: str) -> Unit | None:
    """The unit of this name, which may be a power in one word (`平方米`, `Quadratmeter`); `None` if there is none."""
    for prefix, power in _POWERS.items():
        rest = name.lower().removeprefix(prefix) if len(prefix) > 2 or not prefix.isascii() else name
        if rest != name.lower() and rest != name and rest and (found := unit_named(rest)) is not None:
            return _raise(found, power, name)
    if name in _COMPOSED:
        unit = Unit(name, Fraction(1), ())
        for part, power in _COMPOSED[name]:
            unit = _multiply(unit, _raise(_simple(part), power, part), name)  # type: ignore[arg-type]
        return unit
    return _simple(name)


def _simple(name: str) -> Unit | None:
    found = _UNITS.get(name) or (_UNITS.get(name.lower()) if len(name) > 3 else None)
    if found is None:
        return None
    return Unit(name, *found)


def _raise(unit: Unit, power: int, name: str) -> Unit:
    return Unit(
        name,
        unit.factor**power,
        tuple((base, exponent * power) for base, exponent in unit.dimension),
        unit.offset if power == 1 else Fraction(0),
    )


def _multiply(a: Unit, b: Unit, name: str) -> Unit:
    powers = dict(a.dimension)
    for base, power in b.dimension:
        powers[base] = powers.get(base, 0) + power
    return Unit(name, a.factor * b.factor, tuple(sorted((base, power) for base, power in powers.items() if power)))


def divided(unit: Unit, by: Unit) -> Unit:
    """`km` and `h` make `km/h`."""
    return _multiply(unit, _raise(by, -1, by.name), f"{unit.name}/{by.name}")


def read_unit(tokens: Sequence[Token], start: int) -> tuple[Unit, int] | None:
    """Read the longest unit that begins at a token: `km/h`, `square miles`, `kg m^2 / s^2`, `^\\circ C`.

    Returns:
        The unit and the index of the token after it; `None` if no unit stands there.
    """
    found = _factor(tokens, start)
    if found is None:
        return None
    unit, position = found
    while position < len(tokens):
        token = tokens[position]
        is_per = token.text in _PER
        step = 1 if is_per or token.text in ("\\cdot", "*", "\\times") else 0
        after = _factor(tokens, position + step)
        if after is None or (not step and not (token.is_spaced or token.is_quoted)):
            break
        if not step and unit.dimension == after[0].dimension:
            break  # `ft 3 in`, `dollars cents`
        power = -1 if is_per else 1
        unit = _multiply(
            unit, _raise(after[0], power, after[0].name), f"{unit.name}{'/' if is_per else ' '}{after[0].name}"
        )
        position = after[1]
    return unit, position


def _factor(tokens: Sequence[Token], start: int) -> tuple[Unit, int] | None:
    """One unit with its power."""
    if start >= len(tokens):
        return None
    degrees = _degrees(tokens, start)
    if degrees is not None:
        return degrees
    texts = [token.text for token in tokens[start : start + 2]]
    if (
        texts[0] == "{"
        and (inner := _factor(tokens, start + 1))
        and inner[1] < len(tokens)
        and tokens[inner[1]].text == "}"
    ):
        return _powered(inner[0], tokens, inner[1] + 1)
    if texts[0].lower().rstrip(".") in _POWERS and texts[0] not in _UNITS:
        dot = len(texts) > 1 and texts[1] == "."
        found = _factor(tokens, start + 1 + dot)
        return (
            None
            if found is None
            else (_raise(found[0], _POWERS[texts[0].lower()], f"{texts[0]} {found[0].name}"), found[1])
        )
    if tokens[start].kind not in ("run", "op"):
        return None
    two = " ".join(texts)
    if len(texts) == 2 and two in _UNITS:
        return _powered(unit_named(two), tokens, start + 2)  # type: ignore[arg-type]
    unit = unit_named(texts[0])
    return None if unit is None else _powered(unit, tokens, start + 1)


def _degrees(tokens: Sequence[Token], start: int) -> tuple[Unit, int] | None:
    r"""`^\circ`, `^{\circ}`, `\circ`, with a C or F behind it perhaps."""
    texts = [token.text for token in tokens[start : start + 4]]
    for mark in (["^", "\\circ"], ["^", "{", "\\circ", "}"], ["\\circ"]):
        if texts[: len(mark)] == mark:
            after = start + len(mark)
            scale = tokens[after].text if after < len(tokens) and tokens[after].text in ("C", "F") else ""
            unit = unit_named(f"°{scale}" if scale else "deg")
            assert unit is not None
            return Unit(f"°{scale}", unit.factor, unit.dimension, unit.offset), after + bool(scale)
    return None


def _powered(unit: Unit, tokens: Sequence[Token], position: int) -> tuple[Unit, int]:
    texts = [token.text for token in tokens[position : position + 5]]
    sign, digits, length = 1, "", 0
    if texts[:1] == ["^"] and len(texts) > 1:
        inner = texts[2:] if texts[1] == "{" else texts[1:]
        if inner[:1] == ["-"]:
            sign, inner = -1, inner[1:]
        digits = inner[0] if inner else ""
        length = 2 + (sign < 0) + 2 * (texts[1] == "{")
    if digits.isdecimal() and len(digits) == 1:
        return _raise(unit, sign * int(digits), f"{unit.name}^{digits}"), position + length
    if texts and texts[0] in _POWERS_AFTER:
        return _raise(unit, _POWERS_AFTER[texts[0]], f"{unit.name} {texts[0]}"), position + 1
    return unit, position
