"""The words that the grammar knows: operators, functions, numbers, truth, and what people put around an answer, in eight languages."""

from __future__ import annotations

import math
import re
from fractions import Fraction

CONJUNCTIONS = frozenset(
    {
        "and",
        "or",
        "und",
        "oder",
        "et",
        "ou",
        "y",
        "o",
        "e",
        "и",
        "или",
        "和",
        "或",
        "与",
        "及",
        "或者",
        "と",
        "または",
        "respectively",
    }
    - {"y", "o", "e"}
)

ALTERNATIVES = frozenset({"or", "oder", "ou", "или", "或", "或者", "または", "\\lor"})
"""Conjunctions that name alternatives."""

FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh", "coth", "ln", "lg", "log", "exp", "sqrt", "max", "min", "gcd", "lcm")},
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{f"a{name}": f"a{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    "cosec": "csc", "floor": "floor", "ceil": "ceil", "abs": "abs", "root": "sqrt",
}  # fmt: skip

NUMBER_SETS = {"R": "real", "Z": "integer", "N": "natural", "Q": "rational", "C": "complex"}

OPERATOR_WORDS = {
    "minus": "-", "negative": "-", "plus": "+", "positive": "+", "times": "*", "percent": "%", "pct": "%", "percentage": "%", "percents": "%", "prozent": "%", "pourcent": "%", "процент": "%",
    "процента": "%", "процентов": "%", "divided by": "/", "x": "x", "負": "-", "负": "-", "moins": "-", "menos": "-", "minuspunkt": "-", "минус": "-",
}  # fmt: skip
OPERATOR_WORDS.pop("x")

SCALES = {
    "dozen": 12, "dozens": 12, "score": 20, "hundred": 100, "thousand": 1000, "million": 10**6, "millions": 10**6, "mio": 10**6, "billion": 10**9, "billions": 10**9, "trillion": 10**12,
    "mille": 1000, "mil": 1000, "tausend": 1000, "тысяч": 1000, "тысячи": 1000, "millionen": 10**6, "millón": 10**6, "millones": 10**6, "milhão": 10**6, "milhões": 10**6, "миллион": 10**6,
    "миллиона": 10**6, "миллионов": 10**6, "pair": 2, "pairs": 2, "gross": 144,
}  # fmt: skip
for _word in ("pair", "pairs", "score"):  # `5 pairs` are five, `score` is what a game ends with
    SCALES.pop(_word)

NOT_NOUNS = frozenset(
    """and or not no non nor neither never minus plus times negative positive over mod modulo root squared cubed factorial half halves third thirds quarter quarters double twice dozen
    hundred thousand million billion trillion percent pct percentage than least most more less fewer between from to under above below up down by divided multiplied choose if when where
    but except without instead is are was were equals equal approximately about nearly almost unless either both maybe perhaps possibly sqrt ln log sin cos tan pi infinity mod
    isn't wrong incorrect false oder und nicht kein pas ou et ni no o ninguno não nem не или и нет больше меньше не不 或 和 不 of for in with out at as because since while
    one two three four five six seven eight nine ten eleven twelve""".split()
) - {"more", "less", "fewer", "both", "third", "thirds", "quarter", "quarters", "up", "down", "times", "no", "o"}
"""Words that no noun phrase behind a number may hold: they change the number's meaning."""

NOT_ALGEBRA = NOT_NOUNS | frozenset(
    "per the is are was has had its our his her all any who why how yes you she he we it to us me my an".split()
)
"""Short words that are never a product of variables."""

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = {
    word: 10 * number
    for number, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
ENGLISH = {word: number for number, word in enumerate(_UNITS)} | _TENS
_MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4, "fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6, "seventh": 7, "sevenths": 7,
    "eighth": 8, "eighths": 8, "ninth": 9, "ninths": 9, "tenth": 10, "tenths": 10, "twelfth": 12, "twelfths": 12, "hundredth": 100, "hundredths": 100,
}  # fmt: skip
_FOREIGN = {
    "fr": "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize",
    "de": "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn zwanzig",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete dieciocho diecinueve veinte",
    "pt": "zero um dois três quatro cinco seis sete oito nove dez onze doze treze quatorze quinze dezesseis dezessete dezoito dezenove vinte",
    "ru": "ноль один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать тринадцать четырнадцать пятнадцать шестнадцать семнадцать восемнадцать девятнадцать двадцать",
}
FOREIGN_NUMBERS = {
    word: number for words in _FOREIGN.values() for number, word in enumerate(words.split()) if word not in ENGLISH
}

