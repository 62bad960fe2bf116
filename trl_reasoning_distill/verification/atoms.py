r"""The inner half of the grammar: figures, names, functions, macros, brackets and matrices.

`AtomReader` reads one factor with its powers and signs. What stands in brackets, and the sums and products around a factor, is read by its subclass
`Parser` in `parsing.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fractions import Fraction

from trl_reasoning_distill.verification.expressions import (
    CLOSING,
    OPENING,
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
from trl_reasoning_distill.verification.units import Unit
from trl_reasoning_distill.verification.vocabulary import FUNCTIONS, NOT_ALGEBRA, NUMBER_SETS, OPERATOR_WORDS

MAX_DEPTH = 40
END = Token("end", "", False, False, -1)
GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega".split()
)
_STRUCTURAL = frozenset(
    f"\\{name}"
    for name in "end newline hline pmod mod not in notin cup cap setminus le ge ne approx equiv land lor to Rightarrow rangle circ times cdot div pm mp neg int sum prod lim partial iint oint".split()
)
PART_WORDS = {
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


class AtomReader:
    """Reads a factor from the tokens of one answer; see the module."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens, self.position, self.depth = list(tokens), 0, 0
        self.in_braces = False  # of a set, where a colon begins the condition

    @property
    def token(self) -> Token:
        return self.tokens[self.position] if self.position < len(self.tokens) else END

    def ahead(self, steps: int = 1) -> Token:
        index = self.position + steps
        return self.tokens[index] if index < len(self.tokens) else END

    @property
    def operator(self) -> str:
        """The operator that the token is, by its sign or its word; else its text, empty at the end."""
        return OPERATOR_WORDS.get(self.token.text.lower(), self.token.text)

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

    # The outer half, in `Parser`:

    def answer(self, closing: frozenset[str] = frozenset()) -> Expression:
        raise NotImplementedError

    def item(self) -> Expression:
        raise NotImplementedError

    def sum(self) -> Expression:
        raise NotImplementedError

    def begins_factor(self, left: Expression) -> bool:
        raise NotImplementedError

    def juxtaposed(self, left: Expression) -> Expression:
        raise NotImplementedError

    def signed_factor(self) -> Expression:
        raise NotImplementedError

    def unit_here(self) -> tuple[Unit, int] | None:
        raise NotImplementedError

    @staticmethod
    def is_constant(value: Expression) -> bool:
        return not variables(value) and not any(
            (isinstance(node, Call) and node.name[0] in "([{") or isinstance(node, Measure) for node in walk(value)
        )

    @staticmethod
    def is_algebra(token: Token) -> bool:
        """Whether letters are variables or a function, and no word."""
        if token.text in FUNCTIONS or token.text.lower() in ("pi", "infinity"):
            return True
        if token.is_quoted:
            return len(token.text) == 1
        return token.text.isascii() and len(token.text) <= 3 and token.text.lower() not in NOT_ALGEBRA

    def factor(self) -> Expression:
        value = self._atom()
        while True:
            text = self.token.text
            if self.token.kind == "end":
                return value
            if (text == "!" and self.ahead().text != "=") or text.lower() == "factorial":
                self.position += 1
                value = Call("!", (value,))
            elif self.operator == "%":
                self.position += 1
                value = Call("%", (value,))
            elif text == "^" and not (self.is_constant(value) and self.unit_here()):
                value = self._exponent(value)
            elif text == "**":
                self.position += 1
                value = Call("^", (value, self.signed_factor()))
            elif text.lower() in ("squared", "cubed") and self._is_algebraic(value):
                self.position += 1
                value = Call("^", (value, Number(Fraction(2 if text.lower() == "squared" else 3), True)))
            elif text == "_" and isinstance(value, Number):
                self.position += 1
                value = Call(
                    "base",
                    (Symbol(str(value.value)), self.number() if self.token.kind == "figure" else self._argument()),
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
            else self.factor()
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
        if self.depth > MAX_DEPTH:
            raise LeftOver(self.token)
        value = self._any_atom()
        self.depth -= 1
        return value

    def _any_atom(self) -> Expression:
        token = self.token
        if token.kind == "figure":
            return self.number()
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
            return self.letters()
        if token.text == "..." and token.kind == "op":
            self.position += 1
            return Symbol("...")
        if token.text == "?" or token.kind == "end":
            raise LeftOver(token)
        raise LeftOver(token)

    def number(self) -> Expression:
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

    def letters(self) -> Expression:
        """Variables, a constant, or a function by its plain name."""
        token = self.token
        name = token.text
        if name in FUNCTIONS:
            self.position += 1
            return self._function(FUNCTIONS[name])
        if name.lower() in ("pi", "infinity"):
            self.position += 1
            return Symbol("pi" if name.lower() == "pi" else "oo")
        if name.lower() in PART_WORDS and self.ahead().text.lower() == "of":
            self.position += 2
            return Call("/", (self.factor(), Number(Fraction(PART_WORDS[name.lower()]), True)))
        if name.lower() in ("a", "one") and self.ahead().text.lower() in PART_WORDS and self.ahead(2).text == "of":
            self.position += 1
            return self.letters()
        if name in GREEK:
            return self._named(f"\\{name}")
        if name.lower() in ("twice", "double"):
            self.position += 1
            return Call("*", (Number(Fraction(2), True), self.factor()))
        if name.lower() == "square" and self.ahead().text.lower() == "root":
            self.position += 2
            self.take("of")
            return Call("sqrt", (self.factor(),))
        if not self.is_algebra(token):
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
            return self.number()
        return self._argument()

    def _bare_argument(self) -> Expression:
        value = self.signed_factor()
        while (
            self.token.kind != "end"
            and self.begins_factor(value)
            and self.token.text.lstrip("\\") not in FUNCTIONS
            and self.token.text not in ("(", "[")
        ):
            value = self.juxtaposed(value)
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
        if name in GREEK or name.lower() in GREEK or name in ("ell", "hbar", "prime"):
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
        has_relations = any(isinstance(cell, Call) and cell.name.startswith("chain:") for row in rows for cell in row)
        if has_relations or name in ("cases", "aligned", "align", "align*", "gathered"):
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


_MACRO_RULES: dict[str, Callable[[AtomReader], Expression]] = {
    "\\frac": AtomReader.fraction,
    "\\binom": AtomReader.binomial,
    "\\begin": AtomReader.environment,
    "\\mathbb": AtomReader.blackboard,
    "\\pi": lambda parser: Symbol("pi"),
    "\\infty": lambda parser: Symbol("oo"),
    "\\emptyset": lambda parser: Call("{}", ()),
    "\\ldots": lambda parser: Symbol("..."),
    **{f"\\{mark}": functools.partial(AtomReader.marked, mark=mark) for mark in ("bar", "vec", "hat", "angle", "triangle", "widehat", "overrightarrow", "underline", "boxed", "tilde")},
}  # fmt: skip
ATOM_COMMANDS = frozenset(_MACRO_RULES) - {"\\begin", "\\ldots"} | {"\\{", "\\begin"}
