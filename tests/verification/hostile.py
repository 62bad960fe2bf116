r"""Strings made to hang, crash or fool a verifier, as a model or a dataset might hold them. None is the right answer to anything."""

from __future__ import annotations

POWERS = [
    "9^{9^{9^{9}}}", "10^{10^{10}}", "2^{2^{2^{2^{2^{2}}}}}", "2^{100000000}", "(1/3)^{10^{9}}", "x^{x^{x^{x^{x^{x^{x}}}}}}=1", "(x+y+z)^{1000}",
    "e^{e^{e^{e^{e^{10}}}}}", "(-1)^{0.1^{0.1^{0.1}}}", "\\sqrt[10^{9}]{2^{10^{9}}}",
]  # fmt: skip
FACTORIALS = [
    "100000000!",
    "((((((((10!)!)!)!)!)!)!)!)",
    "\\binom{10^{9}}{5\\cdot 10^{8}}",
    "\\frac{10^{7}!}{10^{6}!}",
    "\\Gamma(10^{10})",
    "\\prod_{i=1}^{10^{9}} i",
]
CALCULUS = [
    "\\sum_{i=1}^{10^{12}} \\frac{1}{i}", "\\int_0^{x} e^{t^{t^{t}}} dt", "\\int \\frac{\\sin(x^{x})}{\\ln(\\cos x)} dx", "\\lim_{x \\to 0} x^{x^{x^{x}}}",
    "\\sum_{n=1}^{\\infty} \\frac{\\sin(n^{n})}{n!}", "\\frac{d^{1000}}{dx^{1000}} \\tan(\\tan(x))", "\\sin(10^{10^{5}})", "x^{7}+x^{6}+\\sin(x)=\\cos(x^{x})",
]  # fmt: skip
NESTED = [
    "\\sqrt{" * 300, "\\sqrt{" * 150 + "2" + "}" * 150, "\\frac{" * 300, "\\frac{1}{1+" * 60 + "1" + "}" * 60, "\\text{" * 300, "\\boxed{" * 250,
    "{" * 1900, "}" * 1900, "(" * 900 + "1" + ")" * 900, "[(" * 450, "\\{" * 900, "\\left(" * 300, "\\begin{pmatrix}" * 100, "\\begin{cases}" * 100 + "1",
    "|" * 1900, "f(" * 600 + "x" + ")" * 600, "\\log" * 400, "x_{" * 600,
]  # fmt: skip
LONG = [
    "1" * 1900, "0." + "3" * 1900, "x" * 1900, "-" * 1900 + "1", "1/" * 600 + "1", "1," * 900 + "1", "1+" * 900 + "1", "x=" * 900 + "1", "x<" * 600 + "1", "1e999999999",
    "1e-999999999", "1" * 5000 + "!", "9" * 4301, ", ".join(map(str, range(500))), "\\cup".join(["(0,1)"] * 200), " & ".join(["1"] * 900), "1 " * 900,
]  # fmt: skip
UNICODE = [
    "\ud800", "\udfff\ud800", "\x00", "4\x002", "\u202e24\u202c", "\u200f\u200e", "𝟜𝟚", "½", "٤٢", "四十二", "4\u0301\u03022" * 100, "\ufeff\u200b\u2060", "∞", "−∞<x<∞", "\u2028\u2029",
    "\U0001f9ee" * 500, "Ⅻ", "x\u0338=1", "\x1b[31m", "\r\n\r\n",
]  # fmt: skip
CODE = [
    "__import__('os').system('true')", "exec('while True: pass')", "'; DROP TABLE answers; --", "<script>alert(42)</script>", "{{7*7}}", "${jndi:ldap://x}", "\\input{/etc/passwd}",
    "\\write18{true}", "\\def\\a{\\a\\a}\\a", "%s%s%s%n", "[x for x in ().__class__.__base__.__subclasses__()]", "lambda: 0", "nan", "\\infty-\\infty", "\\frac{0}{0}", "1/0", "0^0", "None",
    "a" * 40 + "!" , "\\a" * 900, "$" * 1901, "\\$" * 900, "\\\\" * 900, "&" * 900, "#" * 1900, "%" * 1900,
]  # fmt: skip

HOSTILE = [*POWERS, *FACTORIALS, *CALCULUS, *NESTED, *LONG, *UNICODE, *CODE]

MEGABYTE = [
    bit * (1_000_000 // len(bit))
    for bit in ("{", "}", "{}", "\\boxed{", "\\boxed{1}, ", "$", "\\(", "#### ", "answer is ", "1,", "1 ", "<think>", "</think>", "Wait ", " ", "\n", "\ud800", "¼")
]  # fmt: skip
"""Whole outputs of a million characters."""