_NUMBER_WORD = "|".join(sorted({*ENGLISH, *_MULTIPLES}, key=len, reverse=True))
_NUMBER_WORDS = re.compile(
    rf"(?<![\w\\])(?:(?:{'|'.join(sorted(ENGLISH, key=len, reverse=True))})|an? (?=hundred|thousand|million|billion|trillion))(?:(?:[ -]| and )(?:{_NUMBER_WORD}))*(?![\w-])",
    re.IGNORECASE,
)
_POINT = re.compile(rf"(\d+) point ((?:(?:{'|'.join(_UNITS[:10])})(?: |$))+)", re.IGNORECASE)
_PART = re.compile(
    rf"(?<![\w.])(?:(\d+)(?: and (?:(\d+)|an?))?[ -]|(?<![\w-])(?:an? |one[ -])?)({'|'.join(_PARTS)})(?![\w-])(?! of)",
    re.IGNORECASE,
)

_CHINESE_DIGITS = {character: index for index, character in enumerate("零一二三四五六七八九")} | {
    "〇": 0,
    "两": 2,
    "壹": 1,
    "贰": 2,
    "叁": 3,
    "肆": 4,
    "伍": 5,
    "陆": 6,
    "柒": 7,
    "捌": 8,
    "玖": 9,
    "拾": 0,
}
_CHINESE_DIGITS.pop("拾")
_CHINESE_STEPS = {"十": 10, "百": 100, "千": 1000, "拾": 10, "佰": 100, "仟": 1000}
_CHINESE_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_CHINESE_ALL = "".join((*_CHINESE_DIGITS, *_CHINESE_STEPS, *_CHINESE_MYRIADS, "点"))
_CHINESE_NUMBER = re.compile(rf"[负負]?[{_CHINESE_ALL}]+")
_CHINESE_PARTS = re.compile(r"([负負]?[\d.零一二三四五六七八九十百千两]+)分之([\d.零一二三四五六七八九十百千万两]+)")
_FIGURE_STEP = re.compile(r"(\d+(?:\.\d+)?) ?((?:[百万萬亿億]|千(?![米克瓦卡赫]))+)")
_FIGURE_MYRIAD = re.compile(rf"(?:{_FIGURE_STEP.pattern})+(?:\d{{1,4}}(?![\d.]))?")
_HAN = re.compile(r"[\u4e00-\u9fff]")


def words_to_figures(text: str) -> str:
    """Number words as figures: `twenty-one` → `21`, `two thirds` → `2/3`, `四十二` → `42`, `12万` → `120000`, `三分之二` → `2/3`."""
    if _HAN.search(text):
        text = _chinese_to_figures(text)
    if not text.isascii():
        words = [str(FOREIGN_NUMBERS.get(word.lower(), word)) for word in text.split(" ")]
        text = " ".join(words)
    elif text.lower() in FOREIGN_NUMBERS:
        return str(FOREIGN_NUMBERS[text.lower()])
    text = re.sub(
        r"\bper cent\b",
        "percent",
        re.sub(r"\b(?:an?|one) dozen\b", "12", re.sub(r"\bone-(?=half|third|quarter|fourth|fifth)", "", text)),
    )
    text = _NUMBER_WORDS.sub(lambda match: _english(match[0]), text)
    text = _POINT.sub(
        lambda match: f"{match[1]}." + "".join(str(ENGLISH[word]) for word in match[2].lower().split()), text
    )
    return _PART.sub(_parts, text)


def _parts(match: re.Match[str]) -> str:
    below = _PARTS[match[3].lower()]
    if match[1] is None:
        return f"1/{below}"
    if " and " in match[0].lower():
        return f"({match[1]} + {match[2] or 1}/{below})"
    return f"{match[1]}/{below}"


def _english(phrase: str) -> str:
    words = [word for word in re.split(r"[ -]+", phrase.lower()) if word != "and"]
    total, current, last = 0, 0, 10**15
    for word in words:
        if word in ("a", "an"):
            value = 1
        elif word in ENGLISH:
            value = ENGLISH[word]
            if value >= last or (last < 20) or (last < 100 and value >= 10):
                return phrase  # `five six` is no number
        elif word == "hundred":
            current, last = max(current, 1) * 100, 100
            continue
        else:
            total, current, last = total + max(current, 1) * _MULTIPLES[word], 0, 10**15
            continue
        current, last = current + value, value if word in ENGLISH else 10**15
    return str(total + current)


