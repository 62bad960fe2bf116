r"""The grammar of answers: from tokens to one expression, all of it or nothing.

    answer   := group (";" group)*                     group := item (("," | "and" | "or") item)*
    item     := side (relation side)*                  side  := sets (":" sets)*
    sets     := sum (("∪" | "∩" | "\") sum)*           sum   := ["±"] product (("+" | "-" | "±" | "∓") product)* [unit | noun]
    product  := power (("·" | "/" | nothing) power)*   power := atom ("!" | "%" | "°" | "^" … | "_" …)*
    atom     := figure | name | function | macro | brackets | matrix

`Parser.whole()` raises `LeftOver` with the text at which it stopped. Whatever it returns has been read from the first token to the last.
"""

from __future__ import annotations

from fractions import Fraction

from trl_reasoning_distill.verification.atoms import (
    ATOM_COMMANDS,
    END,
    GREEK,
    MAX_DEPTH,
    PART_WORDS,
    AtomReader,
    LeftOver,
)
from trl_reasoning_distill.verification.expressions import (
    CLOSING,
    RELATIONS,
    Call,
    Expression,
    Measure,
    Number,
    Symbol,
    Token,
    read_figure,
    variables,
)
from trl_reasoning_distill.verification.units import (
    AMBIGUOUS,
    CURRENCY_SIGNS,
    SINGLE_LETTERS,
    Unit,
    divided,
    read_unit,
    unit_named,
)
from trl_reasoning_distill.verification.vocabulary import (
    ALTERNATIVES,
    CONJUNCTIONS,
    FUNCTIONS,
    NOT_NOUNS,
    SCALES,
)

_SIGNS = {"+": "+", "-": "-", "\\pm": "±", "\\mp": "∓"}
_AFTER_AMOUNTS = frozenset({*CLOSING, ",", ";", ".", ":", "&", "\\&", "\\newline", "\\land", "\\lor", "?"})


