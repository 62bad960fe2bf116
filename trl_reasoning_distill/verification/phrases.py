"""What people and models write around an answer, as patterns for `extract.py`. None backtracks: each repetition is bounded."""

from __future__ import annotations

import re
from collections import deque

_MARKS = r"[ \t*_)}\]]{0,6}"
_GAP = r"[ \t*_:：]{0,6}"
PHRASES: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = (
    (
        ("answer",),
        re.compile(
            rf"(?<![A-Za-z])(?P<final>final[ \t]{{1,4}})?answer{_MARKS}(?::|：|=|is\b|would be\b|must be\b|should be\b|—|->){_GAP}",
            re.IGNORECASE,
        ),
    ),
    (("a:",), re.compile(r"^[ \t]{0,4}A:[ \t]{0,4}", re.MULTILINE | re.IGNORECASE)),
    (
        ("réponse", "respuesta", "resposta", "solución", "solução", "antwort", "lösung", "ergebnis", "risposta"),
        re.compile(
            r"\b(?P<final>endgültige )?(?:réponse|respuesta|resposta|solución|solução|Antwort|Lösung|Ergebnis|Endergebnis|risposta)(?: finale?| correct[ae]| correta)?"
            rf"{_MARKS}(?::|est\b|es\b|é(?!\w)|è(?!\w)|ist\b|lautet\b|beträgt\b){_GAP}",
            re.IGNORECASE,
        ),
    ),
    (
        ("ответ",),
        re.compile(rf"(?<!\w)(?P<final>окончательный )?ответ{_MARKS}(?::|—|–|-|равен|это){_GAP}", re.IGNORECASE),
    ),
    (
        ("答", "正解", "结果", "結果", "답"),
        re.compile(
            rf"(?P<final>最终|最後)?(?:答案|答え|正解|结果|結果|정?답){_MARKS}(?:是|为|為|等于|应为|应该是|は|：|:|은|는){_GAP}|^[ \t]{{0,4}}答[:：][ \t]{{0,4}}",
            re.MULTILINE,
        ),
    ),
)
"""What announces an answer, for each group of languages; a pattern is tried only where one of its words stands in the lower-cased text."""


def announcements(text: str, lowered: str, limit: int) -> list[re.Match[str]]:
    """The last announcements of an answer, in their order."""
    found: list[re.Match[str]] = []
    for triggers, pattern in PHRASES:
        if any(trigger in lowered for trigger in triggers):
            found += deque(pattern.finditer(text), maxlen=limit)
    return sorted(found, key=lambda match: match.start())[-limit:]


