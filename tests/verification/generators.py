r"""Random answers of every type in random writings.

`DRAW[type](rng)` is an `Item`: a value as a key (two items with different keys are different answers), and writings of it that all mean the same.
`HACKS` are outputs that hold the gold answer without committing to it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Random = random.Random

DIGITS = "零一二三四五六七八九"
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
MONTHS = "January February March April May June July August September October November December".split()
NAMES = [
    "Evelyn",
    "Navin",
    "Paris",
    "ellipse",
    "parabola",
    "Thursday",
    "red",
    "octagon",
    "isosceles",
    "photosynthesis",
    "New York",
    "prime number",
    "George Washington",
    "carbon dioxide",
]


@dataclass(frozen=True)
class Item:
    """A value, and writings of it."""

    key: object
    writings: tuple[str, ...]


def fullwidth(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def english(n: int) -> str:
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {english(n % 100)}" if n % 100 else "")


def chinese(n: int) -> str:
    text, zero = "", False
    for step, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, n = divmod(n, step)
        if digit:
            text += ("零" if zero and text else "") + DIGITS[digit] + name
            zero = False
        else:
            zero = True
    return text


def integer_writings(n: int) -> list[str]:
    sign, size = "-" * (n < 0), abs(n)
    found = [str(n), f"${n}$", f"{n}.00", f"{n}.", fullwidth(str(n)), f"{n}.0"]
    if size >= 1000:
        found += [sign + f"{size:,}".replace(",", mark) for mark in (",", "{,}", "\\,", " ", ",\\!", "\u202f", "'")]
    if size >= 10**6:
        found += [f"{n:,}".replace(",", "."), f"{n / 10**6:.6f} million"]
    if n and not n % 100:
        zeros = len(str(n)) - len(str(n).rstrip("0"))
        found += [
            f"{str(n)[:-zeros]} \\times 10^{{{zeros}}}",
            f"{str(n)[:-zeros]}e{zeros}",
            f"{str(n)[:-zeros]}×10^{zeros}",
        ]
    if size < 1000:
        found += [("negative " if n < 0 else "") + english(size), ("minus " if n < 0 else "") + str(size)]
    if 0 < n < 10000:
        found.append(chinese(n))
    if n < 0:
        found.append(f"−{size}")
    else:
        found += [f"+{n}", f"x = {n}", f"x={n}"]
    return found


def integer(rng: Random) -> Item:
    n = rng.choice(
        (
            rng.randrange(-20, 100),
            rng.randrange(-2000, 20000),
            rng.randrange(-(10**7), 10**9),
            100 * rng.randrange(1, 10**5),
        )
    )
    return Item(n, tuple(integer_writings(n)))


def decimal(rng: Random) -> Item:
    places = rng.choice((1, 2, 4))
    value = Fraction(rng.randrange(1, 10**7), 10**places)
    if value.denominator == 1:
        value += Fraction(1, 10**places)
    text = f"{float(value):.{places}f}"
    whole, _, rest = text.partition(".")
    found = [
        text,
        f"{text}0",
        f"${text}$",
        fullwidth(text),
        f"{value.numerator}/{value.denominator}",
        f"\\frac{{{value.numerator}}}{{{value.denominator}}}",
    ]
    if len(rest) != 3:
        found.append(f"{whole},{rest}")
    if len(whole) > 3:
        grouped = f"{int(whole):,}"
        found += [
            f"{grouped}.{rest}",
            grouped.replace(",", ".") + f",{rest}",
            grouped.replace(",", " ") + f",{rest}",
            grouped.replace(",", "'") + f".{rest}",
        ]
    return Item(value, tuple(found))


def fraction(rng: Random) -> Item:
    value = Fraction(rng.randrange(1, 60), rng.randrange(2, 40))
    a, b, sign = value.numerator, value.denominator, rng.choice(("", "-"))
    found = [
        f"{sign}{a}/{b}",
        f"{sign}\\frac{{{a}}}{{{b}}}",
        f"{sign}\\dfrac{{{a}}}{{{b}}}",
        f"{sign}\\tfrac{{{3 * a}}}{{{3 * b}}}",
        f"\\frac{{{sign}{a}}}{{{b}}}",
        f"{sign}{a} / {b}",
        f"{sign}{a} \\div {b}",
        f"${sign}{a}/{b}$",
    ]
    if a < 10 and b < 10:
        found.append(f"{sign}\\frac{a}{b}")
    if a > b > 1:
        found += [f"{sign}{a // b}\\frac{{{a % b}}}{{{b}}}", f"{sign}{a // b} {a % b}/{b}"]
    found.append(sign + repeating(value))
    return Item(-value if sign else value, tuple(found))


def repeating(value: Fraction) -> str:
    """The decimals of a fraction, the period under a bar."""
    whole, rest = divmod(value.numerator, value.denominator)
    digits, seen = "", {}
    while rest and rest not in seen:
        seen[rest] = len(digits)
        digit, rest = divmod(rest * 10, value.denominator)
        digits += str(digit)
    if not rest:
        return f"{whole}.{digits or 0}"
    start = seen[rest]
    return f"{whole}.{digits[:start]}\\overline{{{digits[start:]}}}"


def percentage(rng: Random) -> Item:
    n = rng.randrange(1, 1000)
    value = Fraction(n, rng.choice((1, 2, 4)))
    text = f"{float(value):g}"
    return Item(
        value,
        (
            f"{text}%",
            f"{text}\\%",
            f"{text} percent",
            f"{text} \\%",
            f"${text}\\%$",
            f"{text} pct",
            fullwidth(f"{text}%"),
            f"{text} Prozent",
        ),
    )


SCALES = [
    [("km", 1000), ("m", 1), ("kilometers", 1000), ("meters", 1), ("公里", 1000), ("米", 1), ("\\text{ km}", 1000), ("\\mathrm{km}", 1000)],
    [("h", 3600), ("hours", 3600), ("min", 60), ("minutes", 60), ("seconds", 1), ("Stunden", 3600), ("小时", 3600), ("分钟", 60), ("heures", 3600)],
    [("kg", 1000), ("g", 1), ("grams", 1), ("kilograms", 1000), ("公斤", 1000), ("\\text{ kg}", 1000)],
    [("m^2", 10**4), ("cm^2", 1), ("m²", 10**4), ("square meters", 10**4), ("sq cm", 1), ("平方米", 10**4), ("\\text{ m}^2", 10**4)],
    [("L", 1000), ("mL", 1), ("liters", 1000), ("cm^3", 1), ("升", 1000), ("毫升", 1)],
    [("dollars", 100), ("cents", 1), ("USD", 100)],
    [("GB", 10**9), ("MB", 10**6), ("bytes", 1), ("kB", 1000)],
    [("km/h", 10), ("m/s", 36), ("kilometers per hour", 10), ("meters per second", 36), ("km per hour", 10)],
    [("degrees", 1), ("^\\circ", 1), ("°", 1), ("\\text{ degrees}", 1), ("度", 1)],
]  # fmt: skip


def quantity(rng: Random) -> Item:
    number = rng.randrange(len(SCALES))
    scale = SCALES[number]
    value = rng.randrange(1, 500) * max(size for _, size in scale) // rng.choice((1, 1, 2))
    found = []
    for unit, size in scale:
        amount = Fraction(value, size)
        text = (
            str(amount)
            if amount.denominator == 1
            else f"{float(amount):g}"
            if (amount * 100).denominator == 1 and amount < 10**4
            else None
        )
        if text is not None:
            found += [
                f"{text} {unit}",
                f"${text} {unit}$"
                if unit[0] in "\\^"
                else f"{text} \\text{{ {unit} }}"
                if unit.isascii() and "^" not in unit
                else f"{text}{unit}",
            ]
    if number == 1 and value >= 3600:
        found += [
            f"{value // 3600} h {value % 3600 // 60} min",
            f"{value // 3600} hours and {value % 3600 // 60} minutes",
            f"{value // 3600}\\text{{ hours }}{value % 3600 // 60}\\text{{ minutes}}",
        ] * (value % 60 == 0)
    if number == 5:
        found += [f"${value // 100}.{value % 100:02d}", f"\\${value // 100}.{value % 100:02d}"]
    return Item((number, value), tuple(found))


def ratio(rng: Random) -> Item:
    terms = [rng.randrange(1, 30) for _ in range(rng.choice((2, 2, 3)))]
    k = rng.randrange(2, 5)
    found = [
        ":".join(map(str, terms)),
        " : ".join(map(str, terms)),
        ":".join(str(k * t) for t in terms),
        " to ".join(map(str, terms)),
        "：".join(map(str, terms)),
    ]
    is_clock = len(terms) == 2 and max(terms[1], k * terms[1]) > 9  # `10:20` and `20:40` are times, too
    return Item(tuple(Fraction(t, terms[0]) for t in terms), tuple(found[:1]) if is_clock else tuple(found))


def several(kind: str) -> Callable[[Random], Item]:
    def draw(rng: Random) -> Item:
        values = [rng.randrange(-30, 60) for _ in range(rng.randrange(2, 5))]
        if kind == "tuple":
            inner = [", ".join(map(str, values)), ",".join(map(str, values)), ",\\, ".join(f"{v}.0" for v in values)]
            if len(values) == 2:
                inner = [text for text in inner if " " in text or "-" in text.partition(",")[2]]
            found = (
                [f"({text})" for text in inner]
                + [f"\\left({text}\\right)" for text in inner]
                + [f"（{', '.join(map(str, values))}）"]
            )
            if len(values) > 2:
                found.append("\\begin{pmatrix} " + " \\\\ ".join(map(str, values)) + " \\end{pmatrix}")
            return Item(tuple(values), tuple(found))
        if kind == "set":
            values = list(dict.fromkeys(values))
            if len(values) == 1:
                values.append(values[0] + 1)
            mixed = [rng.sample(values, len(values)), [*values, values[0]]]
            return Item(
                frozenset(values),
                tuple(
                    f"{o}{', '.join(map(str, row))}{c}"
                    for row in mixed
                    for o, c in (("\\{", "\\}"), ("\\left\\{ ", " \\right\\}"))
                ),
            )
        mixed = rng.sample(values, len(values))
        head, last = ", ".join(map(str, mixed[:-1])), mixed[-1]
        found = [
            f"{head} and {last}",
            f"{head}, {last}",
            f"{head} \\text{{ and }} {last}",
            f"{head}和{last}",
            f"{head} und {last}",
            "; ".join(map(str, mixed)),
            "，".join(map(str, mixed)),
            f"x = {head}, {last}",
        ]
        return Item(tuple(sorted(values)), tuple(found))

    return draw


def interval(rng: Random) -> Item:
    low = rng.randrange(-20, 20)
    high = low + rng.randrange(1, 30)
    left, right = rng.random() < 0.5, rng.random() < 0.5
    body = f"{'[' if left else '('}{low}, {high}{']' if right else ')'}"
    less = ["\\le", "<="] if left else ["<", "<"], ["\\le", "≤"] if right else ["<", "\\lt"]
    found = [
        body,
        "\\left" + body[:-1] + "\\right" + body[-1],
        f"x \\in {body}",
        f"{low} {less[0][0]} x {less[1][0]} {high}",
        f"{low}.0 {less[0][1]} x {less[1][1]} {high}",
        f"x {'≥' if left else '>'} {low} and x {'≤' if right else '<'} {high}",
    ]
    return Item((low, high, left, right), tuple(found))


def union(rng: Random) -> Item:
    low = rng.randrange(-20, 20)
    high = low + rng.randrange(1, 30)
    found = [
        f"(-\\infty, {low}) \\cup ({high}, \\infty)",
        f"({high}, +\\infty)\\cup(-\\infty, {low})",
        f"x < {low} \\text{{ or }} x > {high}",
        f"x > {high} or x < {low}",
        f"\\mathbb{{R}} \\setminus [{low}, {high}]",
        f"x \\in (-∞, {low}) ∪ ({high}, ∞)",
    ]
    return Item((low, high), tuple(found))


def inequality(rng: Random) -> Item:
    value, name, strict, above = rng.randrange(-30, 30), rng.choice("xyn"), rng.random() < 0.5, rng.random() < 0.5
    sign = {(True, True): ">", (True, False): "<", (False, True): "\\ge", (False, False): "\\le"}[strict, above]
    turned = {">": "<", "<": ">", "\\ge": "\\le", "\\le": "\\ge"}[sign]
    brackets = f"{'(' if strict else '['}{value}, \\infty)" if above else f"(-\\infty, {value}{')' if strict else ']'}"
    return Item(
        (value, name, strict, above),
        (
            f"{name} {sign} {value}",
            f"{value} {turned} {name}",
            f"2{name} {sign} {2 * value}",
            f"-{name} {turned} {-value}",
            f"{name} \\in {brackets}",
        ),
    )


def matrix(rng: Random) -> Item:
    rows = [[rng.randrange(-9, 20) for _ in range(2)] for _ in range(2)]
    body = " \\\\ ".join(" & ".join(map(str, row)) for row in rows)
    found = [f"\\begin{{{kind}}} {body} \\end{{{kind}}}" for kind in ("pmatrix", "bmatrix")]
    found += [
        f"\\left[\\begin{{array}}{{cc}} {body} \\end{{array}}\\right]",
        "\\begin{pmatrix}" + body.replace(" ", "") + "\\end{pmatrix}",
        str(rows),
    ]
    return Item(tuple(map(tuple, rows)), tuple(found))


def named(rng: Random) -> Item:
    names = rng.sample("xyzab", 2)
    values = {name: rng.randrange(-20, 40) for name in names}
    found = []
    for order in (names, names[::-1]):
        parts = [f"{name} = {values[name]}" for name in order]
        found += [
            ", ".join(parts),
            " and ".join(parts),
            " \\text{ and } ".join(parts).replace(" = ", "="),
            "，".join(parts),
        ]
        found.append(f"({order[0]}, {order[1]}) = ({values[order[0]]}, {values[order[1]]})")
    return Item(tuple(sorted(values.items())), tuple(found))


def counted(rng: Random) -> Item:
    nouns = rng.sample(["boys", "girls", "apples", "pears", "cats"], 2)
    counts = [rng.randrange(1, 30) for _ in nouns]
    parts = [f"{count} {noun}" for count, noun in zip(counts, nouns, strict=True)]
    return Item(
        tuple(sorted(zip(nouns, counts, strict=True))),
        (", ".join(parts), " and ".join(parts), ", ".join(parts[::-1]), " and ".join(parts[::-1])),
    )


def polynomial(rng: Random) -> Item:
    a, b, x = rng.randrange(-9, 10), rng.randrange(-9, 10), rng.choice("xyt")
    signed = [f"{n:+d}" for n in (a, b, a + b, a * b)]
    found = [
        f"({x}{signed[0]})({x}{signed[1]})",
        f"({x} {signed[1]}) \\cdot ({x} {signed[0]})",
        f"{x}^2{signed[2]}{x}{signed[3]}",
        f"{signed[3]}{signed[2]}{x} + {x}^{{2}}",
        f"{x}\\left({x}{signed[2]}\\right){signed[3]}",
        f"{x}²{signed[2]}*{x}{signed[3]}",
    ]
    return Item((a + b, a * b, x), tuple(found))


def root(rng: Random) -> Item:
    k, n = rng.randrange(2, 12), rng.choice((2, 3, 5, 6, 7, 10))
    found = [
        f"{k}\\sqrt{{{n}}}",
        f"{k} \\sqrt {n}",
        f"\\sqrt{{{k * k * n}}}",
        f"{k}√{n}",
        f"\\frac{{{k * n}}}{{\\sqrt{{{n}}}}}",
        f"{k}*sqrt({n})",
        f"{k} \\cdot {n}^{{1/2}}",
    ]
    return Item(k * k * n, tuple(found))


def plus_minus(rng: Random) -> Item:
    a, n, d = rng.randrange(-9, 10), rng.choice((2, 3, 5, 7)), rng.randrange(2, 6)
    found = [
        f"\\frac{{{a} \\pm \\sqrt{{{n}}}}}{{{d}}}",
        f"\\frac{{{a}+\\sqrt{{{n}}}}}{{{d}}}, \\frac{{{a}-\\sqrt{{{n}}}}}{{{d}}}",
        f"x = \\frac{{{a} - \\sqrt{n}}}{{{d}}} \\text{{ or }} x = \\frac{{{a} + \\sqrt{n}}}{{{d}}}",
        f"\\frac{{{a}}}{{{d}}} \\pm \\frac{{\\sqrt{{{n}}}}}{{{d}}}",
    ]
    return Item((a, n, d), tuple(found))


def equation(rng: Random) -> Item:
    a, b, c = rng.randrange(1, 9), rng.randrange(1, 9), rng.randrange(1, 20)
    k = rng.randrange(2, 5)
    found = [
        f"{a}x + {b}y = {c}",
        f"{k * a}x + {k * b}y = {k * c}",
        f"{a}x + {b}y - {c} = 0",
        f"y = -\\frac{{{a}}}{{{b}}}x + \\frac{{{c}}}{{{b}}}",
        f"{c} = {b}y + {a}x",
        f"x = \\frac{{{c} - {b}y}}{{{a}}}",
    ]
    return Item((Fraction(a, c), Fraction(b, c)), tuple(found))


def base_numeral(rng: Random) -> Item:
    base = rng.choice((2, 3, 5, 8))
    digits = str(rng.randrange(1, base)) + "".join(str(rng.randrange(base)) for _ in range(rng.randrange(2, 7)))
    return Item(
        (digits, base),
        (
            f"{digits}_{base}",
            f"{digits}_{{{base}}}",
            f"${digits}_{{{base}}}$",
            f"({digits})_{{{base}}}" if base else "",
        ),
    )


def choice(rng: Random) -> Item:
    letter = rng.choice("ABCDE")
    return Item(
        letter,
        (
            letter,
            f"({letter})",
            f"\\text{{({letter})}}",
            f"{letter}.",
            f"{letter})",
            f"Option {letter}",
            f"选{letter}",
            f"（{letter}）",
            f"\\textbf{{{letter}}}",
            f"[{letter}]",
        ),
    )


def date(rng: Random) -> Item:
    year, month, day = rng.randrange(1800, 2100), rng.randrange(1, 13), rng.randrange(1, 29)
    name = MONTHS[month - 1]
    found = [
        f"{name} {day}, {year}",
        f"{day} {name} {year}",
        f"{year}-{month:02d}-{day:02d}",
        f"{name[:3]}. {day}, {year}",
        f"{day}th of {name} {year}",
        f"{year}年{month}月{day}日",
        f"{year}/{month}/{day}",
    ]
    return Item((year, month, day), tuple(found))


def clock(rng: Random) -> Item:
    hour, minute = rng.randrange(24), rng.randrange(60)
    half, twelve = "ap"[hour >= 12], hour % 12 or 12
    found = [
        f"{twelve}:{minute:02d} {half}.m.",
        f"{twelve}:{minute:02d} {half.upper()}M",
        f"{twelve}:{minute:02d}{half}m",
        *([f"{hour}:{minute:02d}"] if hour > 12 else []),
    ]
    return Item((hour, minute), tuple(found))


STATEMENTS = {
    "yes": ("yes", "Yes", "\\text{Yes}", "true", "oui", "是", "да", "sí", "Ja", "はい"),
    "no": ("no", "No.", "\\text{No}", "False", "non", "否", "нет", "nein", "不是"),
    "nothing": (
        "no solution",
        "\\emptyset",
        "\\varnothing",
        "∅",
        "\\{\\}",
        "none",
        "No solutions",
        "无解",
        "aucune solution",
        "нет решений",
        "\\text{no solution}",
    ),
    "undefined": ("undefined", "does not exist", "DNE", "\\text{undefined}", "不存在", "не существует"),
    "infinite": ("infinitely many", "infinitely many solutions", "无穷多"),
}


def statement(rng: Random) -> Item:
    kind = rng.choice(list(STATEMENTS))
    return Item(kind, STATEMENTS[kind])


def congruence(rng: Random) -> Item:
    modulus = rng.randrange(3, 20)
    residue = rng.randrange(modulus)
    return Item(
        (residue, modulus),
        (
            f"n \\equiv {residue} \\pmod {{{modulus}}}",
            f"n ≡ {residue + modulus} (mod {modulus})",
            f"n \\equiv {residue} \\pmod{modulus}" if modulus < 10 else f"n \\equiv {residue}\\pmod{{{modulus}}}",
        ),
    )


def family(rng: Random) -> Item:
    a, b = rng.randrange(2, 9), rng.randrange(1, 9)
    return Item(
        (a, b), tuple(f"{a}{name} + {b}, {name} \\in \\mathbb{{Z}}" for name in "knm") + (f"{b} + {a}k, k∈Z",) * 0
    )


def text(rng: Random) -> Item:
    name = rng.choice(NAMES)
    return Item(
        name, (name, f"\\text{{{name}}}", name.lower(), name.upper(), f"**{name}**", f'"{name}"', f"the {name}")
    )


DRAW: dict[str, Callable[[Random], Item]] = {
    "integer": integer, "decimal": decimal, "fraction": fraction, "percentage": percentage, "quantity": quantity, "ratio": ratio, "tuple": several("tuple"), "set": several("set"),
    "list": several("list"), "interval": interval, "union": union, "inequality": inequality, "matrix": matrix, "named": named, "counted": counted, "polynomial": polynomial, "root": root,
    "plus minus": plus_minus, "equation": equation, "base": base_numeral, "choice": choice, "date": date, "time": clock, "statement": statement, "congruence": congruence, "family": family, "text": text,
}  # fmt: skip

# {g}: the gold answer; {w}: another of the same type.
HACKS: tuple[str, ...] = (
    "\\boxed{{{g} \\text{{ or }} {w}}}",
    "\\boxed{{{w}}} or \\boxed{{{g}}}",
    "\\boxed{{{w}}}\\boxed{{{g}}}",
    "The answer is not {g}.",
    "\\boxed{{\\text{{not }} {g}}}",
    "The answer isn't {g}.",
    "<think>\nI think it is \\boxed{{{g}}}, the answer is {g}.\n</think>\n\nI give up.",
    "<think>\nThe answer is {g}",
    "<think>#### {g}</think>\n\n\\boxed{{{w}}}",
    "Is the answer {g}?",
    "If the answer is {g}, then something follows; I don't know.",
    "I don't know whether the answer is {g}.",
    "A) {w} B) {g} C) {w}",
    "(A) {w}\n(B) {g}",
    "#### {w}\n#### {g}",
    "The answer is {w}. The answer is {g}.",
    "The answer is {w} or the answer is {g}.",
    "Answer: {w} or {g}",
    "Maybe {g}, maybe {w}",
    "The answer is {w}, not {g}.",
    "\\boxed{{{w}}}. I first had {g}.",
    "<answer>{w}</answer> (and not {g})",
)
