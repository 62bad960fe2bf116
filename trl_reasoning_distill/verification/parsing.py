r"""The grammar of answers: from tokens to one expression, all of it or nothing.

    answer   := group (";" group)*                     group := item (("," | "and" | "or") item)*
    item     := side (relation side)*                  side  := sets (":" sets)*
    sets     := sum (("∪" | "∩" | "\") sum)*           sum   := ["±"] product (("+" | "-" | "±" | "∓") product)* [unit | noun]
    product  := power (("·" | "/" | nothing) power)*   power := atom ("!" | "%" | "°" | "^" … | "_" …)*
    atom     := figure | name | function | macro | brackets | matrix

`Parser.whole()` raises `LeftOver` with the text at which it stopped. Whatever it returns has been read from the first token to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from trl_reasoning_distill.verification.expressions import (
    CLOSING,
    OPENING,
    RELATIONS,
    Call,
    Expression,
    Measure,
    Number,
    Symbol,
    Token,
    read_figure,
    variables,
    walk,
)
from trl_reasoning_distill.verification.units import (
    AMBIGUOUS,
    CURRENCY_SIGNS,
    SINGLE_LETTERS,
    divided,
    read_unit,
    unit_named,
)
from trl_reasoning_distill.verification.vocabulary import (
    ALTERNATIVES,
    CONJUNCTIONS,
    FUNCTIONS,
    NOT_ALGEBRA,
    NOT_NOUNS,
    NUMBER_SETS,
    OPERATOR_WORDS,
    SCALES,
)

_MAX_DEPTH = 40
_END = Token("end", "", False, False, -1)
_GREEK = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "chi",
        "psi",
        "omega",
    ]
)
_STRUCTURAL = frozenset(
    f"\\{name}"
    for name in [
        "end",
        "newline",
        "hline",
        "pmod",
        "mod",
        "not",
        "in",
        "notin",
        "cup",
        "cap",
        "setminus",
        "le",
        "ge",
        "ne",
        "approx",
        "equiv",
        "land",
        "lor",
        "to",
        "Rightarrow",
        "rangle",
        "circ",
        "times",
        "cdot",
        "div",
        "pm",
        "mp",
        "neg",
        "int",
        "sum",
        "prod",
        "lim",
        "partial",
        "iint",
        "oint",
    ]
)
_PART_WORDS = {
    "half": 2,
    "third": 3,
    "thirds": 3,
    "quarter": 4,
    "quarters": 4,
    "fourth": 4,
    "fifth": 5,
    "fifths": 5,
    "tenth": 10,
}
_FUNCTION_LETTERS = frozenset("fghFGHPQTVWS")
_TRIGONOMETRIC = frozenset({"sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh"})


class LeftOver(Exception):  # noqa: N818 - it is an answer of the grammar
    """The grammar reads the answer no further than here."""

    def __init__(self, token: Token) -> None:
        super().__init__(token.text or "the end")
        self.token = token


class Parser:
    """Reads the tokens of one answer; see the module."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens, self.position, self.depth = list(tokens), 0, 0
        self.in_braces = False  # of a set, where a colon begins the condition

    @property
    def token(self) -> Token:
        return self.tokens[self.position] if self.position < len(self.tokens) else _END

    def ahead(self, steps: int = 1) -> Token:
        index = self.position + steps
        return self.tokens[index] if index < len(self.tokens) else _END

    def take(self, *texts: str) -> bool:
        """Step over a token if it is one of these."""
        if self.token.text in texts and self.token.kind != "end":
            self.position += 1
            return True
        return False

    def expect(self, *texts: str) -> str:
        text = self.token.text
        if not self.take(*texts):
            raise LeftOver(self.token)
        return text

    def whole(self) -> Expression:
        """Read all tokens.

        Raises:
            LeftOver: If some cannot be read.
        """
        expression = self.answer()
        self.take(".")
        if self.position < len(self.tokens):
            raise LeftOver(self.token)
        return expression

    def answer(self, closing: frozenset[str] = frozenset()) -> Expression:
        """Groups of items; one item by itself is itself."""
        groups: list[tuple[Expression, ...]] = []
        while True:
            items, name = self._group()
            groups.append(items)
            if not self.take(";"):
                break
            if self.token.kind == "end" or self.token.text in closing:
                break
        if len(groups) == 1:
            return groups[0][0] if len(groups[0]) == 1 else Call(name, groups[0])
        if all(len(group) == 1 for group in groups):
            return Call("list", tuple(group[0] for group in groups))
        return Call("list", tuple(Call("list", group) if len(group) > 1 else group[0] for group in groups))

    def _group(self) -> tuple[tuple[Expression, ...], str]:
        """Items, and what they make: alternatives (`or`), a list, or, where a comma follows an `or`, neither (`mixed`)."""
        items, separators = [self.item()], []
        while (separator := self._separator()) is not None:
            separators.append(separator)
            items.append(self.item())
        if "or" not in separators:
            return tuple(items), "list"
        return tuple(items), "or" if separators == sorted(separators) else "mixed"

    def _separator(self) -> str | None:
        """`","` or `"or"`, with the token behind it next; `None` if no other item follows."""
        start = self.position
        alternatives = 0
        while self.token.kind != "end" and (self.token.text == "," or self._is_conjunction()):
            alternatives += self.token.text.lower() in ALTERNATIVES
            self.position += 1
        if self.position == start:
            return None
        if self.token.kind == "end":
            self.position = start
            return None
        return "or" if alternatives else ","

    def _is_conjunction(self, token: Token | None = None) -> bool:
        token = token or self.token
        return token.text.lower() in CONJUNCTIONS or token.text in ("&", "\\&", "\\land", "\\lor")

    def item(self) -> Expression:
        """A chain of relations, or one side alone."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise LeftOver(self.token)
        sides, relations = [self.side()], []
        while (relation := self._relation()) is not None:
            relations.append(relation)
            sides.append(self.side())
        self.depth -= 1
        if not relations and self._at_modulus():
            return Call("congruent", (Symbol("·"), sides[0], self._modulus()))
        if not relations:
            return sides[0]
        if relations == ["mod"]:
            return Call("congruent", (*sides, self._modulus()))
        return Call("chain:" + " ".join(relations), tuple(sides))

    def _relation(self) -> str | None:
        text = self.token.text
        if text == "\\not" and self.ahead().text in ("=", "\\in"):
            self.position += 2
            return "!=" if self.tokens[self.position - 1].text == "=" else "notin"
        if text in RELATIONS and self.token.kind != "end":
            self.position += 1
            return RELATIONS[text]
        return None

    def _at_modulus(self) -> bool:
        return self.token.text in ("\\pmod", "\\mod", "mod") or (self.token.text == "(" and self.ahead().text == "mod")

    def _modulus(self) -> Expression:
        self.take(",")
        bracketed = self.take("(")
        if self.take("\\pmod", "\\mod", "mod"):
            modulus = self.sum() if bracketed else self._argument()
            if bracketed:
                self.expect(")")
            return modulus
        raise LeftOver(self.token)

    def side(self) -> Expression:
        terms = [self._sets()]
        while self.token.text == ":" and self.ahead().kind != "end" and not self.in_braces:
            self.position += 1
            terms.append(self._sets())
        return terms[0] if len(terms) == 1 else Call("ratio", tuple(terms))

    def _sets(self) -> Expression:
        left = self._amount()
        while True:
            if self.take("\\cup"):
                left = Call("cup", (left, self._amount()))
            elif self.token.text == "U" and self.token.is_spaced and isinstance(left, Call) and left.name[0] in "([{":
                self.position += 1
                left = Call("cup", (left, self._amount()))
            elif self.take("\\cap"):
                left = Call("cap", (left, self._amount()))
            elif self.take("\\setminus"):
                left = Call("minus", (left, self._amount()))
            else:
                return left

    def _amount(self) -> Expression:
        """A sum, with a unit or a noun behind it; or several of them that make one amount (`3 h 20 min`)."""
        value = self._currency() or self.sum()
        if isinstance(value, Measure):
            return value
        while self.token.text.lower() in SCALES and not variables(value):
            value = Call("*", (value, Number(Fraction(SCALES[self.token.text.lower()]), is_integer=True)))
            self.position += 1
            self.take("of")
        measured = self._measured(value)
        while measured is not None and measured.unit is not None and (more := self._compound(measured)) is not None:
            measured = more
        if measured is None:
            return value
        noun = self._noun(value)
        return Measure(measured.value, measured.unit, noun) if noun else measured

    def _currency(self) -> Expression | None:
        sign = self.token.text in ("-", "+") and self.ahead().text in CURRENCY_SIGNS
        mark = self.ahead() if sign else self.token
        if mark.text not in CURRENCY_SIGNS or self.ahead(1 + sign).kind == "end":
            return None
        negative = self.token.text == "-"
        self.position += 1 + sign
        value = self.sum()
        while self.token.text.lower() in SCALES:
            value = Call("*", (value, Number(Fraction(SCALES[self.token.text.lower()]), is_integer=True)))
            self.position += 1
        self.take(mark.text)  # `$5$`
        unit = unit_named(mark.text)
        following = read_unit(self.tokens, self.position)
        if following and unit and following[0].dimension == unit.dimension and following[0].factor == unit.factor:
            self.position = following[1]  # `$5 dollars`
        elif self.token.text in ("/", "per") and unit and (rate := read_unit(self.tokens, self.position + 1)):
            unit, self.position = divided(unit, rate[0]), rate[1]
        value = Call("neg", (value,)) if negative else value
        return Measure(value, unit, self._noun(value))

    def _measured(self, value: Expression) -> Measure | None:
        if not self._is_constant(value):
            return None
        found = self._unit_here(value)
        if found is not None:
            unit, self.position = found
            return Measure(value, unit)
        noun = self._noun(value)
        return Measure(value, None, noun) if noun else None

    def _compound(self, first: Measure) -> Measure | None:
        """`20 min` behind `3 h`: the same measure in a smaller unit."""
        start = self.position
        while self.take(",") or (self._is_conjunction() and self.take(self.token.text)):
            pass
        if self.token.kind == "figure" and (number := read_figure(self.token.text)) is not None and number.value >= 0:
            self.position += 1
            found = read_unit(self.tokens, self.position)
            unit = first.unit
            assert unit is not None
            if (
                found is None and unit.dimension == (("s", 1),) and unit.factor == 3600 and self.token.kind == "end"
            ):  # 1h30
                found = unit_named("min"), self.position  # type: ignore[assignment]
            if found and found[0].dimension == unit.dimension and found[0].factor < unit.factor and not unit.offset:
                self.position = found[1]
                scaled = Call("*", (number, Number(found[0].factor / unit.factor)))
                return Measure(Call("+", (first.value, scaled)), unit)
        self.position = start
        return None

    def _unit_here(self, value: Expression) -> tuple | None:  # type: ignore[type-arg]
        r"""The unit that stands here and ends the item, if it does: `5 m` is an amount, `5 m + 2` and `5m` are algebra."""
        token = self.token
        if not (
            token.kind == "run"
            or token.text in ("^", "\\circ", "{", "/")
            or token.text in CURRENCY_SIGNS
            or token.text in OPERATOR_WORDS
        ):
            return None
        if token.text == "/" or (token.text == "{" and self.ahead().kind != "run"):
            return None
        found = read_unit(self.tokens, self.position)
        if found is None:
            return None
        unit, after = found
        following = self.tokens[after] if after < len(self.tokens) else _END
        touches = not (token.is_spaced or token.is_quoted)
        if touches and token.text in SINGLE_LETTERS and after == self.position + 1 and following.kind != "figure":
            return None
        if (
            touches
            and token.text in SINGLE_LETTERS
            and not (self.ahead().text == "^" and token.text == "m")
            and self.ahead().text != "/"
            and following.kind != "figure"
        ):
            return None
        if (
            token.text in AMBIGUOUS
            and following.kind not in ("end", "figure")
            and following.text not in (",", "/", "^", ")", "and")
        ):
            return None
        ends = (
            following.kind in ("end", "figure")
            or following.text in (*CLOSING, ",", ";", ".", ":", "&", "\\\\", "?")
            or following.text in RELATIONS
        )
        if (
            ends
            or self._is_conjunction(following)
            or (following.kind == "run" and (following.is_quoted or len(following.text) > 1))
        ):
            return unit, after
        return None

    def _noun(self, value: Expression) -> str:
        """The words behind a number, up to the end of the item: `apples left`; empty if anything else follows."""
        if not self._is_constant(value):
            return ""
        words, position = [], self.position
        while position < len(self.tokens):
            token = self.tokens[position]
            text = token.text.lower()
            if (
                token.text in ("-", "'")
                and words
                and position + 1 < len(self.tokens)
                and self.tokens[position + 1].kind == "run"
                and not self.tokens[position + 1].is_spaced
            ):
                position += 1
                continue
            if token.kind != "run" or self._is_conjunction(token):
                break
            if text in NOT_NOUNS or (len(text) == 1 and text.isascii() and not token.is_quoted and text != "a"):
                return ""
            if not words and not (token.is_spaced or token.is_quoted or not token.text.isascii() or len(text) >= 4):
                return ""
            words.append(text)
            position += 1
        following = self.tokens[position] if position < len(self.tokens) else _END
        ends = (
            following.kind == "end"
            or following.text in (*CLOSING, ",", ";", ".", "&")
            or self._is_conjunction(following)
        )
        if not words or not ends or len(words) > 8:
            return ""
        self.position = position
        return " ".join(words)

    @staticmethod
    def _is_constant(value: Expression) -> bool:
        return not variables(value) and not any(
            (isinstance(node, Call) and node.name[0] in "([{") or isinstance(node, Measure) for node in walk(value)
        )

    def sum(self) -> Expression:
        """Terms with their signs."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise LeftOver(self.token)
        left = self._signed()
        while True:
            text = OPERATOR_WORDS.get(self.token.text.lower(), self.token.text)
            if text in ("+", "-", "\\pm", "\\mp") and self.token.kind != "end":
                self.position += 1
                left = Call({"\\pm": "±", "\\mp": "∓"}.get(text, text), (left, self._signed()))
            else:
                self.depth -= 1
                return left

    def _signed(self) -> Expression:
        signs: list[str] = []
        while (sign := OPERATOR_WORDS.get(self.token.text.lower(), self.token.text)) in (
            "+",
            "-",
            "\\pm",
            "\\mp",
        ) and self.token.kind != "end":
            signs.append(sign)
            self.position += 1
            if len(signs) > 2:
                raise LeftOver(self.token)
        value = self.product()
        for sign in reversed(signs):
            if sign != "+":
                value = Call({"-": "neg", "\\pm": "±", "\\mp": "∓"}[sign], (value,))
        return value

    def product(self) -> Expression:
        """Factors, with or without a sign between them; a division takes the one factor behind it."""
        left = self._factor()
        while True:
            text = OPERATOR_WORDS.get(self.token.text.lower(), self.token.text)
            if self.token.kind == "end":
                return left
            if text in ("*", "\\times", "\\cdot", "\\bullet"):
                self.position += 1
                left = Call("*", (left, self._signed_factor()))
            elif (
                text == "/"
                and self._is_constant(left)
                and self.ahead().kind == "run"
                and not self._is_algebra(self.ahead())
            ):
                return left  # `$5/hour`
            elif text == "of" and isinstance(left, Call) and left.name in ("/", "%"):  # 3/4 of 12
                self.position += 1
                left = Call("*", (left, self._factor()))
            elif text in ("/", "\\div"):
                self.position += 1
                left = Call("/", (left, self._signed_factor()))
            elif text.lower() == "choose":
                self.position += 1
                left = Call("binom", (left, self._factor()))
            elif text.lower() in _PART_WORDS and self.ahead().text == "of" and isinstance(left, Number):
                self.position += 2
                left = Call("*", (Call("/", (left, Number(Fraction(_PART_WORDS[text.lower()]), True))), self._factor()))
            elif self._begins_factor(left):
                left = self._juxtaposed(left)
            else:
                return left

    def _signed_factor(self) -> Expression:
        if self.take("-"):
            return Call("neg", (self._factor(),))
        return self._factor()

    def _juxtaposed(self, left: Expression) -> Expression:
        start = self.token
        right = self._factor()
        is_whole = isinstance(left, Number) and left.is_integer
        if (
            is_whole
            and isinstance(right, Call)
            and right.name == "/"
            and all(isinstance(arg, Number) and arg.is_integer for arg in right.args)
        ):
            return Call("+", (left, right))  # a mixed number, 2\frac12
        if start.kind == "figure":
            if is_whole and isinstance(right, Number) and right.is_integer and self.take("/"):  # 2 1/2
                below = self._factor()
                if isinstance(below, Number) and below.is_integer:
                    return Call("+", (left, Call("/", (right, below))))
            raise LeftOver(start)
        return Call("*", (left, right))

    def _begins_factor(self, left: Expression) -> bool:
        token = self.token
        if token.kind == "figure":
            return isinstance(left, Number) and token.is_spaced and self.ahead().text == "/"
        if token.kind == "bracket":
            return token.text in "([{" and self.ahead().text != "mod"
        if token.kind == "run":
            if self._is_conjunction(token) or (self._is_constant(left) and self._unit_here(left) is not None):
                return False
            return self._is_algebra(token)
        if token.kind == "command":
            return (
                token.text in _ATOM_COMMANDS
                or token.text[1:] in FUNCTIONS
                or token.text[1:] in _GREEK
                or token.text in ("\\langle", "\\lfloor", "\\lceil")
            )
        return False

    @staticmethod
    def _is_algebra(token: Token) -> bool:
        """Whether letters are variables or a function, and no word."""
        if token.text in FUNCTIONS or token.text.lower() in ("pi", "infinity"):
            return True
        if token.is_quoted:
            return len(token.text) == 1
        return token.text.isascii() and len(token.text) <= 3 and token.text.lower() not in NOT_ALGEBRA

    def _factor(self) -> Expression:
        value = self._atom()
        while True:
            text = self.token.text
            if self.token.kind == "end":
                return value
            if (text == "!" and self.ahead().text != "=") or text.lower() in ("factorial",):
                self.position += 1
                value = Call("!", (value,))
            elif OPERATOR_WORDS.get(text.lower(), text) == "%":
                self.position += 1
                value = Call("%", (value,))
            elif text == "^" and not (self._is_constant(value) and self._unit_here(value)):
                value = self._exponent(value)
            elif text == "**":
                self.position += 1
                value = Call("^", (value, self._signed_factor()))
            elif text.lower() in ("squared", "cubed") and self._is_algebraic(value):
                self.position += 1
                value = Call("^", (value, Number(Fraction(2 if text.lower() == "squared" else 3), True)))
            elif text == "_" and isinstance(value, Number):
                self.position += 1
                value = Call(
                    "base",
                    (Symbol(str(value.value)), self._number() if self.token.kind == "figure" else self._argument()),
                )
            elif text in ("'", "''") and isinstance(value, Symbol):
                self.position += 1
                value = Symbol(value.name + text)
            else:
                return value

    @staticmethod
    def _is_algebraic(value: Expression) -> bool:
        return not isinstance(value, Measure)

    def _exponent(self, base: Expression) -> Expression:
        self.position += 1
        if self.token.text == "\\circ" or (self.token.text == "{" and self.ahead().text == "\\circ"):
            braced = self.take("{")
            self.take("\\circ")
            if braced:
                self.expect("}")
            return Call("degree", (base,))
        if self.token.text == "{" and self.ahead().text in ("'", "\\prime"):
            raise LeftOver(self.token)
        if self.take("-"):
            exponent: Expression = Call("neg", (self._power_argument(),))
        else:
            exponent = self._power_argument()
        if exponent == Symbol("T"):
            return Call("transpose", (base,))
        return Call("^", (base, exponent))

    def _power_argument(self) -> Expression:
        return (
            self._group_of_braces()
            if self.token.text == "{"
            else self._factor()
            if self.token.kind != "figure"
            else self._atom()
        )

    def _argument(self) -> Expression:
        r"""What a macro takes: a group in braces, or one digit, letter or command (`\frac12`)."""
        token = self.token
        if token.text == "{":
            return self._group_of_braces()
        if token.kind == "figure" and len(token.text) > 1 and not token.is_spaced and token.text.isdecimal():
            self.tokens[self.position : self.position + 1] = [
                Token("figure", digit, token.is_quoted, False, token.position + index)
                for index, digit in enumerate(token.text)
            ]
        elif token.kind == "figure" and len(token.text) > 1 and token.text.isdecimal():
            first, rest = token.text[0], token.text[1:]
            self.tokens[self.position : self.position + 1] = [
                Token("figure", first, False, True, token.position), Token("figure", rest, False, False, token.position + 1)
            ]  # fmt: skip
        return self._atom()

    def _group_of_braces(self) -> Expression:
        self.expect("{")
        value = self.answer(CLOSING)
        self.expect("}")
        return value

    def _atom(self) -> Expression:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise LeftOver(self.token)
        value = self._any_atom()
        self.depth -= 1
        return value

    def _any_atom(self) -> Expression:
        token = self.token
        if token.kind == "figure":
            return self._number()
        if token.kind == "bracket" or token.text in ("\\{", "\\langle", "\\lfloor", "\\lceil"):
            return self._brackets()
        if token.text in ("|", "\\|"):
            self.position += 1
            value = self.answer()
            self.expect(token.text)
            return Call("abs" if token.text == "|" else "norm", (value,))
        if token.kind == "command":
            return self._command()
        if token.kind == "run":
            return self._letters()
        if token.text == "..." and token.kind == "op":
            self.position += 1
            return Symbol("...")
        if token.text == "?" or token.kind == "end":
            raise LeftOver(token)
        raise LeftOver(token)

    def _number(self) -> Expression:
        token = self.token
        number = read_figure(token.text)
        if number is None:
            raise LeftOver(token)
        self.position += 1
        repeated = self._repeating(token.text)
        return repeated or number

    def _repeating(self, text: str) -> Number | None:
        r"""`0.1\bar{6}`, `0.(3)`, `0.333...`: the exact value of a repeating decimal."""
        whole, _, fixed = text.partition(".")
        token, start = self.token, self.position
        if "." not in text or not (whole + fixed).isdecimal():
            return None
        if token.text in ("\\bar", "\\dot"):
            self.position += 1
            digits = self._braced_digits()
            if token.text == "\\dot":  # 0.\dot{1}42\dot{3}
                digits += self._plain_digits()
                digits += self._braced_digits() if self.take("\\dot") else ""
        elif token.text == "(" and not token.is_spaced and self.ahead().text.isdecimal() and self.ahead(2).text == ")":
            digits = self.ahead().text
            self.position += 3
        elif token.text in ("...", "\\ldots") and (digits := _period(fixed)):
            self.position += 1
            while fixed.endswith(digits):
                fixed = fixed.removesuffix(digits)
        else:
            self.position = start
            return None
        base = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
        return Number(base + Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(fixed)))

    def _plain_digits(self) -> str:
        digits = self.token.text if self.token.text.isdecimal() else ""
        self.position += bool(digits)
        return digits

    def _braced_digits(self) -> str:
        braced = self.take("{")
        digits = self._plain_digits() if braced else self.token.text[:1]
        if not braced and digits.isdecimal():
            self._argument()
        if not digits.isdecimal() or (braced and not self.take("}")):
            raise LeftOver(self.token)
        return digits

    def _brackets(self) -> Expression:
        opening = self.token.text
        self.position += 1
        if opening in ("\\lfloor", "\\lceil"):
            value = self.answer(CLOSING)
            self.expect(OPENING[opening])
            return Call(opening[2:] if opening == "\\lceil" else "floor", (value,))
        if opening == "\\{" and self.take("\\}"):
            return Call("{}", ())
        if opening == "(" and self.token.kind == "run" and self.token.text == "mod":
            raise LeftOver(self.token)
        outside, self.in_braces = self.in_braces, opening == "\\{"
        content = self.answer(CLOSING)
        self.in_braces = outside
        if opening == "\\{" and self.token.text in ("|", ":"):
            self.position += 1
            conditions = self.answer(CLOSING)
            self.expect("\\}")
            return Call("builder", (content, conditions))
        closing = self.token.text
        if closing not in CLOSING:
            raise LeftOver(self.token)
        matching = {"{": ("}",), "\\{": ("\\}",), "\\langle": ("\\rangle",)}.get(opening, (")", "]", "["))
        if closing not in matching:
            raise LeftOver(self.token)
        self.position += 1
        parts = content.args if isinstance(content, Call) and content.name in ("list", "or", "mixed") else (content,)
        if opening == "{":
            return content
        if (
            len(parts) == 1
            and (opening == "(" or (isinstance(content, Call) and content.name == "matrix"))
            and closing == OPENING[opening]
        ):
            return content
        if (
            opening == "["
            and closing == "]"
            and len(parts) == 1
            and not (isinstance(content, Call) and content.name in ("[]", "()", "(]", "[)"))
        ):
            return Call("[]", parts)
        name = {"\\{": "{}", "\\langle": "<>"}.get(opening, opening + closing)
        return Call(name, parts)

    def _letters(self) -> Expression:
        """Variables, a constant, or a function by its plain name."""
        token = self.token
        name = token.text
        if name in FUNCTIONS:
            self.position += 1
            return self._function(FUNCTIONS[name])
        if name.lower() in ("pi", "infinity"):
            self.position += 1
            return Symbol("pi" if name.lower() == "pi" else "oo")
        if name.lower() in _PART_WORDS and self.ahead().text.lower() == "of":
            self.position += 2
            return Call("/", (self._factor(), Number(Fraction(_PART_WORDS[name.lower()]), True)))
        if name.lower() in ("a", "one") and self.ahead().text.lower() in _PART_WORDS and self.ahead(2).text == "of":
            self.position += 1
            return self._letters()
        if name in _GREEK:
            return self._named(f"\\{name}")
        if name.lower() in ("twice", "double"):
            self.position += 1
            return Call("*", (Number(Fraction(2), True), self._factor()))
        if name.lower() == "square" and self.ahead().text.lower() == "root":
            self.position += 2
            self.take("of")
            return Call("sqrt", (self._factor(),))
        if not self._is_algebra(token):
            raise LeftOver(token)
        if len(name) > 1:
            self.tokens[self.position : self.position + 1] = [
                Token("run", letter, token.is_quoted, token.is_spaced and not index, token.position + index)
                for index, letter in enumerate(name)
            ]
        return self._named(self.token.text)

    def _named(self, name: str) -> Expression:
        self.position += 1
        name += self._subscript()
        if name in ("e", "i"):
            return Symbol(name)
        if (
            self.token.text == "("
            and not self.token.is_spaced
            and name[0] in _FUNCTION_LETTERS
            and self.ahead().text != ")"
        ):
            return Call(f"f:{name}", self._call_arguments())
        return Symbol(name)

    def _subscript(self) -> str:
        if not self.take("_"):
            return ""
        if self.token.text == "{":
            depth, texts = 0, []
            while self.token.kind != "end":
                depth += (self.token.text == "{") - (self.token.text == "}")
                texts.append(self.token.text)
                self.position += 1
                if not depth:
                    return "_" + "".join(texts)[1:-1]
            raise LeftOver(self.token)
        text = self.token.text
        if self.token.kind not in ("figure", "run", "command"):
            raise LeftOver(self.token)
        self.position += 1
        return "_" + text

    def _call_arguments(self) -> tuple[Expression, ...]:
        self.expect("(")
        content = self.answer(CLOSING)
        self.expect(")")
        return content.args if isinstance(content, Call) and content.name in ("list", "or", "mixed") else (content,)

    def _function(self, name: str) -> Expression:
        """A function's power and base, and its argument: brackets, or the factors up to a sign or another function."""
        exponent: Expression | None = None
        base: Expression | None = None
        while self.token.text in ("^", "_"):
            if self.take("^"):
                negative = self.take("-")
                exponent = self._argument()
                exponent = Call("neg", (exponent,)) if negative else exponent
            else:
                self.position += 1
                base = self._argument()
        if name == "sqrt":
            degree = self._optional_degree()
            self_argument = self._root_argument()
            return Call("sqrt", (self_argument,) if degree is None else (self_argument, degree))
        if self.token.text == "(" or self.token.text == "{":
            args = self._call_arguments() if self.token.text == "(" else (self._group_of_braces(),)
        else:
            args = (self._bare_argument(),)
        if base is not None and name == "log":
            args = (*args, base)
        elif base is not None and name not in ("max", "min"):
            raise LeftOver(self.token)
        if exponent == Call("neg", (Number(Fraction(1), True),)) and name in _TRIGONOMETRIC:
            return Call("a" + name, args)
        value: Expression = Call(name, args)
        return value if exponent is None else Call("^", (value, exponent))

    def _optional_degree(self) -> Expression | None:
        if not (self.token.text == "[" and not self.token.is_spaced):
            return None
        self.position += 1
        degree = self.sum()
        self.expect("]")
        return degree

    def _root_argument(self) -> Expression:
        before = self.tokens[self.position - 1]
        if self.token.kind == "figure" and (before.kind == "run" or before.text == "]" or self.token.is_spaced):
            return self._number()
        return self._argument()

    def _bare_argument(self) -> Expression:
        value = self._signed_factor()
        while (
            self.token.kind != "end"
            and self._begins_factor(value)
            and self.token.text.lstrip("\\") not in FUNCTIONS
            and self.token.text not in ("(", "[")
        ):
            value = self._juxtaposed(value)
        if self.token.text == "^" and self.ahead().text in ("\\circ", "{"):
            value = self._exponent(value)
        return value

    def _command(self) -> Expression:
        token = self.token
        name = token.text[1:]
        if name in FUNCTIONS:
            self.position += 1
            return self._function(FUNCTIONS[name])
        rule = _MACRO_RULES.get(token.text)
        if rule is not None:
            self.position += 1
            return rule(self)
        if name in _GREEK or name.lower() in _GREEK or name in ("ell", "hbar", "prime"):
            return self._named(token.text)
        if token.text in _STRUCTURAL or not token.text[1:].isalpha():
            raise LeftOver(token)
        self.position += 1
        return Symbol(token.text)  # a command that nobody knows stays what it is: never dropped, equal to itself alone

    def fraction(self) -> Expression:
        above = self._argument()
        return Call("/", (above, self._argument()))

    def binomial(self) -> Expression:
        above = self._argument()
        return Call("binom", (above, self._argument()))

    def marked(self, mark: str) -> Expression:
        r"""`\bar{z}`, `\vec{v}`, `\angle ABC`: the mark is part of the name."""
        inner = self._argument() if mark != "angle" else self._bare_argument()
        if mark in ("vec", "hat", "boxed", "underline"):
            return inner if mark != "vec" else Call("f:vec", (inner,))
        return Call(
            "conj" if mark == "bar" and isinstance(inner, Symbol) and inner.name in "zw" else f"f:{mark}", (inner,)
        )

    def blackboard(self) -> Expression:
        letter = self._argument()
        if isinstance(letter, Symbol) and letter.name in NUMBER_SETS:
            power = "^" + self._superscript() if self.token.text == "^" else ""
            return Call("{" + letter.name + power + "}", ())
        raise LeftOver(self.token)

    def _superscript(self) -> str:
        self.position += 1
        braced = self.take("{")
        text = self.token.text
        self.position += 1
        if braced:
            text += self.token.text if self.token.text != "}" else ""
            self.position += self.token.text != "}"
            self.expect("}")
        return text

    def environment(self) -> Expression:
        r"""`\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}`, `cases`, `array`."""
        self.expect("{")
        name = ""
        while self.token.text != "}" and self.token.kind != "end":
            name += self.token.text
            self.position += 1
        self.expect("}")
        if name == "array" and self.token.text == "{":
            while not self.take("}"):
                if self.token.kind == "end":
                    raise LeftOver(self.token)
                self.position += 1
        rows: list[list[Expression]] = [[]]
        while self.token.text != "\\end":
            if self.token.kind == "end" or len(rows) > 60:
                raise LeftOver(self.token)
            if self.take("\\hline"):
                continue
            if self.take("\\newline"):
                rows.append([])
            elif self.take("&"):
                pass
            else:
                rows[-1].append(self._cell())
        self.position += 1
        self.expect("{")
        while not self.take("}"):
            if self.token.kind == "end":
                raise LeftOver(self.token)
            self.position += 1
        rows = [row for row in rows if row]
        if not rows:
            raise LeftOver(self.token)
        if name in ("cases", "aligned", "align", "align*", "gathered"):
            return Call("list", tuple(cell for row in rows for cell in row))
        if name == "vmatrix":
            raise LeftOver(self.token)
        return Call("matrix", tuple(Call("row", tuple(row)) for row in rows))

    def _cell(self) -> Expression:
        value = self.item()
        while self.take(",", "."):
            pass
        return value


def _period(decimals: str) -> str:
    """The block that the last digits repeat at least three times (twice, if it is long); empty if there is none."""
    for length in range(1, len(decimals) // 2 + 1):
        block, times = decimals[-length:], 3 if length < 3 else 2
        if len(decimals) >= times * length and decimals.endswith(block * times):
            return block
    return ""


_MACRO_RULES = {
    "\\frac": Parser.fraction,
    "\\binom": Parser.binomial,
    "\\begin": Parser.environment,
    "\\mathbb": Parser.blackboard,
    "\\pi": lambda parser: Symbol("pi"),
    "\\infty": lambda parser: Symbol("oo"),
    "\\emptyset": lambda parser: Call("{}", ()),
    "\\ldots": lambda parser: Symbol("..."),
    **{f"\\{mark}": (lambda parser, mark=mark: parser.marked(mark)) for mark in ("bar", "vec", "hat", "angle", "triangle", "widehat", "overrightarrow", "underline", "boxed", "tilde")},
}  # fmt: skip
_ATOM_COMMANDS = frozenset(_MACRO_RULES) - {"\\begin", "\\ldots"} | {"\\{", "\\begin"}