def _chinese_to_figures(text: str) -> str:
    def part(match: re.Match[str]) -> str:
        below, above = (_chinese_value(side) for side in match.groups())
        if below is None or above is None or not below:
            return match[0]
        return f"{_plain(above)}%" if below == 100 else f"{_plain(above)}/{_plain(below)}"

    text = text.replace("个百分点", "%").replace("百分之百", "100%")
    text = _CHINESE_PARTS.sub(part, text)
    text = _FIGURE_MYRIAD.sub(_myriads, text)

    def whole(match: re.Match[str]) -> str:
        value = _chinese_value(match[0])
        neighbours = text[match.start() - 1 : match.start()] + text[match.end() : match.end() + 1]
        is_word = match[0] in ("点", "一点") or (  # 一 and 千 inside a word are no number; 十 is
            len(match[0]) == 1 and match[0] in "一百千万亿零" and bool(_HAN.search(neighbours))
        )
        return match[0] if value is None or is_word else _plain(value)

    return _CHINESE_NUMBER.sub(whole, text)


def _plain(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    places = next((n for n in range(1, 12) if (value * 10**n).denominator == 1), None)
    return f"{value.numerator}/{value.denominator}" if places is None else f"{float(value):.{places}f}"


def _myriads(match: re.Match[str]) -> str:
    total = Fraction(0)
    for number, steps in _FIGURE_STEP.findall(match[0]):
        total += Fraction(number) * math.prod((_CHINESE_STEPS | _CHINESE_MYRIADS)[step] for step in steps)
    tail = re.search(r"\d+$", match[0])
    return _plain(total + (Fraction(tail[0]) if tail else 0))


def _chinese_value(text: str) -> Fraction | None:
    if not text:
        return None
    sign = -1 if text[0] in "负負" else 1
    text = text.lstrip("负負")
    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        return sign * Fraction(text)
    whole, point, decimals = text.partition("点")
    if point and not (decimals and all(character in _CHINESE_DIGITS for character in decimals)):
        return None
    total, section, digit, digits = 0, 0, 0, ""
    for character in whole:
        if character in _CHINESE_DIGITS:
            digit = _CHINESE_DIGITS[character]
            digits += str(digit)
        elif character in _CHINESE_STEPS:
            section += (digit if digits else 1) * _CHINESE_STEPS[character]
            digit, digits = 0, ""
        elif character in _CHINESE_MYRIADS:
            total, section, digit, digits = (total + section + digit) * _CHINESE_MYRIADS[character], 0, 0, ""
        else:
            return None
    if len(digits) > 1 and not section and not total:  # `二〇二四`
        value = Fraction(int(digits))
    elif len(digits) > 1 and digits[:-1].strip("0"):
        return None
    else:
        value = Fraction(total + section + digit)
    if point:
        value += Fraction("0." + "".join(str(_CHINESE_DIGITS[character]) for character in decimals))
    return sign * value


_NOTHING = """no solution; no solutions; no real solution; no real solutions; none; nothing; empty set; the empty set; empty; does not have a solution; has no solution; there is no solution; there are no solutions;
no such number; no such numbers; no such number exists; no such integers exist; no such integer; no such integers; no answer exists; null set; no values; no value; impossible; not possible; aucune solution; pas de solution; ensemble vide;
keine lösung; keine; unlösbar; leere menge; sin solución; no hay solución; ninguna solución; conjunto vacío; ninguna; ninguno; sem solução; não há solução; nenhuma solução; conjunto vazio; нет решений; решений нет; нет решения; пустое множество;
无解; 無解; 方程无解; 没有解; 空集; 不存在解; 解なし; 解はない; no real roots; no roots; nenhuma; aucun; aucune; no such n exists; no such x exists; there is no such number; 无实数解; 没有; 无"""
_UNDEFINED = "undefined; not defined; is undefined; does not exist; dne; d.n.e.; doesn't exist; nicht definiert; existiert nicht; non défini; n'existe pas; indéfini; indefinido; no existe; no está definido; não existe; indefinida; не существует; не определено; не определена; 不存在; 未定义; 无定义; 無定義; 存在しない; the limit does not exist; limit does not exist; diverges"
_YES = "yes; true; correct; yeah; right; oui; vrai; ja; wahr; richtig; sí; si; verdadero; cierto; sim; verdadeiro; да; верно; правда; истина; 是; 是的; 对; 對; 正确; 真; はい; 正しい"
_NO = "no; false; incorrect; wrong; non; faux; nein; falsch; falso; não; нет; неверно; ложь; 否; 不是; 不; 不对; 错; 错误; 假; いいえ"
_INFINITE = "infinitely many; infinitely many solutions; infinite solutions; infinite number of solutions; there are infinitely many solutions; an infinite number; unendlich viele; une infinité; infinitas; бесконечно много; 无穷多; 无数; 无数个; 无穷多个"
_ALL_REALS = "all real numbers; all reals; every real number; any real number; all real x; reals; the real numbers; the reals; toutes les valeurs réelles; alle reellen zahlen; todos los números reales; todos os números reais; все действительные числа; 全体实数; 一切实数; 任意实数; 实数集"
STATEMENTS = {
    phrase.strip(): kind
    for kind, phrases in (
        ("nothing", _NOTHING),
        ("undefined", _UNDEFINED),
        ("yes", _YES),
        ("no", _NO),
        ("infinite", _INFINITE),
        ("reals", _ALL_REALS),
    )
    for phrase in " ".join(phrases.split()).split(";")
}
"""Whole answers in words, and what they state."""

MONTHS = {
    **{name: number for number, name in enumerate("january february march april may june july august september october november december".split(), start=1)},
    **{name: number for number, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), start=1)}, "sept": 9,
    **{name: number for number, name in enumerate("janvier février mars avril mai juin juillet août septembre octobre novembre décembre".split(), start=1)},
    **{name: number for number, name in enumerate("januar februar märz april mai juni juli august september oktober november dezember".split(), start=1)},
    **{name: number for number, name in enumerate("enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre".split(), start=1)},
    **{name: number for number, name in enumerate("janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro".split(), start=1)},
    **{name: number for number, name in enumerate("января февраля марта апреля мая июня июля августа сентября октября ноября декабря".split(), start=1)},
}  # fmt: skip

