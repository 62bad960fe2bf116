from trl_reasoning_distill.verification.reading import read
from trl_reasoning_distill.verification.regions import *
from trl_reasoning_distill.verification import regions
for t in ("-2 \\le x \\le 2","x^2 \\le 4"):
    r=read(t); print(r); print([region_of(a) for a in r.answers])
