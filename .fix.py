def sub(p, *pairs):
    s=open(p).read()
    for a,b in pairs:
        if a not in s: print('MISSING',p,a[:90]); continue
        s=s.replace(a,b)
    open(p,'w').write(s)
V='trl_reasoning_distill/verification/'
sub(V+'comparison.py',('''    if isinstance(answer, Choice) and answer.text and not isinstance(gold, Choice):
        return None
    if (
        isinstance(answer, Several)
        and not isinstance(gold, Several | Named | Bracketed | Region | Family)
        and len(answer.parts) > 1
    ):
        if not (isinstance(gold, Assignment) and isinstance(gold.value, Several)):  # one value, written twice
            return _all(compare(gold, part, rules) for part in answer.parts)
''','''    if isinstance(answer, Choice) and answer.text and not isinstance(gold, Choice):  # `(B) 5` is 5
        return any(compare(gold, reading, rules) for reading in _readings(answer.text)) or None
    if isinstance(answer, Several) and len(answer.parts) > 1 and _is_single(gold):  # one value, written twice
        return _all(compare(gold, part, rules) for part in answer.parts)
'''),('''# Numbers, percentages, quantities
''','''def _is_single(gold: Answer) -> bool:
    value = gold.value if isinstance(gold, Assignment) else gold
    return not isinstance(value, Several | Named | Bracketed | Region | Family)


def _readings(text: str) -> tuple[Answer, ...]:
    from trl_reasoning_distill.verification.reading import read  # which imports what this module imports

    return read(text).answers


# Numbers, percentages, quantities
'''),('''    if gold.text:
        from trl_reasoning_distill.verification.reading import read

        outcomes = [compare(reading, answer, rules) for reading in read(gold.text).answers]
        return True if True in outcomes else False
    return False


def _texts_equal(gold: str, answer: str, rules: Rules) -> bool:
    from trl_reasoning_distill.verification.reading import read

    left, right = read(gold), read(answer)
    return left.text == right.text or any(compare(a, b, rules) for a in left.answers for b in right.answers)
''','''    return any(compare(reading, answer, rules) for reading in _readings(gold.text)) if gold.text else False


def _texts_equal(gold: str, answer: str, rules: Rules) -> bool:
    return gold == answer or any(compare(a, b, rules) for a in _readings(gold) for b in _readings(answer))
'''),
)
s=open(V+'comparison.py').read()
a=s.index('def _equations_equal'); b=s.index('# Regions of the real line')
eq=s[a:b]
s=s[:a].rstrip()+'\n\n\n'+s[b:]
a=s.index('_FLIPPED = {'); b=s.index('# The rest')
rel=s[a:b]
s=s[:a].rstrip()+'\n\n\n'+s[b:]
s=s.replace('_equations_equal','equations_equal').replace('return _relations_equal(gold, answer, rules)','return relations_equal(gold, answer, functools.partial(numbers_equal, tolerance=rules.tolerance))')
s=s.replace('''from trl_reasoning_distill.verification.expressions import (
    Call,''','''from trl_reasoning_distill.verification.equations import equations_equal, relations_equal
from trl_reasoning_distill.verification.expressions import (
    Call,''',1).replace('from collections.abc import Callable','import functools\nfrom collections.abc import Callable',1)
open(V+'comparison.py','w').write(s)
eq=eq.replace('_equations_equal','equations_equal')
rel='''_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


def relations_equal(gold: Relation, answer: Relation, same: Callable[[Expression, Expression], bool]) -> bool:
    """Whether two chains of inequalities say the same: side by side, turned round, or one a multiple of the other."""
    left = [side for side in gold.sides if side is not None]
    right = [side for side in answer.sides if side is not None]
    if len(left) < len(gold.sides) or len(right) < len(answer.sides):
        return False
    for sides, relations in ((right, answer.relations), (right[::-1], _turned(answer.relations))):
        if relations == gold.relations and all(map(same, left, sides)):
            return True
    if not len(gold.relations) == len(answer.relations) == 1:
        return False
    differences = Call("-", tuple(left)), Call("-", tuple(right))
    if variables(differences[0]) != variables(differences[1]):
        return False
    multiple = _is_multiple(*differences)
    return multiple is not None and gold.relations == (answer.relations if multiple else _turned(answer.relations))


def _turned(relations: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_FLIPPED[relation] for relation in reversed(relations))
'''
open(V+'equations.py','w').write('''"""When two equations, or two inequalities that are not solved, say the same.

Raises `UnknownValue` where that cannot be computed.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from trl_reasoning_distill.verification.answers import Relation
from trl_reasoning_distill.verification.expressions import Call, Expression, Number, Symbol, substitute, variables
from trl_reasoning_distill.verification.values import equal, numeric_value


'''+eq.rstrip()+'\n\n\n'+rel)
sub(V+'equations.py',('''    point = {name:''','''    point: dict[str, Expression] = {
        name:'''),) if False else None
s=open(V+'values.py').read()
i=s.splitlines()[225:235]; print('\n'.join(i))
sub(V+'atoms.py',('from collections.abc import Sequence','from collections.abc import Callable, Sequence'))