BOUNDS = [
    (re.compile(rf"(?:{words})(?:\s+|(?<=[\u4e00-\u9fff:]))", re.IGNORECASE), relation)
    for words, relation in (
        (r"(?:it (?:is|must be) |is |x )?(?:at least|no less than|not less than|no fewer than|minimum of|a minimum of|mindestens|wenigstens|au moins|al menos|por lo menos|pelo menos|не менее|как минимум|至少|不少于|不小于|大于等于|大于或等于|少なくとも)", ">="),
        (r"(?:it (?:is|must be) |is |x )?(?:at most|no more than|not more than|maximum of|a maximum of|up to|höchstens|maximal|au plus|como máximo|a lo sumo|no máximo|не более|максимум|至多|最多|不超过|不大于|小于等于|小于或等于)", "<="),
        (r"(?:it (?:is|must be) |is |x )?(?:strictly )?(?:more than|greater than|larger than|bigger than|over|above|exceeds|mehr als|größer als|über|plus de|más de|mayor que|mais de|maior que|больше|более|свыше|大于|超过|多于)", ">"),
        (r"(?:it (?:is|must be) |is |x )?(?:strictly )?(?:less than|fewer than|smaller than|under|below|weniger als|kleiner als|moins de|menos de|menor que|меньше|менее|小于|少于|不到)", "<"),
        (r"(?:it )?(?:is |are |does |do |can |cannot be |can't be |isn't |aren't )?(?:not|never|anything but|other than|except|not equal to|isn't|cannot be|can't be|nicht|pas|n'est pas|no es|não é|не|不是|不等于|并非|nicht gleich|非)(?: equal to| equal)?", "!="),
        (r"(?:\\neg|\\ne|\\not)", "!="),
    )
]  # fmt: skip
"""Words before a number that make a relation of it."""
BOUNDS_AFTER = [
    (re.compile(rf" (?:{words})$", re.IGNORECASE), relation)
    for words, relation in (
        (
            "or more|or greater|or above|or higher|at least|and above|and up|oder mehr|ou plus|o más|или более|以上|及以上",
            ">=",
        ),
        ("or less|or fewer|or below|or lower|at most|oder weniger|ou moins|o menos|или менее|以下|及以下", "<="),
    )
]