class Parser(AtomReader):
    """Reads the tokens of one answer; see the module."""

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
        if self.depth > MAX_DEPTH:
            raise LeftOver(self.token)
        sides, relations = [self._label() or self.side()], []
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

    def _label(self) -> Expression | None:
        """Words before an equals sign, `Area = 25`: a name."""
        position = self.position
        while self._at(position).kind == "run" and position - self.position < 4:
            position += 1
        words = [token.text.lower() for token in self.tokens[self.position : position]]
        is_name = self._at(position).text == "=" and words and max(map(len, words)) > 3 and not NOT_NOUNS & set(words)
        if not is_name:
            return None
        self.position = position
        return Symbol(" ".join(words))

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
        if not self.is_constant(value):
            return None
        found = self.unit_here()
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
            minute = unit_named("min")
            is_hour = minute is not None and unit.dimension == minute.dimension and unit.factor == 60 * minute.factor
            if found is None and minute is not None and is_hour and self.token.kind == "end":  # 1h30
                found = minute, self.position
            if found and found[0].dimension == unit.dimension and found[0].factor < unit.factor and not unit.offset:
                self.position = found[1]
                scaled = Call("*", (number, Number(found[0].factor / unit.factor)))
                return Measure(Call("+", (first.value, scaled)), unit)
        self.position = start
        return None

    def unit_here(self) -> tuple[Unit, int] | None:
        r"""The unit that stands here and ends the item, if it does: `5 m` is an amount, `5 m + 2` and `5m` are algebra."""
        token = self.token
        may_begin = token.kind == "run" or token.text in ("^", "\\circ") or token.text in CURRENCY_SIGNS
        if not (may_begin or (token.text == "{" and self.ahead().kind == "run")):
            return None
        found = read_unit(self.tokens, self.position)
        if found is None or self._is_rather_a_variable(found[1]) or not self._ends_amount(found[1]):
            return None
        return found

    def _is_rather_a_variable(self, after: int) -> bool:
        """Whether the unit up to `after` is one letter that touches its number: `5m`, but not `5 m`, `5m^2`, `5m/s` or `3h20`."""
        token, following = self.token, self._at(after)
        if token.is_spaced or token.is_quoted or token.text not in SINGLE_LETTERS or following.kind == "figure":
            return False
        has_more = self.ahead().text == "/" or (self.ahead().text == "^" and token.text == "m")
        return after == self.position + 1 or not has_more

    def _ends_amount(self, after: int) -> bool:
        """Whether an amount can end before the token at `after`."""
        following = self._at(after)
        if self.token.text in AMBIGUOUS:
            return following.kind in ("end", "figure") or following.text in (",", "/", "^", ")", "and")
        if following.kind == "run":
            return following.is_quoted or len(following.text) > 1 or self._is_conjunction(following)
        return following.kind in ("end", "figure") or following.text in _AFTER_AMOUNTS or following.text in RELATIONS

    def _at(self, index: int) -> Token:
        return self.tokens[index] if index < len(self.tokens) else END

    def _noun(self, value: Expression) -> str:
        """The words behind a number, up to the end of the item: `apples left`; empty if anything else follows."""
        if not self.is_constant(value):
            return ""
        words: list[str] = []
        position = self.position
        while position < len(self.tokens):
            token = self.tokens[position]
            text = token.text.lower()
            following = self._at(position + 1)
            if token.text in ("-", "'") and words and following.kind == "run" and not following.is_spaced:
                position += 1  # `half-filled`
                continue
            if token.kind != "run" or self._is_conjunction(token):
                break
            if text in NOT_NOUNS or (len(text) == 1 and text.isascii() and not token.is_quoted and text != "a"):
                return ""
            if not words and not (token.is_spaced or token.is_quoted or not token.text.isascii() or len(text) >= 4):
                return ""
            words.append(text)
            position += 1
        following = self._at(position)
        ends = following.kind == "end" or following.text in _AFTER_AMOUNTS or self._is_conjunction(following)
        if not words or not ends or len(words) > 8:
            return ""
        self.position = position
        return " ".join(words)

    def sum(self) -> Expression:
        """Terms with their signs."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise LeftOver(self.token)
        left = self._signed()
        while (sign := self.operator) in _SIGNS:
            self.position += 1
            left = Call(_SIGNS[sign], (left, self._signed()))
        self.depth -= 1
        return left

    def _signed(self) -> Expression:
        signs: list[str] = []
        while (sign := self.operator) in _SIGNS:
            if len(signs) == 2:
                raise LeftOver(self.token)
            signs.append(_SIGNS[sign])
            self.position += 1
        value = self.product()
        for sign in reversed(signs):
            if sign != "+":
                value = Call("neg" if sign == "-" else sign, (value,))
        return value

    def product(self) -> Expression:
        """Factors, with or without a sign between them; a division takes the one factor behind it."""
        left = self.factor()
        while True:
            text = self.operator
            if text in ("*", "\\times", "\\cdot", "\\bullet"):
                self.position += 1
                left = Call("*", (left, self.signed_factor()))
            elif (
                text == "/"
                and self.is_constant(left)
                and self.ahead().kind == "run"
                and not self.is_algebra(self.ahead())
            ):
                return left  # `$5/hour`
            elif text == "of" and isinstance(left, Call) and left.name in ("/", "%"):  # 3/4 of 12
                self.position += 1
                left = Call("*", (left, self.factor()))
            elif text in ("/", "\\div"):
                self.position += 1
                left = Call("/", (left, self.signed_factor()))
            elif text.lower() in ("choose", "\\choose"):
                self.position += 1
                left = Call("binom", (left, self.factor()))
            elif text.lower() in PART_WORDS and self.ahead().text == "of" and isinstance(left, Number):
                self.position += 2
                left = Call("*", (Call("/", (left, Number(Fraction(PART_WORDS[text.lower()]), True))), self.factor()))
            elif self.begins_factor(left):
                left = self.juxtaposed(left)
            else:
                return left

    def signed_factor(self) -> Expression:
        if self.take("-"):
            return Call("neg", (self.factor(),))
        return self.factor()

    def juxtaposed(self, left: Expression) -> Expression:
        start = self.token
        right = self.factor()
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
                below = self.factor()
                if isinstance(below, Number) and below.is_integer:
                    return Call("+", (left, Call("/", (right, below))))
            raise LeftOver(start)
        return Call("*", (left, right))

    def begins_factor(self, left: Expression) -> bool:
        token = self.token
        if token.kind == "figure":
            return isinstance(left, Number) and token.is_spaced and self.ahead().text == "/"
        if token.kind == "bracket":
            return token.text in "([{" and self.ahead().text != "mod"
        if token.kind == "run":
            if self._is_conjunction(token) or (self.is_constant(left) and self.unit_here() is not None):
                return False
            return self.is_algebra(token)
        if token.kind == "command":
            return (
                token.text in ATOM_COMMANDS
                or token.text[1:] in FUNCTIONS
                or token.text[1:] in GREEK
                or token.text in ("\\langle", "\\lfloor", "\\lceil")
            )
        return False
