from trl_reasoning_distill.verification.verify import verify_answers
B=lambda s:"\\boxed{%s}"%s
c=[("\\sum_{i=1}^{10} i","55"),("55","\\sum_{i=1}^{10} i"),("\\sum_{i=1}^{10} i + 1","55"),("\\int_0^1 x dx","\\frac12"),("\\int x dx","\\frac{x^2}{2}"),("\\lim_{x\\to 0} \\frac{\\sin x}{x}","1"),("\\sum_{i=1}^{10} i, foo bar","55"),("55 + \\int","55"),("\\frac{d}{dx} x^2","2x"),("\\prod_{k=1}^{5} k","120"),("1 + \\sum","1"),("\\int_0^1 x\\,dx + C","\\frac12"),("55 \\text{ or } \\sum_{i=1}^{3} i","55")]
for (a,g),v in zip(c,verify_answers([B(a) for a,_ in c],[g for _,g in c])): print(v.status,v.method,a,'|',g,'|',v.reason)