NEGATED = re.compile(
    r"(?<![\\\w])(?:not|never|nor|neither|cannot|(?:is|are|was|do|does|did|ca|wo)n't)(?!\w)", re.IGNORECASE
)
"""What the grammar never reads past; `not 5` by itself is a relation (see `BOUNDS`)."""
UNSURE = re.compile(
    r"\b(?:maybe|perhaps|possibly|either|neither|nor|might be|could be|not sure|unsure|probably|almost|nearly|presque|fast|beinahe|casi|quase|почти|vielleicht|peut-être|quizás|talvez|возможно)\b|可能|也许|几乎|或许|\?$",
    re.IGNORECASE,
)
"""Words that keep an answer from being one."""

_ADVERBS = r"(?:so|thus|therefore|hence|then|and|now|finally|in total|altogether|in all|overall|consequently|donc|also|alors|somit|daher|entonces|portanto|por lo tanto|итак|значит|所以|因此|故|于是|则|综上|よって|したがって)"
_ARTICLES = r"(?:the|our|a|an|its|this|that|la|le|die|der|das|el|a|o)"
_HEADS = (
    r"(?:(?:final|correct|right|exact|required|numerical|simplified|best|finale|correcte|endgültige|richtige|respuesta final|correcta|final|окончательный|правильный) )?(?:answer|result|solution|value|total|sum|option|choice|number|probability|area|volume|distance|length|"
    r"cost|price|time|speed|average|mean|difference|product|quotient|remainder|ratio|line|equation|expression|function|matrix|vector|set|interval|point|angle|width|height|perimeter|radius|age|weight|amount|percentage|degree|"
    r"réponse|résultat|antwort|lösung|ergebnis|respuesta|solución|resultado|resposta|solução|ответ|результат|答案|结果|答|解|答え|正解)"
)
_COPULA = r"(?:(?:is|are|was|equals|will be|would be|must be|should be|be|comes to|est|sont|vaut|ist|lautet|beträgt|sind|es|son|é|são)\b|=|:|равен|равна|равно|—|-(?= )|是|为|為|等于|は)"
LEAD_IN = re.compile(
    rf"(?:{_ADVERBS}[ ,:]*)*(?:"
    rf"(?:{_ARTICLES} )?{_HEADS}(?: \(?[a-z]\)?)?(?: (?:of|for|to|in) (?:the |this |our )?[a-z ]{{1,40}}?)? ?{_COPULA}+[ :]*"
    r"|(?:it|this|that|there|which|these|they|he|she|we|i|you|x) ?(?:is|are|was|were|equals?|will be|would be|must be|has|have|had|needs?|gets?|got|pays?|paid|earns?|makes?|made|spends?|spent|sold|sells?|takes?|costs?|found|find|obtain|gives?) (?:that )?"
    r"|(?:we|you) (?:get|have|obtain|find|need|conclude|see)(?: that)?[ ,:]+|(?:about|approximately|approx\.?|around|roughly|exactly|precisely|only|just|ca\.|etwa|ungefähr|environ|aproximadamente|unos|около|примерно|约|大约|約|共|一共|总共|共有|\\approx|~|\\sim|\\therefore|=|:|a total of|total of|(?:a|an|the|some|answer|final answer)(?= )) ?"
    rf"|(?:option|choice|选|選|选择) ?|{_ADVERBS}[ ,:]+"
    r")",
    re.IGNORECASE,
)
"""What people put before an answer."""
TRAIL = re.compile(
    r"[ ,(]+(?:because|since|as we|so that|which is|which means|where we|if we|in total|altogether|in all|overall|total|left over|left|each|respectively|weil|parce que|porque|потому что|因为)\b.*$"
    r"|(?<=[\w}]) (?:for|in|after|at|by|on|over|per|from|to|out of the|of the|during|within|für|pour|para|за|на) (?:each |every |the |all |these |those |a |an |\d+ )+[a-z]{2,}(?: [a-z]{2,}){0,4}$"
    r"|(?:です|になります|である|となります|个|人|岁|次|只|本)$",
    re.IGNORECASE,
)
"""What people put behind an answer: a reason, or for whom it is."""