INVERTED = re.compile(
    r"(?P<answer>\$[^$\n]{1,60}\$|(?<![^\s\"'(*])(?:[-+$]{0,2}\d[\d.,/]{0,30}%?|\(?[A-J]\)?))[ \t]is[ \t](?:the|our|my)[ \t](?:final[ \t]|correct[ \t])?answer\b",
    re.IGNORECASE,
)
REASON = re.compile(r"\b(?:because|since|as we|so that|which means)\b", re.IGNORECASE)
HAN_SENTENCE = re.compile(r"[\u4e00-\u9fff]{2,40}[^\n]{0,80}\d")
COMPOUND = re.compile(
    r"(?<![\w.])\d{1,9} ?(?:hours?|hrs?|h|minutes?|mins?|feet|foot|ft|pounds?|lbs?|days?|years?|weeks?|dollars?|kg|km|m|degrees)(?:,| and|, and)? \Z",
    re.IGNORECASE,
)
CHOICE_TRIGGERS = ("option", "choice", "choose", "pick", "select", "选", "選", "opción", "opção", "вариант")
CHOICE_PHRASE = re.compile(
    r"(?:\bI(?: would|'d)? (?:choose|pick|select)[ \t]{1,3}|\b(?:correct|right|best|final)?[ \t]{0,2}(?:option|choice)[ \t*_]{0,4}(?:is\b|:|=)[ \t*_:]{0,6}|\b(?:option|choice)[ \t]{1,3}(?=\(?[A-J]\)?[ \t]{1,3}is[ \t]{1,3}(?:the[ \t]{1,3})?(?:correct|right))"
    r"|(?:因此|所以|故|应|答案)?[选選](?:择|擇|项|項)?(?:是|为|：|:)?[ \t]{0,4}|(?:正确|正確)?(?:选项|選項)(?:是|为|：|:)[ \t]{0,4}|\b(?:opción|opção|option|вариант|Option)(?: correcta| correta)?[ \t]{0,2}(?:es|é|est|ist|:)[ \t]{0,4})"
    r"(?P<letter>[*_]{0,2}[(（\[]?(?:[A-J]|[Ａ-Ｊ])(?![A-Za-z]))",
    re.IGNORECASE,
)
JUDGEMENT = re.compile(
    r"(?:in)?correct|(?:not )?(?:right|wrong|valid|reasonable|unique|plausible)|(?:verified|confirmed|consistent|clear|obvious|found|given|obtained|as|the same)\b[^\d$\\]*",
    re.IGNORECASE,
)
HEDGED = re.compile(
    r"\b(?:(?:check|verify|confirm)(?:ing)? (?:our|the|this|that|my|your)|(?:whether|if|suppose|assume|assuming|unless|until|doubt(?: that)?|guess(?: that)?|think(?: that)?|sure(?: that| if)?|say|says|said|claims?|told me)(?: that)?(?: the| my| your| our)?(?: correct| final)?)[ \t]{1,3}(?:the |my |your )?\Z|(?:如果|是否|假设|不知道)[^。\n]{0,12}\Z",
    re.IGNORECASE,
)
REJECTED = re.compile(
    r"(?:is |was )?(?:wrong|incorrect|not right|not correct)\b|(?:that|this) is (?:wrong|incorrect|not)", re.IGNORECASE
)
THEREFORE = re.compile(
    r"\b(?:therefore|thus|hence|donc|daher|somit|also|por lo tanto|portanto|итак|значит)\b[ \t,:]{0,4}|(?:因此|所以|综上)[ \t,，:：]{0,4}",
    re.IGNORECASE,
)
RETRACTION = re.compile(
    r"\b(?:wait|hold on|scratch that|correction|i made (?:a|an) (?:mistake|error)|that(?:'s| is) (?:wrong|not right|incorrect)|let me reconsider|actually,? no)\b|等等|不对",
    re.IGNORECASE,
)
AFFIRMED = re.compile(
    r"\b(?:consistent|correct|confirms?|confirmed|matches|checks out|holds|fine|as expected|verified|good|indeed|agrees|is right|works|makes sense)\b|正确|没错",
    re.IGNORECASE,
)
TROUBLED = re.compile(
    r"\b(?:wrong|mistake|incorrect|instead|not (?:correct|consistent|right)|inconsistent|should (?:be|have been)|must be|contradict\w*|doesn't|does not|error|forgot)\b|错|应该是",
    re.IGNORECASE,
)
NEW_QUESTION = re.compile(
    r"^[ \t*#]{0,6}(?:(?:next |new )?(?:question|problem|q|exercise|human|user|instruction|query|input)[ \t]{0,2}\d{0,3}[ \t*]{0,3}[:：]|问题?[ \t]{0,2}\d{0,3}[:：]|题目[:：]|Frage[:：]|Pregunta[:：]|Вопрос[:：])|<\|im_start\|>user|<\|endoftext\|>|<\|eot_id\|>",
    re.IGNORECASE | re.MULTILINE,
)
SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z*<\[(À-ÖØ-ÞА-Я\"]|\s*$)|[。？！]|\n|(?<=\d)\.(?=[\u4e00-\u9fff])")
COPULA = re.compile(
    r"\b(?:is|are|equals|was|will be|must be|comes to|est|ist|es|é)\b|равн[аоы]?|[是为為]|(?<=[a-z]):", re.IGNORECASE
)
OPTIONS = re.compile(r"(?:^|[\s,;])\(?[A-Ja-j][).:](?=\s)")
REFUSAL = re.compile(
    r"\b(?:i (?:really )?(?:don't|do not|can't|cannot|can not|am not able to|am unable to) (?:know|solve|answer|determine|figure|compute|say|tell)|no idea|i give up|unable to (?:solve|determine|answer)|cannot be determined|not sure)\b|我不知道|无法(?:确定|解答|回答)",
    re.IGNORECASE,
)
SUPPOSED = re.compile(r"\b(?:if|whether|suppose|assume|assuming)\b(?:(?!\bthen\b|[.!?,;\n]).){0,70}\Z", re.IGNORECASE)
DOUBTED = re.compile(r"\b(?:maybe|perhaps|not sure|i guess|possibly)\b|[?？]\s*$|可能|也许", re.IGNORECASE)
BEFORE_A_NUMBER = re.compile(
    r"(?:\b(?:not|isn't|never|neither|nor|nicht|non|no es|não é|at least|at most|more than|less than|greater than|fewer than|smaller than|larger than|no more than|no less than|under|over|above|below|up to|nearly|almost|minus|negative|either|maybe|perhaps|half of|twice|double|square root of|sqrt|ln|log|sin|cos|tan)"
    r"|不是|不等于|至少|至多|大于|小于|超过|не|[<>≤≥≠!√]=?|\\(?:ne|le|ge|neq|leq|geq|sqrt))(?: equal to)?[ ]{0,2}\Z"
    r"|(?:(?<![\w.,])-?[\d.,]{1,20} ?(?:or|oder|ou|или|或|或者|to|and|[:×^*/])[ ]{0,2}\Z)",
    re.IGNORECASE,
)
"""Words before a number that change its meaning, or another number that is its alternative."""
BEHIND_A_NUMBER = re.compile(
    r"[ ]?(?:\\?%|percent\b|pct\b|!+(?=\s|[.,;)]|$)|factorial\b|squared\b|cubed\b|(?:dozen|hundred|thousand|million|billion|trillion)\b|π|\\pi|pi\b|[万亿千百]+|or (?:more|less|fewer|so)\b|°[CF]?|i\b|\^[{]?-?\d{1,4}[}]?)",
    re.IGNORECASE,
)
"""What belongs to the number that it follows."""
